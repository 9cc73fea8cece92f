import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads
from scipy import special

from cmd_jax.losses import esvit


def _inputs(rng, batch=2, teacher=2, tokens=(4, 3), views=(2, 3), dim=5, k=6):
  def softmax(shape):
    return special.softmax(rng.normal(size=shape) * 2, -1).astype(np.float32)

  weights = tuple(softmax((batch, v, n)) for v, n in zip(views, tokens))
  return dict(
    teacher_probs=softmax((batch, teacher, tokens[0], k)),
    teacher_features=rng.normal(size=(batch, teacher, tokens[0], dim)),
    student_log_probs=tuple(
      np.log(softmax((batch, v, n, k))) for v, n in zip(views, tokens)
    ),
    student_features=tuple(
      rng.normal(size=(batch, v, n, dim)) for v, n in zip(views, tokens)
    ),
    student_weights=weights,
  )


@jax.jit
def _region_loss(
  teacher_probs,
  teacher_features,
  student_log_probs,
  student_features,
  student_weights,
):
  matches = tuple(
    esvit.match_tokens(x, teacher_features) for x in student_features
  )
  normalisers = tuple(jnp.zeros(x.shape[:-1]) for x in student_log_probs)
  return esvit.region_loss(
    teacher_probs, student_log_probs, normalisers, matches, student_weights
  )


def _naive(
  teacher_probs,
  teacher_features,
  student_log_probs,
  student_features,
  student_weights,
):
  def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

  batch, num_teacher, num_tokens, _ = teacher_probs.shape
  result = np.zeros(batch)
  for b in range(batch):
    pairs = []
    for u in range(num_teacher):
      first_view = 0
      for logs, features, weights in zip(
        student_log_probs, student_features, student_weights
      ):
        for v in range(logs.shape[1]):
          if first_view + v == u:
            continue
          total = 0.0
          for i in range(logs.shape[2]):
            j = np.argmax(
              [
                cosine(features[b, v, i], teacher_features[b, u, m])
                for m in range(num_tokens)
              ]
            )
            cross_entropy = -np.sum(teacher_probs[b, u, j] * logs[b, v, i])
            total += weights[b, v, i] * cross_entropy
          pairs.append(total)
        first_view += logs.shape[1]
    result[b] = np.mean(pairs)
  return result


def test_region_loss_equals_the_loop():
  inputs = _inputs(np.random.default_rng(0))
  np.testing.assert_allclose(
    _region_loss(**inputs), _naive(**inputs), rtol=1e-5
  )


def test_region_loss_without_local_views():
  inputs = _inputs(np.random.default_rng(1))
  inputs = {
    key: value[:1] if isinstance(value, tuple) else value
    for key, value in inputs.items()
  }
  np.testing.assert_allclose(
    _region_loss(**inputs), _naive(**inputs), rtol=1e-5
  )


def test_region_loss_gradients():
  inputs = _inputs(np.random.default_rng(2))

  def loss(logits, weights):
    return _region_loss(
      **inputs
      | dict(
        student_log_probs=jax.tree.map(jax.nn.log_softmax, logits),
        student_weights=weights,
      )
    ).sum()

  check_grads(
    jax.jit(loss),
    (inputs['student_log_probs'], inputs['student_weights']),
    order=1,
    modes=['rev'],
    atol=1e-2,
    rtol=1e-2,
  )


def test_features_get_no_gradient():
  inputs = _inputs(np.random.default_rng(3))

  def loss(features):
    return _region_loss(**inputs | dict(student_features=features)).sum()

  for gradient in jax.jit(jax.grad(loss))(inputs['student_features']):
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_match_finds_each_token_in_a_shuffled_copy():
  rng = np.random.default_rng(4)
  tokens = rng.normal(size=(1, 1, 9, 8))
  order = rng.permutation(9)
  match = jax.jit(esvit.match_tokens)(tokens, 3 * tokens[:, :, order])
  np.testing.assert_array_equal(order[np.asarray(match[0, 0, 0])], np.arange(9))


def test_match_of_zero_features_is_defined():
  zeros = np.zeros((1, 1, 3, 4))
  match = jax.jit(esvit.match_tokens)(zeros, zeros)
  np.testing.assert_array_equal(match, np.zeros((1, 1, 1, 3)))
