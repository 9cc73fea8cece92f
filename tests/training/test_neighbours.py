"""Runs whose second views are of neighbours."""

import numpy as np
import pytest

from cmd_jax.config.check import check_config
from cmd_jax.errors import UserError
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training import loop, neighbours
from tests.reliability import small_run


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  path = tmp_path_factory.mktemp('photos')
  small_run.write_photos(path)
  return path


def _open(path, config=()):
  workdir = Workdir(str(path))
  workdir.open(dict(config))
  return workdir


def _experiment(photos, count, **fields):
  """One without weights, which the search does not ask for."""
  built = small_run.build(small_run.make_config(photos, **fields))
  return built._replace(num_neighbours=count)


def test_neighbours_are_the_nearest_others_and_go_with_the_batches(
  photos, tmp_path, capsys
):
  experiment = _experiment(photos, 3, eval__search__view_px=48)
  workdir = _open(tmp_path)
  found = neighbours.with_neighbours(experiment, workdir)
  assert 'one of 3 by the initial encoder' in capsys.readouterr().err
  network = neighbours.network_of(experiment, experiment.init_state(), workdir)
  vectors = network.embeddings(experiment.data.pretrain, view_px=48).vectors
  # Twenty are too few for more than their mean to be taken off.
  vectors = vectors - vectors.mean(0)
  vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  likeness = vectors @ vectors.T
  np.fill_diagonal(likeness, -2)
  images = experiment.data.pretrain.images
  with found.data.make_batches(None) as batches:
    batch = batches(0)
  for index, partner in zip(batch.index, np.asarray(batch.partners)):
    [row] = np.flatnonzero((images == partner).all((1, 2, 3)))
    # As like as the third, or more; no less but for rounding.
    assert likeness[index, row] > np.sort(likeness[index])[-3] - 1e-6


def test_what_was_found_is_read_and_what_is_damaged_is_found_again(
  photos, tmp_path, monkeypatch, capsys
):
  experiment, workdir = _experiment(photos, 2), _open(tmp_path)
  neighbours.with_neighbours(experiment, workdir)
  whole = workdir.neighbour_rows.read_bytes()
  searches = []
  find = neighbours.find_nearest
  monkeypatch.setattr(
    neighbours,
    'find_nearest',
    lambda *args, **kw: searches.append(1) or find(*args, **kw),
  )
  neighbours.with_neighbours(experiment, workdir)
  assert not searches
  workdir.neighbour_rows.write_bytes(whole[:99])
  neighbours.with_neighbours(experiment, workdir)
  assert len(searches) == 1
  assert 'finding the neighbours again' in capsys.readouterr().err
  # Of another number, and hence another thing.
  neighbours.with_neighbours(experiment._replace(num_neighbours=3), workdir)
  assert len(searches) == 2


def test_more_neighbours_than_images_are_refused(photos, tmp_path):
  experiment = _experiment(photos, small_run.NUM_IMAGES)
  with pytest.raises(UserError, match='20 training images: .* at most 19'):
    neighbours.with_neighbours(experiment, _open(tmp_path))


@pytest.mark.parametrize(
  'change, match',
  [
    ({}, 'drawn at random knows no neighbours'),
    (
      {'init__path': 'x.pth', 'method__name': 'distil'},
      'method=distil looks at each image for itself',
    ),
  ],
)
def test_configs_to_which_neighbours_say_nothing(photos, change, match):
  config = small_run.make_config(photos, num_neighbours=2, **change)
  with pytest.raises(UserError, match=match):
    check_config(config)


def test_a_run_that_goes_on_sees_the_same_neighbours(
  photos, tmp_path, monkeypatch
):
  small_run.leave_out_scores(monkeypatch)
  config = small_run.make_config(photos)
  before = _open(tmp_path / 'before', config.to_dict())
  loop.train(small_run.build(config), before)
  config = small_run.make_config(
    photos, num_neighbours=2, init__path=str(before.checkpoints)
  )
  experiment = small_run.build(config)
  whole, parted = (_open(tmp_path / name) for name in ('whole', 'parted'))
  loop.train(experiment, whole)

  class Stopped(Exception):
    pass

  take = loop._Loop._next_batches

  def stop_at_three(self, batches, end):
    if self._step == 3:
      raise Stopped
    return take(self, batches, end)

  with monkeypatch.context() as patch:
    patch.setattr(loop._Loop, '_next_batches', stop_at_three)
    with pytest.raises(Stopped):
      loop.train(experiment, parted)
  loop.train(experiment, parted)
  last = small_run.STEPS_PER_EPOCH * config.total_epochs
  for ours, theirs in zip(
    small_run.read_state(parted, last), small_run.read_state(whole, last)
  ):
    np.testing.assert_array_equal(ours, theirs)
  # And other ones than a run without.
  alone = _open(tmp_path / 'alone')
  config = small_run.make_config(photos, init__path=str(before.checkpoints))
  loop.train(small_run.build(config), alone)
  losses = [
    [x['loss'] for x in small_run.read_metrics(workdir)]
    for workdir in (whole, alone)
  ]
  assert losses[0] != losses[1]
