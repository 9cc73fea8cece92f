import numpy as np
import pytest

from cmd_jax.data.canvas import make_canvases
from cmd_jax.data.sources import prepare as prepare_lib
from cmd_jax.data.sources.prepare import prepare, prepare_config
from cmd_jax.data.sources.tfds_source import tfds_source
from cmd_jax.errors import UserError
from configs import aircraft, cars, cub
from tests.tfds_builders import layouts
from tfds_builders import photos

CONFIGS = {'cub': cub, 'cars': cars, 'aircraft': aircraft}
MAKE = {
  'cub': layouts.make_cub,
  'cars': layouts.make_cars,
  'aircraft': layouts.make_aircraft,
}


def _dataset(name, data_dir):
  dataset = CONFIGS[name].get_config('quicktest').dataset.to_dict()
  return {
    **dataset,
    'data_dir': str(data_dir),
    'builder_config': 'quicktest',
  }


def _expected(name, split):
  """{name of the file: (class, box in pixels)} of what a config reads."""
  if name == 'cub':
    return {
      file: (
        layouts.CUB_CLASSES[c - 1],
        (i, 2 * i + 0.5, i + 30, 2 * i + 100.5),
      )
      for i, (file, c, is_train) in enumerate(layouts.cub_names(), 1)
      if is_train == (split == 'train')
    }
  if name == 'cars':
    return {
      f'cars_{split}/{file}': (
        layouts.CAR_CLASSES[label - 1],
        (box[0] - 1, box[1] - 1, box[2], box[3]),
      )
      for file, label, box in layouts.car_labels(split)
    }
  return {
    f'{image_id}.jpg': (layouts.VARIANTS[v][0], (0, 10, 25, 40))
    for image_id, v in layouts.aircraft_ids(split)
  }


@pytest.mark.parametrize('name', CONFIGS)
def test_what_is_prepared_is_read_as_an_experiment_reads_it(name, tmp_path):
  MAKE[name](tmp_path / 'manual')
  dataset = _dataset(name, tmp_path / 'data')
  first = prepare_config(
    dataset, manual_dir=str(tmp_path / 'manual'), progress=False
  )
  assert first.is_new and str(tmp_path / 'data') in str(first)
  for split in (dataset['pretrain_split'], dataset['test_split']):
    source = tfds_source(
      dataset['name'],
      split,
      data_dir=dataset['data_dir'],
      builder_config=dataset['builder_config'],
    )
    canvases = make_canvases(source, canvas_px=16, progress=False)
    expected = _expected(name, split)
    assert first.num_examples[split] == len(expected) == len(canvases.images)
    assert not canvases.skipped
    assert set(canvases.file_names) == set(expected)
    for i, file_name in enumerate(canvases.file_names):
      class_name, (left, top, right, bottom) = expected[file_name]
      assert canvases.class_names[canvases.labels[i]] == class_name
      height, width = canvases.sizes[i]
      edges = top / height, left / width, bottom / height, right / width
      np.testing.assert_allclose(
        canvases.boxes[i], np.minimum(edges, 1), rtol=1e-6
      )


def _files(folder):
  """When each was written; reading them is no change."""
  return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


def test_a_prepared_set_is_left_as_it_is(tmp_path, capfd):
  layouts.make_cars(tmp_path / 'manual')
  options = dict(data_dir=str(tmp_path / 'data'), builder_config='quicktest')
  first = prepare(
    'stanford_cars',
    manual_dir=str(tmp_path / 'manual'),
    progress=False,
    **options,
  )
  assert capfd.readouterr() == ('', '')
  files = _files(tmp_path / 'data')
  # Without the files it was made of.
  again = prepare('stanford_cars', **options)
  assert again == first._replace(is_new=False, num_examples=again.num_examples)
  assert again.num_examples == first.num_examples == {'train': 6, 'test': 6}
  assert _files(tmp_path / 'data') == files
  assert 'already prepared' in str(again) and 'train 6' in str(again)


