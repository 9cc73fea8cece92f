import functools

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from cmd_jax.losses import detcon


def _draw(seed=0, batch=3, samples=4, parts=6, dim=5):
  rng = np.random.default_rng(seed)
  predictions, targets = rng.normal(size=(2, batch, 2, samples, dim))
  ids = rng.integers(0, parts, (2, batch, 2, samples))
  return tuple(
    x.astype(np.float32 if x.dtype == float else np.int32)
    for x in (predictions, targets, *ids)
  )


# One program for all arrays of a shape.
@functools.partial(jax.jit, static_argnames=('axis_name', 'local_negatives'))
def _contrast(
  predictions, targets, prediction_ids, target_ids, *, axis_name=None, **options
):
  return detcon.part_contrast(
    predictions,
    targets,
    prediction_ids,
    target_ids,
    temperature=0.2,
    axis_name=axis_name,
    **options,
  )


def _naive(predictions, targets, prediction_ids, target_ids, local_negatives):
  """One sample after the other, as the docstring has it."""
  q, z, own, other = (
    np.array(x) for x in (predictions, targets, prediction_ids, target_ids)
  )
  q /= np.linalg.norm(q, axis=-1, keepdims=True)
  z /= np.linalg.norm(z, axis=-1, keepdims=True)
  batch, _, samples, _ = q.shape
  result = np.zeros(batch)
  for b, a, s in np.ndindex(batch, 2, samples):
    positives, everything = [], []
    for g, v, t in np.ndindex(batch, 2, samples):
      logit = q[b, a, s] @ z[g, v, t] / 0.2
      same = own[b, a, s] == other[g, v, t]
      if g == b and v == a and (same or not local_negatives):
        continue
      if g == b and v != a and not same and not local_negatives:
        continue
      everything.append(logit)
      if g == b and v != a and same:
        positives.append(logit)
    if positives:
      cost = np.log(np.sum(np.exp(everything))) - np.mean(positives)
      result[b] += cost / np.sum(own[b, a] == own[b, a, s]) / samples
  return result


@pytest.mark.parametrize('local_negatives', [True, False])
def test_every_sample_finds_its_part_among_all_others(local_negatives):
  arrays = _draw()
  np.testing.assert_allclose(
    _contrast(*arrays, local_negatives=local_negatives),
    _naive(*arrays, local_negatives),
    rtol=1e-5,
  )


def test_gradient_is_that_of_the_predictions_alone():
  predictions, *rest = _draw(1, batch=2, samples=3, parts=3)
  check_grads(
    jax.jit(lambda x: _contrast(x, *rest).sum()),
    (predictions,),
    order=1,
    modes=['rev'],
    atol=1e-2,
    rtol=1e-2,
  )
  targets, *ids = rest
  gradient = jax.jit(jax.grad(lambda x: _contrast(predictions, x, *ids).sum()))(
    targets
  )
  np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@functools.partial(jax.jit, static_argnames='axis_name')
def _mean_and_gradient(arrays, axis_name=None):
  predictions, *rest = arrays

  def loss(predictions):
    values = _contrast(predictions, *rest, axis_name=axis_name)
    return values.mean(), values

  (_, values), gradient = jax.value_and_grad(loss, has_aux=True)(predictions)
  return values, gradient


def test_four_devices_contrast_with_the_parts_of_all():
  arrays = _draw(2, batch=8)
  values, gradient = jax.device_get(_mean_and_gradient(arrays))
  spread = jax.pmap(
    functools.partial(_mean_and_gradient, axis_name='data'), axis_name='data'
  )(tuple(x.reshape(4, 2, *x.shape[1:]) for x in arrays))
  # A device's mean is over a quarter of the batch.
  spread = jax.device_get(spread)
  for ours, whole, scale in zip(spread, (values, gradient), (1, 4)):
    np.testing.assert_allclose(
      ours.reshape(whole.shape), scale * whole, rtol=1e-5, atol=1e-6
    )
  alone = _contrast(*(x[:2] for x in arrays))
  assert np.all(np.abs(np.asarray(alone) - values[:2]) > 0.1)


def test_permuting_the_batch_permutes_the_values():
  arrays, order = _draw(3), np.array([2, 0, 1])
  np.testing.assert_allclose(
    _contrast(*(x[order] for x in arrays)),
    np.asarray(_contrast(*arrays))[order],
    rtol=1e-5,
  )


def test_an_image_without_positives_costs_nothing():
  predictions, targets, ids, _ = _draw(4)
  values, gradient = _mean_and_gradient((predictions, targets, ids, ids + 100))
  np.testing.assert_array_equal(values, np.zeros(3))
  np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize('local_negatives', [True, False])
def test_one_image_of_one_part_is_finite(local_negatives):
  predictions, targets, _, _ = _draw(5, batch=1)
  ids = np.zeros((1, 2, 4), np.int32)
  values = _contrast(
    predictions, targets, ids, ids, local_negatives=local_negatives
  )
  # Nothing is left to tell the part from but the other samples of it.
  assert 0 < values[0] < np.log(4) + 4 / 0.2


def test_zero_vectors_are_finite_and_have_no_gradient():
  predictions, targets, ids, _ = _draw(6)
  predictions[0, 0, 0] = 0
  targets[1, 1] = 0
  values, gradient = _mean_and_gradient((predictions, targets, ids, ids))
  assert np.all(np.isfinite(values))
  assert np.all(np.isfinite(gradient))
  np.testing.assert_array_equal(np.asarray(gradient)[0, 0, 0], np.zeros(5))
  assert np.any(np.asarray(gradient)[0, 0, 1] != 0)


def test_share_of_samples_with_a_positive():
  ours = np.array([[[0, 1, 2, 3], [4, 5, 6, 7]]])
  theirs = np.array([[[7, 7, 9, 6], [1, 9, 9, 9]]])
  # 1 of the first view is in the second; 6 and 7 of the second in the first.
  np.testing.assert_allclose(
    jax.jit(detcon.fraction_with_positives)(ours, theirs), [3 / 8], rtol=1e-6
  )
