import functools
import os
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import xla_bridge
from PIL import Image

from cmd_jax.data import canvas
from cmd_jax.data.pipeline import lazy, order, resident, stream, worker
from cmd_jax.data.sources import base
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError

COUNT, BATCH, SEED = 21, 8, 3
PX = 16


def _load(folder, index):
  """An image that tells where it was decoded; files in `folder` say more."""
  broken, deadly = folder / f'broken_{index}', folder / f'deadly_{index}'
  if broken.exists():
    raise OSError('damaged')
  if deadly.exists():
    deadly.unlink()
    os.kill(os.getpid(), signal.SIGKILL)
  rng = np.random.default_rng(index)
  pixels = rng.integers(0, 256, (9, 9 + index, 3), np.uint8)
  is_worker = os.environ.get('DECODES_IN') != str(os.getpid())
  if is_worker and xla_bridge.backends_are_initialized():
    raise UserError('a worker holds a device')
  return base.Example(Image.fromarray(pixels))


@pytest.fixture
def birds(tmp_path, monkeypatch):
  """A source that worker processes can read as well."""
  monkeypatch.setenv('DECODES_IN', str(os.getpid()))
  return base.Source(
    name='birds/train',
    class_names=('wren',),
    file_names=tuple(f'{i}.png' for i in range(COUNT)),
    labels=np.zeros(COUNT, np.int32),
    load=functools.partial(_load, tmp_path),
  )


def _stream(birds, mesh, **options):
  return stream.streamed_batches(
    lazy.lazy_canvases(birds, canvas_px=PX),
    birds,
    batch_size=BATCH,
    seed=SEED,
    mesh=mesh,
    **options,
  )


def _resident(birds, mesh, **options):
  return resident.resident_batches(
    canvas.make_canvases(birds, canvas_px=PX),
    batch_size=BATCH,
    seed=SEED,
    mesh=mesh,
    **options,
  )


def _assert_same(tree, other):
  leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
  assert len(leaves) == len(others) > 0
  for leaf, expected in zip(leaves, others):
    assert leaf.sharding == expected.sharding
    np.testing.assert_array_equal(leaf, expected)


@pytest.mark.parametrize('num_devices', [1, 8])
def test_both_routes_give_the_same_batches_in_any_order(birds, num_devices):
  mesh = sharding.make_mesh(num_devices)
  part_ids = np.arange(COUNT * PX**2, dtype=np.uint8).reshape(-1, PX, PX)
  own = np.arange(COUNT, dtype=np.int32)[:, None]
  options = dict(part_ids=part_ids, neighbours=(own + [1, 2]) % COUNT)
  with (
    _resident(birds, mesh, **options) as held,
    _stream(birds, mesh, **options) as streamed,
  ):
    for step in (0, 1, 2, 40, 41, 3):
      _assert_same(streamed(step), held(step))


def _make_step(axis_name, mesh):
  del mesh
  """A step whose state tells which batches it saw, and in which order."""

  def step(state, batch, rng):
    del rng
    pixels = batch.images.astype(jnp.float32).mean((1, 2, 3))
    seen = sharding.psum((pixels * (1 + batch.index)).sum(), axis_name)
    return 0.7 * state + seen, {'seen': seen}

  return step


@pytest.mark.parametrize('mode', sharding.MODES)
def test_steps_end_alike_by_either_route_after_a_resume(birds, mode):
  mesh = sharding.make_mesh(8)
  rng = jax.random.key(1)
  step = sharding.compile_step(_make_step, mode=mode, mesh=mesh)

  def start():
    return jax.device_put(jnp.float32(1), sharding.replicated(mesh))

  state, streamed = start(), start()
  with _resident(birds, mesh) as batches:
    for number in range(4):
      state, _ = step(state, batches(number), rng)
  # Stopped after two steps and resumed, with processes that decode.
  for numbers, num_workers in (((0, 1), 0), ((2, 3), 2)):
    with _stream(birds, mesh, num_workers=num_workers) as batches:
      for number in numbers:
        streamed, _ = step(streamed, batches(number), rng)
  assert float(streamed) == float(state)


def test_a_dead_worker_and_a_damaged_image_do_not_end_the_run(birds, tmp_path):
  mesh = sharding.make_mesh(1)
  first = order.batch_indices(SEED, 0, num_examples=COUNT, batch_size=BATCH)
  with _stream(birds, mesh) as batches:
    whole = batches(0)
  broken, deadly = int(first[2]), int(first[4])
  (tmp_path / f'broken_{broken}').touch()
  (tmp_path / f'deadly_{deadly}').touch()
  canvases = lazy.lazy_canvases(birds, canvas_px=PX)
  with stream.streamed_batches(
    canvases, birds, batch_size=BATCH, seed=SEED, mesh=mesh, num_workers=1
  ) as batches:
    batch = batches(0)
  assert not (tmp_path / f'deadly_{deadly}').exists()
  # The next example stands in, with its own number.
  expected = np.array(whole.index)
  expected[2] = (broken + 1) % COUNT
  np.testing.assert_array_equal(batch.index, expected)
  same = np.arange(BATCH) != 2
  images, others = np.asarray(batch.images), np.asarray(whole.images)
  np.testing.assert_array_equal(images[same], others[same])
  assert list(canvases.skipped) == [canvas.Skipped(f'{broken}.png', 'damaged')]
  assert canvases.labels[broken] == base.UNLABELLED


def test_decoding_that_never_starts_is_told():
  started = []

  class _Dead:
    def __next__(self):
      raise RuntimeError('exit code -9')

    def close(self):
      pass

  def start(step):
    started.append(step)
    return _Dead()

  feed = stream._Feed(start, lambda batch: batch, ahead=1)
  with pytest.raises(UserError, match='step 4 .*exit code -9.*num_workers'):
    feed(4)
  assert started == [4, 4, 4]
  feed.close()


def test_a_process_decodes_its_own_share(birds):
  """Two hosts with two devices each, whose shares are not in order."""
  shares = [
    {0: (slice(4, 6),), 1: (slice(0, 2),)},
    {2: (slice(2, 4),), 3: (slice(6, None),)},
  ]
  wanted = order.batch_indices(SEED, 1, num_examples=COUNT, batch_size=BATCH)
  places = []
  for own in shares:
    sharding = types.SimpleNamespace(
      addressable_devices_indices_map=lambda shape, own=own: own
    )
    places.append(stream.places_of_process(sharding, BATCH))
  assert [p.tolist() for p in places] == [[0, 1, 4, 5], [2, 3, 6, 7]]
  for own in places:
    examples = worker.RunExamples(
      birds, canvas_px=PX, seed=SEED, batch_size=BATCH, places=own
    )
    found = [int(examples[len(own) + k]['index']) for k in range(len(own))]
    assert found == wanted[own].tolist()
