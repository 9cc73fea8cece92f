"""Fine-tuning a run by labels, and what is done with it: the commands."""

import csv
import json

import numpy as np
import onnxruntime
import pytest
import safetensors
from PIL import Image

import cmd_jax
from cmd_jax.cli import program
from cmd_jax.config import builtin
from cmd_jax.errors import UserError
from cmd_jax.report.content import collect
from cmd_jax.rundir.saved_run import read_config
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training import finetune, run
from cmd_jax.training.validation import Validation
from tests import saved_runs

_COLOURS = {'blue': (40, 40, 200), 'green': (40, 200, 40)}
_SMALL = (
  '--config.batch_size=8',
  '--config.total_epochs=3',
  '--config.augment.num_local=0',
  '--config.optim.freeze_encoder_epochs=0',
  '--config.optim.base_learning_rate=0.3',
  "--config.eval.protocols=('knn/20',)",
  '--config.eval.batch_size=8',
  '--compilation_cache=',
)


def _write_images(folder, count):
  rng = np.random.default_rng(0)
  for name, colour in _COLOURS.items():
    (folder / name).mkdir(parents=True)
    for number in range(count):
      pixels = rng.normal(colour, 30, (20, 20, 3)).clip(0, 255)
      path = folder / name / f'{number}.png'
      Image.fromarray(pixels.astype(np.uint8)).save(path)


def _arguments(place, *more):
  return [
    f'--workdir={place / "run"}',
    '--config=folder',
    f'--config.dataset.path={place / "images"}',
    *_SMALL,
    *more,
  ]


@pytest.fixture(scope='module')
def fine(tmp_path_factory):
  """A run, labelled images, and the run fine-tuned on them."""
  place = tmp_path_factory.mktemp('finetune')
  _write_images(place / 'images', 16)
  saved_runs.make_run(place / 'run')
  assert program.run(['finetune', *_arguments(place)]) == 0
  return place


def test_it_starts_from_the_run_and_sees_as_it_does(fine):
  workdir = Workdir(str(fine / 'run' / 'finetuned'))
  config, of_run = read_config(workdir), read_config(Workdir(str(fine / 'run')))
  assert config.model == of_run.model
  assert config.augment.global_px == of_run.augment.global_px
  assert config.canvas_px == of_run.canvas_px
  assert config.init.path == str(fine / 'run' / 'checkpoints')
  assert workdir.results()['init_from']['family'] == 'teacher of a run of cmd'


def test_results_have_the_classifier(fine):
  results = json.loads((fine / 'run/finetuned/results.json').read_text())
  classifier = results['classifier']
  assert classifier['class_names'] == list(_COLOURS)
  assert classifier['step'] == results['scored_step']
  assert results['best']['score'] == 'top1'
  assert classifier['test']['images'] > 2
  # Colours of a few pixels are easy, and a trained classifier is not at chance.
  assert classifier['test']['top1'] > 0.9
  assert classifier['validation']['kept'] >= 0.95
  assert set(classifier['test']['per_class']) == set(_COLOURS)
  assert 'knn/20/top1' in results['final']


def test_predictions_are_named_and_of_the_classifier(fine, capsys):
  output = fine / 'names.csv'
  command = ['predict', f'--workdir={fine / "run/finetuned"}']
  images = f'--input={fine / "images"}'
  assert program.run([*command, images, f'--output={output}']) == 0
  assert '32 images' in capsys.readouterr().out
  rows = list(csv.DictReader(output.read_text().splitlines()))
  assert len(rows) == 32
  known = [row for row in rows if row['name'] != 'not among the classes']
  right = [row['file'].startswith(row['name']) for row in known]
  assert np.mean(right) > 0.9
  for row in rows:
    total = float(row['probability_1']) + float(row['probability_2'])
    assert total == pytest.approx(1, abs=1e-5)
    assert row['probability'] == row['probability_1']
  threshold = cmd_jax.load(fine / 'run/finetuned').classifier.threshold
  for row in rows:
    is_known = float(row['probability']) >= threshold - 1e-6
    assert is_known == (row in known)


def test_the_report_shows_the_classifier(fine):
  with run.opened(None, fine / 'run/finetuned', reads_only=True) as opened:
    content = collect(opened.experiment, opened.workdir, max_images=8)
    results = opened.workdir.results()
  test = results['classifier']['test']
  assert content['confusion']['judge'] == 'The fine-tuned classifier'
  assert content['confusion']['total'] == test['images']
  right = content['confusion']['right'] / content['confusion']['total']
  assert right == pytest.approx(test['top1'])
  assert any('calibration error' in note for note in content['notes'])


