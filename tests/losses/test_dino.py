import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import special

from cmd_jax.devices import sharding
from cmd_jax.losses import dino


def _distributions(rng, *shape):
  values = special.softmax(rng.normal(size=shape, scale=2), -1)
  return values.astype(np.float32)


def _naive(teacher, student_log):
  batch, num_teacher, _ = teacher.shape
  result = np.zeros(batch)
  for b in range(batch):
    pairs = [
      -np.sum(teacher[b, u] * student_log[b, v])
      for u in range(num_teacher)
      for v in range(student_log.shape[1])
      if u != v
    ]
    result[b] = np.mean(pairs)
  return result


_entropy = jax.jit(dino.entropy)


@jax.jit
def _image_loss(teacher_probs, student_log_probs):
  """Of logarithms of probabilities, whose normalisers are 0."""
  normalisers = jnp.zeros(student_log_probs.shape[:-1])
  return dino.image_loss(teacher_probs, student_log_probs, normalisers)


@pytest.mark.parametrize('num_student', [2, 5])
def test_image_loss_is_the_mean_over_pairs_of_different_views(num_student):
  rng = np.random.default_rng(0)
  teacher = _distributions(rng, 3, 2, 7)
  student = np.log(_distributions(rng, 3, num_student, 7))
  np.testing.assert_allclose(
    _image_loss(teacher, student), _naive(teacher, student), rtol=1e-5
  )


def test_image_loss_gradient():
  rng = np.random.default_rng(1)
  teacher = _distributions(rng, 2, 2, 5)
  logits = np.float32(rng.normal(size=(2, 4, 5)))
  check_grads(
    jax.jit(lambda x: _image_loss(teacher, jax.nn.log_softmax(x)).sum()),
    (logits,),
    order=1,
    modes=['rev'],
    atol=1e-2,
    rtol=1e-2,
  )


def test_image_loss_is_least_where_the_student_agrees():
  rng = np.random.default_rng(2)
  same = np.repeat(_distributions(rng, 2, 1, 6), 4, axis=1)
  entropy = np.mean(_entropy(same), 1)
  np.testing.assert_allclose(
    _image_loss(same[:, :2], np.log(same)), entropy, rtol=1e-5
  )
  other = np.log(_distributions(rng, 2, 4, 6))
  assert np.all(np.asarray(_image_loss(same[:, :2], other)) > entropy)


def test_centre_is_the_moving_average_of_the_global_mean():
  rng = np.random.default_rng(4)
  centre, logits = rng.normal(size=3), rng.normal(size=(8, 2, 3))
  expected = 0.9 * centre + 0.1 * logits.reshape(-1, 3).mean(0)
  ours = jax.jit(
    lambda *arrays: dino.update_centre(*arrays, momentum=0.9, axis_name=None)
  )(centre, logits)
  np.testing.assert_allclose(ours, expected, rtol=1e-5)
  spread = jax.pmap(
    lambda x: dino.update_centre(centre, x, momentum=0.9, axis_name='data'),
    axis_name='data',
  )(logits.reshape(4, 2, 2, 3))
  np.testing.assert_allclose(spread, np.tile(expected, (4, 1)), rtol=1e-5)


@functools.partial(jax.jit, static_argnames='num_iterations')
def _sinkhorn_probs(features, prototypes, temperature, **options):
  centre = dino.sinkhorn_centre(features, prototypes, temperature, **options)
  return jax.nn.softmax((features @ prototypes - centre) / temperature)


def test_sinkhorn_uses_all_prototypes_equally():
  rng = np.random.default_rng(5)
  # Without it nearly everything falls on prototype 0.
  features = rng.normal(size=(64, 4)).astype(np.float32)
  features[:, 0] = 1.0
  prototypes = rng.normal(size=(4, 8)).astype(np.float32)
  prototypes[0] = [3.0] + [0.0] * 7
  probs = np.asarray(
    _sinkhorn_probs(features, prototypes, 1.0, num_iterations=50)
  )
  np.testing.assert_allclose(probs.sum(1), np.ones(64), rtol=1e-5)
  np.testing.assert_allclose(probs.sum(0), np.full(8, 8.0), rtol=1e-3)


def test_sinkhorn_scales_columns_and_rows_in_turn():
  rng = np.random.default_rng(7)
  features, prototypes = rng.normal(size=(6, 2, 3)), rng.normal(size=(3, 5))
  rows = np.exp(features.reshape(12, 3) @ prototypes / 0.5)
  rows /= rows.max(1, keepdims=True)
  for _ in range(3):
    rows /= rows.sum(0)
    rows /= rows.sum(1, keepdims=True)
  ours = _sinkhorn_probs(features, prototypes, 0.5)
  np.testing.assert_allclose(np.reshape(ours, (12, 5)), rows, rtol=1e-4)


def test_sinkhorn_in_blocks_is_that_of_the_batch(monkeypatch):
  rng = np.random.default_rng(8)
  features, prototypes = (
    rng.normal(size=shape).astype(np.float32) for shape in ((6, 2, 3), (3, 5))
  )

  def compute():
    # As they are traced, they see how much they may take.
    return jax.jit(lambda *arrays: dino.sinkhorn_centre(*arrays, 0.1))(
      features, prototypes
    )

  whole = compute()
  monkeypatch.setattr(dino, 'LOGIT_BYTES', 1)
  blocks = compute()
  np.testing.assert_allclose(blocks, whole, rtol=1e-5, atol=1e-6)


def test_sinkhorn_over_devices_equals_the_whole_batch():
  rng = np.random.default_rng(6)
  features, prototypes = (
    rng.normal(size=shape).astype(np.float32) for shape in ((16, 3), (3, 5))
  )
  whole = jax.jit(lambda x: dino.sinkhorn_centre(x, prototypes, 0.1))(features)
  by_pmap = jax.pmap(
    lambda x: dino.sinkhorn_centre(x, prototypes, 0.1, axis_name='data'),
    axis_name='data',
  )(features.reshape(4, 4, 3))
  mesh = sharding.make_mesh(4)
  by_jit = jax.jit(
    lambda x: dino.sinkhorn_centre(x, prototypes, 0.1, mesh=mesh)
  )(jax.device_put(features, sharding.sharded(mesh)))
  for centre in (by_jit, *np.asarray(by_pmap)):
    np.testing.assert_allclose(centre, whole, rtol=1e-4, atol=1e-5)


def test_entropy_bounds():
  np.testing.assert_allclose(
    _entropy(np.float32([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])),
    [0.0, np.log(3)],
    rtol=1e-6,
  )
