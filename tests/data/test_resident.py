import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.data import canvas
from cmd_jax.data.pipeline import order, resident
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError

NUM_EXAMPLES, BATCH = 27, 8


def _canvases(num_examples=NUM_EXAMPLES):
  rng = np.random.default_rng(0)
  return canvas.Canvases(
    name='birds/train',
    images=rng.integers(0, 256, (num_examples, 4, 4, 3), np.uint8),
    sizes=rng.integers(4, 99, (num_examples, 2), np.int32),
    labels=np.zeros(num_examples, np.int32),
    file_names=tuple(f'{i}.png' for i in range(num_examples)),
    class_names=('bird',),
    part_ids=None,
    boxes=None,
    skipped=(),
  )


@pytest.mark.parametrize('num_devices', [1, 8])
def test_batches_are_the_canvases_that_the_order_names(num_devices):
  canvases = _canvases()
  part_ids = np.arange(NUM_EXAMPLES * 16, dtype=np.uint8).reshape(-1, 4, 4)
  mesh = sharding.make_mesh(num_devices)
  with resident.resident_batches(
    canvases, batch_size=BATCH, seed=5, mesh=mesh, part_ids=part_ids
  ) as batches:
    for step in (0, 1, 7):
      batch = batches(step)
      index = order.batch_indices(
        5, step, num_examples=NUM_EXAMPLES, batch_size=BATCH
      )
      np.testing.assert_array_equal(batch.index, index)
      np.testing.assert_array_equal(batch.images, canvases.images[index])
      np.testing.assert_array_equal(batch.sizes, canvases.sizes[index])
      np.testing.assert_array_equal(batch.part_ids, part_ids[index])
      like = resident.batch_like(
        canvases.images.shape[1], batch_size=BATCH, mesh=mesh, with_parts=True
      )
      assert batch.images.dtype == jnp.uint8
      for leaf, expected in zip(jax.tree.leaves(batch), jax.tree.leaves(like)):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
        assert leaf.sharding == expected.sharding
        assert len(leaf.addressable_shards) == num_devices


def test_a_set_smaller_than_a_batch_is_refused():
  with pytest.raises(UserError, match=r'birds/train has 7 .* 8: .* most 7$'):
    with resident.resident_batches(
      _canvases(7), batch_size=8, seed=0, mesh=sharding.make_mesh(1)
    ):
      pass


def test_several_batches_are_drawn_at_once():
  canvases, mesh = _canvases(), sharding.make_mesh(4)
  options = dict(batch_size=BATCH, mesh=mesh, steps_per_dispatch=3)
  with resident.resident_batches(canvases, seed=5, **options) as batches:
    # Past the end of the epoch: three batches make one of 27.
    drawn, short = batches(2, 3), batches(5, 1)
  expected = [
    order.batch_indices(5, step, num_examples=NUM_EXAMPLES, batch_size=BATCH)
    for step in (2, 3, 4)
  ]
  np.testing.assert_array_equal(drawn.batch.index, expected)
  np.testing.assert_array_equal(drawn.batch.images, canvases.images[expected])
  assert (drawn.count, short.count) == (3, 1)
  like = resident.batch_like(canvases.images.shape[1], **options)
  for batch in (drawn.batch, short.batch):
    for leaf, want in zip(jax.tree.leaves(batch), jax.tree.leaves(like.batch)):
      assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype)
      assert leaf.sharding == want.sharding


@pytest.mark.parametrize('several', [1, 2])
def test_a_neighbour_goes_with_each_image(several):
  canvases, mesh = _canvases(), sharding.make_mesh(2)
  own = np.arange(NUM_EXAMPLES)[:, None]
  neighbours = ((own + [1, 2, 3]) % NUM_EXAMPLES).astype(np.int32)
  options = dict(batch_size=BATCH, mesh=mesh, steps_per_dispatch=several)
  found = set()
  with resident.resident_batches(
    canvases, seed=5, neighbours=neighbours, **options
  ) as batches:
    for step in range(9):
      batch = batches(step) if several == 1 else batches(step, 1).batch
      if several > 1:
        batch = jax.tree.map(lambda x: x[0], batch)
      partners = order.choose_partners(5, step, batch.index, neighbours)
      np.testing.assert_array_equal(batch.partners, canvases.images[partners])
      sizes = canvases.sizes[partners]
      np.testing.assert_array_equal(batch.partner_sizes, sizes)
      steps_apart = (partners - np.asarray(batch.index)) % NUM_EXAMPLES
      found |= set(steps_apart.tolist())
  assert found == {1, 2, 3}
  like = resident.batch_like(4, with_partners=True, **options)
  like = like if several == 1 else like.batch
  assert like.partners.shape == like.images.shape
  assert like.partner_sizes.dtype == jnp.int32


def test_which_neighbour_it_is_depends_on_seed_and_step():
  index = np.arange(BATCH)
  neighbours = np.tile(np.arange(1000, dtype=np.int32), (BATCH, 1))

  def chosen(seed, step):
    return order.choose_partners(seed, step, index, neighbours).tolist()

  assert chosen(-1, 3) == chosen(-1, 3)
  assert chosen(0, 3) != chosen(1, 3) and chosen(0, 3) != chosen(0, 4)
  assert len(set(chosen(0, 3))) > BATCH // 2
