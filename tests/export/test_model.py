"""What `--mode=export` writes."""

import doctest
import hashlib
import json
import os
import pathlib
import sys

import numpy as np
import onnxruntime
import pytest

import cmd_jax
from cmd_jax.cli import program
from cmd_jax.errors import UserError
from cmd_jax.export.model import Request, export_model
from tests import saved_runs

_REPO = pathlib.Path(__file__).resolve().parents[2]
_DOCS = _REPO / 'docs' / 'export.md'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The work directory of a CMD run."""
  path = tmp_path_factory.mktemp('export') / 'run'
  saved_runs.make_run(path)
  return path


def test_a_run_leaves_a_model_and_what_must_be_known_of_it(run):
  (run / 'encoder.onnx').write_text('of before')
  printed = export_model(Request(str(run), format='onnx', attention=True))
  path, sidecar = run / 'encoder.onnx', run / 'encoder.onnx.json'
  assert str(path) in printed and str(sidecar) in printed
  assert not [name for name in os.listdir(run) if name.startswith('.')]
  encoder = cmd_jax.load(run)
  told = json.loads(sidecar.read_text())
  assert told['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
  assert told['file'] == 'encoder.onnx'
  assert told['encoder_sha256'] == encoder.hash
  assert told['source'] == f'teacher of {run} after step 3'
  assert told['training']['method'] == 'cmd'
  assert told['training']['steps'] == '3'
  assert told['versions']['cmd_jax'] == cmd_jax.__version__
  assert told['preprocessing'].items() >= encoder.preprocessing.items()
  by_name = {output['name']: output for output in told['outputs']}
  assert by_name['attention']['kind'] == 'multi-instance'
  assert by_name['attention']['grid'] == [4, 4]

  # What the sidecar says suffices, but for how a canvas becomes a view.
  pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
  fields = told['preprocessing']
  view = (pixels / 255 - fields['mean']) / fields['std']
  session = onnxruntime.InferenceSession(path)
  (images,) = told['inputs']
  got = session.run(
    ['embedding', 'attention'],
    {images['name']: view.astype(images['dtype']).transpose(0, 3, 1, 2)},
  )
  want = encoder(pixels)
  np.testing.assert_allclose(got[0], want.image, atol=1e-4)
  np.testing.assert_allclose(got[1], want.attention, atol=1e-4)


def test_the_student_is_another_network(run, tmp_path):
  for network in ('teacher', 'student'):
    output = str(tmp_path / f'{network}.stablehlo')
    export_model(Request(str(run), network, output, 'stablehlo', canvases=True))
  told = [
    json.loads((tmp_path / f'{network}.stablehlo.json').read_text())
    for network in ('teacher', 'student')
  ]
  assert told[0]['encoder_sha256'] != told[1]['encoder_sha256']
  assert [x['training']['network'] for x in told] == ['teacher', 'student']
  steps = told[0]['preprocessing']['steps']
  assert len(steps) == 1 and 'squash' in steps[0]


def test_weights_go_out_and_in_again(run, tmp_path):
  printed = export_model(Request(str(run)))
  path = run / 'encoder.safetensors'
  assert printed.startswith(f'{path}: the state dict of\ntimm.')
  encoder, again = cmd_jax.load(run), cmd_jax.load(path)
  assert again.hash == encoder.hash
  assert again.preprocessing == encoder.preprocessing
  copy = tmp_path / 'copy.safetensors'
  export_model(Request(str(path), output=str(copy)))
  assert cmd_jax.load(copy).hash == encoder.hash


@pytest.mark.parametrize(
  'fields, words',
  [
    (dict(output='a.onnx'), r'does not end in .safetensors: name --output so'),
    (dict(attention=True), '--attention is of --format=stablehlo and onnx'),
    (dict(format='onnx', canvases=True), '--canvases is of'),
    (dict(output='{run}/folder.safetensors'), 'is a folder'),
    (dict(source='{run}/none'), 'none does not exist'),
  ],
)
def test_what_cannot_be_is_refused(run, fields, words):
  (run / 'folder.safetensors').mkdir(exist_ok=True)
  fields = {
    name: value.format(run=run) if isinstance(value, str) else value
    for name, value in fields.items()
  }
  before = sorted(os.listdir(run))
  with pytest.raises(UserError, match=words) as caught:
    export_model(Request(**{'source': str(run)} | fields))
  assert '\n' not in str(caught.value)
  assert sorted(os.listdir(run)) == before


def test_the_source_is_not_overwritten(run, monkeypatch):
  export_model(Request(str(run)))
  monkeypatch.chdir(run)
  before = (run / 'encoder.safetensors').read_bytes()
  with pytest.raises(UserError, match='is what is exported: choose another'):
    export_model(Request('encoder.safetensors'))
  assert (run / 'encoder.safetensors').read_bytes() == before


def test_without_the_onnx_package_the_extra_is_named(run, monkeypatch):
  monkeypatch.setitem(sys.modules, 'onnx', None)
  for name in ('onnx', 'onnx_graph', 'onnx_operators'):
    monkeypatch.delitem(sys.modules, f'cmd_jax.export.{name}', raising=False)
  with pytest.raises(UserError, match=r"pip install 'cmd_jax\[onnx\]'"):
    export_model(Request(str(run), format='onnx'))


def test_the_program_needs_the_work_directory_alone(run, tmp_path, capsys):
  output = tmp_path / 'model.onnx'
  arguments = ('--compilation_cache=', f'--workdir={run}', '--format=onnx')
  status = program.run(
    ['export', *arguments, f'--output={output}', '--attention']
  )
  captured = capsys.readouterr()
  assert status == 0, captured.err
  assert str(output) in captured.out
  told = json.loads((tmp_path / 'model.onnx.json').read_text())
  assert {x['name'] for x in told['outputs']} == {'embedding', 'attention'}


def test_the_examples_of_the_documentation_hold(run, tmp_path, monkeypatch):
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'mine').symlink_to(run)
  saved_runs.write_images(tmp_path / 'photos', ['0.png'])
  monkeypatch.chdir(tmp_path)
  for request in (
    Request('runs/mine', format='stablehlo'),
    Request(
      'runs/mine',
      '',
      'runs/mine/canvases.stablehlo',
      'stablehlo',
      canvases=True,
    ),
    Request('runs/mine', format='onnx', attention=True),
  ):
    export_model(request)
  failed, tried = doctest.testfile(str(_DOCS), module_relative=False)
  assert tried > 20 and not failed
