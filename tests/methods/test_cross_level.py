"""CMD's terms by tiles of prototypes against its equations, all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from cmd_jax.losses import blockwise
from cmd_jax.methods import distillation, features, networks
from cmd_jax.models.heads import PrototypeWeights
from tests import tiny

_B, _T, _D, _K, _TAU, _TEACHER_TAU = 2, 2, 6, 12, 0.1, 0.04
# (views, tokens) of each size.
_SIZES = ((2, 4), (3, 3))


def _output():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  def unit(*shape):
    x = normal(*shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  def prototypes():
    return networks.Prototypes(
      PrototypeWeights(normal(_D, _K), 1 + 0.1 * normal(1, _K)),
      PrototypeWeights(normal(_D, _K), None),
    )

  views, tokens = _SIZES[0]
  return distillation.ForwardOutput(
    features.StudentFeatures(
      tuple(unit(_B, v, _D) for v, _ in _SIZES),
      tuple(unit(_B, v, n, _D) for v, n in _SIZES),
      tuple(special.softmax(normal(_B, v, n), -1) for v, n in _SIZES),
      special.softmax(normal(_B, _T, tokens), -1),
    ),
    features.TeacherFeatures(
      unit(_B, _T, _D),
      unit(_B, _T, _D),
      unit(_B, _T, tokens, _D),
      tuple(
        rng.integers(0, tokens, (_B, _T, v, n), np.int32) for v, n in _SIZES
      ),
    ),
    prototypes(),
    features.TeacherContext(
      prototypes(),
      {'image': 0.1 * normal(_K), 'region': 0.1 * normal(_K)},
      np.float32(_TEACHER_TAU),
    ),
    {},
  )


def _pool(pooling, probs, attention):
  if pooling == 'max':
    peak = probs.max(-2)
    return peak / peak.sum(-1, keepdims=True)
  if pooling == 'mean':
    return probs.mean(-2)
  return (attention[..., None] * probs).sum(-2)


def _kl(direction, image, bag):
  p, q = (image, bag) if direction == 'image_to_bag' else (bag, image)
  return (p * jnp.log(p / q)).sum(-1).mean(1)


def _plain(pooling, direction, output):
  """The terms' values, [B] each, from all probabilities."""
  student, teacher, prototypes, context, _ = output

  def softmax(rows, weights, centre=0.0, temperature=_TAU):
    return jax.nn.softmax((rows @ weights.kernel() - centre) / temperature)

  of_image, of_region = (
    jax.lax.stop_gradient(
      softmax(
        rows, getattr(context.prototypes, x), context.centres[x], _TEACHER_TAU
      )
    )
    for x, rows in (
      ('image', teacher.image_bottleneck),
      ('region', teacher.region_bottleneck),
    )
  )
  images = softmax(
    jnp.concatenate(student.image_bottlenecks, 1), prototypes.image
  )
  regions = [softmax(x, prototypes.region) for x in student.region_bottlenecks]
  image, region = [], []
  for u in range(_T):
    for v in range(images.shape[1]):
      if u != v:
        image.append(-(of_image[:, u] * jnp.log(images[:, v])).sum(-1))
    for size, (probs, matches, attention) in enumerate(
      zip(regions, teacher.matches, student.attention)
    ):
      for v in range(probs.shape[1]):
        if size or u != v:
          targets = jnp.take_along_axis(
            of_region[:, u], matches[:, u, v, :, None], axis=1
          )
          entropies = -(targets * jnp.log(probs[:, v])).sum(-1)
          weights = attention[:, v] if 'att' in pooling else 1 / probs.shape[2]
          region.append((weights * entropies).sum(-1))
  bags = jnp.concatenate(
    [_pool(pooling, *x) for x in zip(regions, student.attention)], 1
  )
  return {
    'image': sum(image) / len(image),
    'region': sum(region) / len(region),
    'student_bag': _kl(direction, jax.lax.stop_gradient(images), bags),
    'teacher_bag': _kl(
      direction,
      of_image,
      _pool(pooling, of_region, student.teacher_attention),
    ),
  }


@pytest.mark.parametrize(
  'pooling, direction',
  [
    ('gated_attention', 'image_to_bag'),
    ('attention', 'bag_to_image'),
    ('mean', 'image_to_bag'),
    ('max', 'image_to_bag'),
    ('max', 'bag_to_image'),
  ],
)
def test_terms_and_gradients_are_those_of_the_equations(pooling, direction):
  method = tiny.inside(
    tiny.make_tiny_method(
      'cmd',
      pooling=pooling,
      kl_direction=direction,
      attend_regions='att' in pooling,
      weights=dict(image=1.0, region=0.5, student_bag=0.7, teacher_bag=0.3),
      num_prototypes=_K,
    )
  )

  def ours(prototypes, student, output):
    output = output._replace(prototypes=prototypes, student=student)
    # Blocks of one example, and of less than all prototypes.
    loss, (terms, _) = method.mean_loss(output, 0, blockwise.Budget(400, 0))
    return loss, terms

  def plain(prototypes, student, output):
    output = output._replace(prototypes=prototypes, student=student)
    terms = _plain(pooling, direction, output)
    weights = method.weights(0)
    return sum(weights[k] * x.mean() for k, x in terms.items()), terms

  output = _output()
  (a, b) = (
    jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))(
      output.prototypes, output.student, output
    )
    for fn in (ours, plain)
  )
  assert set(a[0][1]) == set(b[0][1])
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=5e-6 * np.abs(y).max())