def test_what_is_exported_has_the_classifier(fine):
  workdir, views = fine / 'run/finetuned', np.zeros((2, 3, 16, 16), np.float32)
  for name in ('onnx', 'safetensors'):
    command = ['export', f'--workdir={workdir}', f'--format={name}']
    assert program.run(command) == 0
  encoder = cmd_jax.load(workdir)
  session = onnxruntime.InferenceSession(workdir / 'encoder.onnx')
  embedding, probabilities = session.run(
    ['embedding', 'probabilities'], {'images': views}
  )
  wanted = encoder.classifier.probabilities(embedding)
  np.testing.assert_allclose(probabilities, wanted, atol=1e-5)
  sidecar = json.loads((workdir / 'encoder.onnx.json').read_text())
  assert sidecar['classifier']['class_names'] == list(_COLOURS)
  with safetensors.safe_open(workdir / 'encoder.safetensors', 'np') as file:
    np.testing.assert_array_equal(
      file.get_tensor('head.weight'), encoder.classifier.kernel.T
    )
    assert json.loads(file.metadata()['classifier']) == sidecar['classifier']
    assert 'num_classes=2' in file.metadata()['timm']
  # The encoder is read back without it.
  again = cmd_jax.load(workdir / 'encoder.safetensors')
  assert again.classifier is None and again.hash == encoder.hash


def test_other_labels_are_refused_and_nothing_is_lost(fine, capsys):
  before = (fine / 'run/finetuned/results.json').read_bytes()
  moved = fine / 'images/blue/0.png'
  moved.rename(fine / 'images/green/99.png')
  try:
    assert program.run(['finetune', *_arguments(fine)]) == 2
  finally:
    (fine / 'images/green/99.png').rename(moved)
  assert 'trained on other images' in capsys.readouterr().err
  assert (fine / 'run/finetuned/results.json').read_bytes() == before


@pytest.mark.parametrize(
  'command, words',
  [
    (['finetune', '--workdir={}/none', '--config=folder'], 'no work directory'),
    (
      ['finetune', '--workdir={}/run', '--config=folder:encoder=swin'],
      "another architecture, 'vit'",
    ),
    (
      ['finetune', '--workdir={}/run', '--config=folder:method=dino'],
      'leave method= out',
    ),
    (
      [
        'finetune',
        '--workdir={}/run',
        '--config=folder',
        '--config.dataset.path={}/gone',
        '--output={}/other',
      ],
      'gone does not exist',
    ),
    (
      ['predict', '--workdir={}/run', '--input={}/images'],
      'a run of method=cmd, has no calibrated classifier: cmd-jax finetune',
    ),
    (
      ['predict', '--workdir={}/run/finetuned', '--input={}/gone'],
      'gone does not exist',
    ),
    (
      [
        'predict',
        '--workdir={}/run',
        '--input={}/images',
        '--output=names.txt',
      ],
      'does not end in .csv',
    ),
  ],
)
def test_mistakes_are_one_line(fine, capsys, command, words):
  command = [word.format(fine) for word in command]
  assert program.run([*command, '--compilation_cache=']) == 2
  errors = capsys.readouterr().err.splitlines()
  assert words in errors[-1]


def test_the_model_of_a_config_must_be_that_of_the_run(fine):
  config = builtin.folder('method=finetune,encoder=vit').unlock()
  config.dataset.path = str(fine / 'images')
  # The work directory is its folder of checkpoints.
  config.init.path = str(fine / 'run')
  config.batch_size = 8
  with (
    pytest.raises(UserError, match=r'has another encoder.*arrays differ'),
    run.opened(config, fine / 'other'),
  ):
    pass


def test_own_images_are_those_of_the_run(fine):
  start = finetune.read_start(str(fine / 'run'), None)
  config = finetune.config_of_images(str(fine / 'run'), start)
  of_run = read_config(Workdir(str(fine / 'run')))
  assert config.dataset.to_dict() == of_run.dataset.to_dict()
  assert finetune.start_from(config, start).method.name == 'finetune'


def test_scores_that_a_method_has_not_are_refused(fine):
  for words, score in (('method=finetune', 'knn'), ('method=dino', 'top1')):
    config = builtin.folder(f'{words},quicktest').unlock()
    config.dataset.path = str(fine / 'images')
    config.checkpoint.keep_best = score
    config.eval.every_epochs = 1.0
    config.batch_size = 8
    with (
      pytest.raises(UserError, match=f'keep_best is {score!r}'),
      run.opened(config, fine / 'other'),
    ):
      pass


class _Steps:
  evaluate_every, total, keep_best, patience = 10, 100, 'top1', 2


class _Experiment:
  steps = _Steps


@pytest.mark.parametrize(
  'step, stalled', [(10, False), (20, False), (30, True)]
)
def test_it_ends_when_nothing_is_gained(step, stalled):
  best = {'score': 'top1', 'step': 10, 'value': 0.5, 'nll': 1.0}
  saved = {'step': step, 'nearest': None, 'best': best}
  assert Validation(_Experiment, saved, [10]).has_stalled == stalled
