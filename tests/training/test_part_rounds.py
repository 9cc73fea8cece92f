import json

import jax
import numpy as np
import pytest
from PIL import Image

from cmd_jax import errors
from cmd_jax.data import canvas
from cmd_jax.data.pipeline import load
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training import experiment, part_rounds
from configs import particle_toybirds

_COUNT, _PX = 16, 32


def _canvases(name='birds/train', count=_COUNT):
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
  return canvas.Canvases(
    name=name,
    images=coarse.repeat(_PX // 4, 1).repeat(_PX // 4, 2),
    sizes=np.full((count, 2), _PX, np.int32),
    labels=np.arange(count, dtype=np.int32) % 2,
    file_names=tuple(f'{i}.png' for i in range(count)),
    class_names=('robin', 'wren'),
    part_ids=rng.integers(0, 10, (count, _PX, _PX), np.uint8),
    boxes=None,
    skipped=(),
  )


@pytest.fixture
def build(monkeypatch):
  """(words, changes) -> an experiment on made-up images."""

  class _Source:
    channels = 3
    file_names = ('0.png',)

  monkeypatch.setattr(load, 'load_source', lambda *_: _Source)
  monkeypatch.setattr(
    load, 'make_canvases', lambda source, canvas_px: _canvases()
  )

  def build(words='', **changes):
    config = particle_toybirds.get_config(f'{words},quicktest')
    config.batch_size = 8
    if config.model.name == 'vit':
      config.model.depth = 1
    config.parts.update(view_px=32, batch_size=5)
    config.parts.update(changes)
    return experiment.build(config)

  return build


@pytest.fixture
def workdir(tmp_path):
  workdir = Workdir(str(tmp_path / 'run'))
  workdir.open({})
  return workdir


def test_parts_are_found_once_and_drawn(build, workdir):
  built = build()
  state = built.init_state()
  masks = part_rounds.find_part_masks(built, state, workdir, 'round_1')
  assert masks.shape == (_COUNT, _PX, _PX)
  assert masks.max() < built.parts.num_ids == 10
  with Image.open(workdir.parts / 'round_1.png') as sheet:
    assert sheet.width > _PX
  assert sorted(p.name for p in workdir.parts.iterdir()) == [
    'round_1',
    'round_1.png',
  ]
  again = part_rounds.find_part_masks(built, state, workdir, 'round_1')
  np.testing.assert_array_equal(again, masks)
  sha256 = part_rounds.hash_of_encoder(built, state)
  loaded = part_rounds.load_part_masks(built, workdir, 'round_1', sha256)
  np.testing.assert_array_equal(loaded, masks)


def test_masks_of_another_encoder_are_refused(build, workdir):
  built = build()
  state = built.init_state()
  part_rounds.find_part_masks(built, state, workdir, 'round_1')
  other = state._replace(
    teacher_params=jax.tree.map(lambda x: x + 1, state.teacher_params)
  )
  with pytest.raises(errors.UserError, match='encoder_sha256'):
    part_rounds.find_part_masks(
      built, other, workdir, 'round_2', path=workdir.parts / 'round_1'
    )
  same = part_rounds.find_part_masks(
    built, state, workdir, 'round_2', path=workdir.parts / 'round_1'
  )
  assert same.shape == (_COUNT, _PX, _PX)
  # The run keeps them: it goes on without that folder.
  sha256 = part_rounds.hash_of_encoder(built, state)
  kept = part_rounds.load_part_masks(built, workdir, 'round_2', sha256)
  np.testing.assert_array_equal(kept, same)
  with pytest.raises(errors.UserError, match='settings.num_parts'):
    fewer = build(settings=dict(num_parts=7))
    sha256 = part_rounds.hash_of_encoder(built, state)
    part_rounds.load_part_masks(fewer, workdir, 'round_1', sha256)


@pytest.mark.parametrize(
  'words, num_ids',
  [
    ('method=detcon', 16),
    ('parts=annotated', 10),
    ('encoder=resnet', 8),
    # A ResNet's are looked at always.
    pytest.param(
      *('encoder=efficientnet,parts=hypercolumn', 8), marks=pytest.mark.slow
    ),
    ('method=detcon,parts=felzenszwalb', 16),
  ],
)
def test_every_source_gives_masks(build, workdir, words, num_ids):
  pytest.importorskip('skimage')
  built = build(words)
  assert built.parts.num_ids == num_ids
  masks = part_rounds.find_part_masks(
    built, built.init_state(), workdir, 'round_1'
  )
  assert masks.shape == (_COUNT, _PX, _PX)
  assert masks.dtype == np.uint8
  assert masks.max() < num_ids
  if 'annotated' in words:
    np.testing.assert_array_equal(masks, _canvases().part_ids)


def test_parts_are_compared_with_keypoints(build, workdir, tmp_path):
  table = tmp_path / 'parts.csv'
  rows = [
    f'{i}.png,{kind},{8 + 16 * kind},5,1'
    for i in range(_COUNT)
    for kind in (0, 1)
  ]
  table.write_text('\n'.join(['file,part_id,x,y,visible', *rows]))
  built = build('method=detcon', keypoints=str(table))
  part_rounds.find_part_masks(built, built.init_state(), workdir, 'round_1')
  scores = json.loads((workdir.parts / 'round_1.json').read_text())
  # Two kinds in two cells of the grid, of which one has the id 0.
  assert scores['parts/hit/coverage'] == 1
  assert scores['parts/hit/purity'] == 1
  assert scores['parts/hit/completeness'] == 1
  with pytest.raises(errors.UserError, match='missing.csv'):
    built = build('method=detcon', keypoints=str(tmp_path / 'missing.csv'))
    part_rounds.find_part_masks(built, built.init_state(), workdir, 'round_2')


def test_discovering_alone_takes_the_newest_encoder(build, workdir):
  built = build()
  folder = part_rounds.discover_parts(built, workdir)
  assert folder.name == 'discovered_0'
  manifest = json.loads((folder / 'manifest.json').read_text())
  state = built.init_state()
  assert manifest['encoder_sha256'] == part_rounds.hash_of_encoder(built, state)
  assert manifest['num_images'] == _COUNT
  # As it is done already, nothing is done.
  assert part_rounds.discover_parts(built, workdir) == folder


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(source='magic'), 'hypercolumn, cosegmentation, grid'),
    (dict(rounds=0), 'rounds is 0'),
    (dict(settings=dict(num_parts=0)), 'num_parts is 0'),
    (dict(settings=dict(num_parts=2)), 'num_samples is 6'),
    (dict(source='hypercolumn'), 'encoder=resnet or efficientnet'),
    (dict(source='grid'), 'parts=grid'),
    (dict(view_px=33), 'parts.view_px is 33'),
  ],
)
def test_impossible_parts_are_explained(build, changes, words):
  with pytest.raises(errors.UserError, match=words):
    build(**changes)
