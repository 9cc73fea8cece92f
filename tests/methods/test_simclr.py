import jax
import numpy as np
import pytest

from cmd_jax import errors
from cmd_jax.data.batch import Views
from cmd_jax.losses.simclr import nt_xent
from cmd_jax.models.heads import l2_normalise
from tests import tiny


def _start(method):
  shapes, state = jax.eval_shape(method.init, jax.random.key(0))
  params = tiny.draw_like(shapes, scale=0.3)
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
  return params, state


def _views():
  images = np.random.default_rng(1).normal(size=(3, 2, 16, 16, 3))
  return Views(images.astype(np.float32))


def _keys():
  return jax.random.split(jax.random.key(2), 3)


def test_the_loss_is_nt_xent_of_the_projected_views():
  method = tiny.make_tiny_method('simclr', drop_path=0.0)
  params, state = _start(method)
  loss = jax.jit(method.loss)(params, params, state, _views(), _keys(), 0)
  views = _views().global_views
  images = views.reshape(6, *views.shape[2:])
  embedding = tiny.encode(method, params, {}, images).image

  @jax.jit
  def compare(params, embedding):
    projector = tiny.inside(method).projector
    projected = l2_normalise(projector.apply({'params': params}, embedding))
    return nt_xent(projected.reshape(3, 2, -1), temperature=0.1, axis_name=None)

  expected = compare(params['projector'], embedding)
  np.testing.assert_allclose(loss.mean, expected.mean(), rtol=1e-5)
  assert loss.terms == {'contrast': loss.mean}
  assert 0 < method.finish(loss.stats)['feature_spread'] <= 1
  assert not method.is_mean_over_examples


def test_encoder_and_projector_learn_and_the_teacher_does_not():
  method = tiny.make_tiny_method('simclr')
  params, state = _start(method)

  def mean(params, teacher):
    return method.loss(params, teacher, state, _views(), _keys(), 0).mean

  gradients = jax.jit(jax.grad(mean, argnums=(0, 1)))
  student, teacher = jax.device_get(gradients(params, params))
  assert set(student) == {'encoder', 'projector'}
  for module in student.values():
    assert any(np.any(x != 0) for x in jax.tree.leaves(module))
  assert not any(np.any(x != 0) for x in jax.tree.leaves(teacher))


def test_it_is_trained_by_the_step():
  step, state = tiny.make_step('simclr')
  before = jax.device_get(state.params)
  state, (metrics, *_) = tiny.run_steps(step, state, 2)
  assert metrics['loss'] == metrics['loss/contrast'] > 0
  moved = jax.tree.map(lambda a, b: np.any(a != b), before, state.params)
  assert all(jax.tree.leaves(moved['projector']))


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(temperature=0.0), 'temperature is 0.0'),
    (
      dict(projector=dict(hidden_dim=4, output_dim=2, initialisation='x')),
      'torch, normal',
    ),
  ],
)
def test_wrong_choices_are_explained(changes, words):
  with pytest.raises(errors.UserError, match=words):
    tiny.make_tiny_method('simclr', **changes)