def test_the_progress_is_shown(tmp_path, capfd):
  layouts.make_cub(tmp_path / 'manual')
  prepare(
    'cub_200_2011/quicktest',
    data_dir=str(tmp_path / 'data'),
    manual_dir=str(tmp_path / 'manual'),
  )
  out, err = capfd.readouterr()
  assert out == '' and 'cub_200_2011 train: ' in err and '/4 [' in err


def test_an_interrupted_preparation_starts_anew(tmp_path, monkeypatch):
  layouts.make_cub(tmp_path / 'manual')
  read_photos = photos.read_photos

  def interrupted(*args, **kwargs):
    yield next(read_photos(*args, **kwargs))
    raise KeyboardInterrupt

  def run():
    return prepare(
      'cub_200_2011/quicktest',
      data_dir=str(tmp_path / 'data'),
      manual_dir=str(tmp_path / 'manual'),
      progress=False,
    )

  monkeypatch.setattr(photos, 'read_photos', interrupted)
  with pytest.raises(KeyboardInterrupt):
    run()
  parent = tmp_path / 'data' / 'cub_200_2011' / 'quicktest'
  assert not list(parent.glob('*'))
  monkeypatch.undo()
  # What a killed process leaves, and what belongs to another version.
  (parent / 'incomplete.ABCDEF_1.0.0' / 'x').mkdir(parents=True)
  (parent / 'incomplete.ABCDEF_0.9.0').mkdir()
  assert run().is_new
  assert {path.name for path in parent.iterdir()} == {
    '1.0.0',
    'incomplete.ABCDEF_0.9.0',
  }


def _message(*args, **kwargs):
  with pytest.raises(UserError) as error:
    prepare(*args, progress=False, **kwargs)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_mistakes_are_answered_with_what_to_do(tmp_path):
  (tmp_path / 'empty').mkdir()
  options = dict(data_dir=str(tmp_path / 'data'))
  for folder, problem in (('no', 'is not a folder'), ('empty', 'is empty')):
    text = _message(
      'cub_200_2011', manual_dir=str(tmp_path / folder), **options
    )
    assert problem in text and 'CUB_200_2011.tgz (1,150,585,339 bytes)' in text
  text = _message('toybirds', manual_dir=str(tmp_path / 'empty'), **options)
  assert 'leave it out' in text
  text = _message('stanford_cars', **options)
  assert 'downloads/manual lacks cars_train.tgz' in text
  assert 'quicktest' in _message('stanford_cars/small', **options)
  assert 'stanford_cars' in _message('stanford_car', **options)
  # A set of TFDS, whose builder raises what it likes.
  text = _message('imagenet2012', **options)
  assert 'ILSVRC2012_img_train.tar' in text and '--manual_dir' in text
  incomplete = tmp_path / 'data' / 'stanford_cars' / 'whole' / '1.0.0'
  incomplete.mkdir(parents=True)
  assert 'not a complete data set' in _message('stanford_cars', **options)
  blocked = tmp_path / 'file'
  blocked.touch()
  text = _message('toybirds/quicktest', data_dir=str(blocked))
  assert 'could not be prepared' in text
  with pytest.raises(UserError, match='needs no cmd-jax prepare'):
    prepare_config({'source': 'folder', 'path': str(tmp_path)})


def test_a_set_that_another_process_made_meanwhile_is_found(
  tmp_path, monkeypatch
):
  options = dict(data_dir=str(tmp_path), builder_config='quicktest')
  check = prepare_lib._check_manual_dir

  def other_process(*args):
    monkeypatch.undo()
    assert prepare('toybirds', progress=False, **options).is_new
    return check(*args)

  monkeypatch.setattr(prepare_lib, '_check_manual_dir', other_process)
  found = prepare('toybirds', progress=False, **options)
  assert not found.is_new and found.num_examples['train'] == 96
