import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import errors
from cmd_jax.config import choices
from cmd_jax.data.batch import Views
from cmd_jax.losses import cmd as cmd_losses
from cmd_jax.methods import make_method, metrics
from cmd_jax.methods.base import Method
from cmd_jax.optim import schedules
from tests import tiny

_WEIGHTED_AGAIN = tuple(
  (pooling, 'bag_to_image') for pooling in ('attention', 'strength', 'mean')
)


def _views(batch=3, seed=0):
  rng = np.random.default_rng(seed)

  def draw(px):
    return rng.normal(size=(batch, 2, px, px, 3)).astype(np.float32)

  return Views(draw(16), draw(8))


def _keys(batch=3):
  return jax.random.split(jax.random.key(7), batch)


def _init(method):
  shapes, state = jax.eval_shape(method.init, jax.random.key(0))
  # Not the official start, where attention is uniform and so hides the
  # difference between poolings, and which takes long to compile.
  params = tiny.draw_like(shapes, scale=0.3)
  teacher = jax.tree.map(lambda x: x * np.float32(1.1), params)
  return (
    params,
    teacher,
    jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state),
  )


class _Case(NamedTuple):
  """A method where it starts, and every term's values as one program."""

  method: Method
  params: dict
  teacher: dict
  state: dict
  terms: Callable


def _make_case(name, **changes):
  method = tiny.make_tiny_method(name, **changes)
  terms = tiny.inside(method).terms

  def values(params, teacher, state, views, keys):
    compared = tiny.compare(method, params, teacher, state, views, keys, 1)
    return {name: term.value(compared) for name, term in terms.items()}

  return _Case(method, *_init(method), jax.jit(values))


# Compiled once for all tests that ask alike.
_case = functools.cache(_make_case)


def _terms(case, views=None, keys=None):
  views = _views() if views is None else views
  keys = _keys() if keys is None else keys
  return case.terms(case.params, case.teacher, case.state, views, keys)


@pytest.mark.parametrize('name', tiny.METHODS)
def test_terms_are_finite_positive_and_one_per_example(name):
  for values in jax.device_get(_terms(_case(name))).values():
    assert values.shape == (3,)
    assert np.all(np.isfinite(values))
    # The released cross-level expression has no lower bound.
    assert name == 'cmd_released' or np.all(values > 0)


@pytest.mark.parametrize('name', tiny.METHODS)
def test_permuting_the_batch_permutes_every_term(name):
  views, keys, order = _views(), _keys(), np.array([2, 0, 1])
  plain = jax.device_get(_terms(_case(name), views, keys))
  shuffled = _terms(
    _case(name), jax.tree.map(lambda x: x[order], views), keys[order]
  )
  for term, values in plain.items():
    np.testing.assert_allclose(shuffled[term], values[order], rtol=1e-4)


@pytest.mark.parametrize('name', tiny.METHODS)
def test_the_teacher_gets_no_gradient(name):
  case = _case(name)

  @jax.jit
  @jax.grad
  def gradients(teacher):
    terms = _terms(case._replace(teacher=teacher))
    return sum(values.sum() for values in terms.values())

  for gradient in jax.tree.leaves(gradients(case.teacher)):
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@functools.cache
def _gradients(name, **changes):
  """Of each term, of all parameters: one program."""
  case = _case(name, **changes)

  @jax.jit
  @jax.jacrev
  def gradients(params):
    terms = _terms(case._replace(params=params))
    return {name: values.sum() for name, values in terms.items()}

  return jax.device_get(gradients(case.params))


@pytest.mark.parametrize(
  'term, modules',
  [
    ('image', {'encoder', 'image_head'}),
    ('region', {'encoder', 'region_head', 'mil'}),
    ('student_bag', {'encoder', 'region_head', 'mil'}),
    ('teacher_bag', {'mil'}),
  ],
)
def test_each_term_of_cmd_trains_just_its_modules(term, modules):
  moved = {
    name
    for name, tree in _gradients('cmd')[term].items()
    if any(np.any(x != 0) for x in jax.tree.leaves(tree))
  }
  assert moved == modules


def test_esvit_is_cmd_without_attention_and_levels():
  cmd = _make_case(
    'cmd', attend_regions=False, weights=dict(image=0.5, region=0.5)
  )
  of_esvit = _terms(cmd._replace(terms=_case('esvit').terms))
  of_cmd = _terms(cmd)
  assert of_cmd.keys() == of_esvit.keys()
  for term, values in of_esvit.items():
    np.testing.assert_allclose(of_cmd[term], values, rtol=1e-6)


# Whatever its weights are, a bag is compared in the same two ways.
@pytest.mark.parametrize(
  'pooling, direction',
  [
    pytest.param(*x, marks=[pytest.mark.slow] * (x in _WEIGHTED_AGAIN))
    for x in itertools.product(cmd_losses.POOLINGS, cmd_losses.KL_DIRECTIONS)
  ],
)
def test_poolings_and_directions_give_different_finite_terms(
  pooling, direction
):
  case, default = (
    _case('cmd', pooling=x, kl_direction=y, attend_regions=False)
    for x, y in ((pooling, direction), ('gated_attention', 'image_to_bag'))
  )
  assert ('mil' in case.params) == ('attention' in pooling)
  values, others = _terms(case), _terms(default)
  for term in ('student_bag', 'teacher_bag'):
    assert np.all(np.isfinite(values[term]))
    same = (pooling, direction) == ('gated_attention', 'image_to_bag')
    assert np.allclose(values[term], others[term], rtol=1e-5) == same


def test_the_usual_bags_are_gated_and_compared_with_the_image():
  fields = choices.method_fields('cmd')
  assert (fields.pooling, fields.kl_direction) == (
    'gated_attention',
    'image_to_bag',
  )


def test_shared_prototypes_are_one_layer():
  case = _case('cmd', shared_prototypes=True)
  assert 'last_layer' not in case.params['region_head']

  @jax.jit
  @jax.grad
  def gradient(params):
    return _terms(case._replace(params=params))['region'].sum()

  moved = gradient(case.params)['image_head']['last_layer']['weight_v']
  assert np.any(np.asarray(moved) != 0)


def test_sinkhorn_teacher_runs_and_ignores_the_centre():
  case = _case('esvit', teacher_normalisation='sinkhorn')
  moved = jax.tree.map(
    lambda x: x + np.float32(3) * np.arange(x.size, dtype=x.dtype), case.state
  )
  np.testing.assert_array_equal(
    _terms(case)['region'], _terms(case._replace(state=moved))['region']
  )


def test_stochastic_depth_depends_on_the_key_and_spares_the_teacher():
  method = tiny.make_tiny_method('dino', drop_path=0.9)
  params, teacher, state = _init(method)
  one, other = (
    jax.device_get(tiny.forward(method, params, teacher, state, _views(), keys))
    for keys in (_keys(), _keys()[::-1])
  )
  assert np.any(
    one.student.image_bottlenecks[0] != other.student.image_bottlenecks[0]
  )
  np.testing.assert_array_equal(one.teacher.embedding, other.teacher.embedding)


def test_metrics_show_a_collapse():
  method = tiny.make_tiny_method('dino')
  params, teacher, state = _init(method)
  output = tiny.forward(method, params, teacher, state, _views(), _keys())
  context = output.context._replace(temperature=jnp.float32(1e6))
  collapsed = metrics.distribution_metrics(
    tiny.compared_of(method, output._replace(context=context))
  )
  np.testing.assert_allclose(
    collapsed['teacher_entropy'], np.full(3, np.log(12)), rtol=1e-5
  )

  def feature_spread(output):
    return method.finish(tiny.inside(method).stats(output))['feature_spread']

  embedding = output.teacher.embedding
  same = jnp.broadcast_to(embedding[:1, :1], embedding.shape)
  spread = feature_spread(
    output._replace(teacher=output.teacher._replace(embedding=same))
  )
  assert spread < 1e-3 < feature_spread(output)


def test_embedding_is_what_the_teacher_sees():
  method = tiny.make_tiny_method('dino')
  params, teacher, state = _init(method)
  views = _views()
  output = tiny.forward(method, params, teacher, state, views, _keys())
  np.testing.assert_allclose(
    tiny.encode(method, teacher, {}, views.global_views[:, 0]).image,
    output.teacher.embedding[:, 0],
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  'name, changes, words',
  [
    ('cmd', dict(variant='best'), 'variant.*paper'),
    ('cmd', dict(pooling='sum'), 'pooling.*gated_attention, attention'),
    ('cmd', dict(kl_direction='up'), 'image_to_bag, bag_to_image'),
    ('cmd', dict(pooling='mean'), 'attend_regions'),
    ('cmd', dict(weights=dict(imag=1.0)), 'imag.*image, region'),
    ('dino', dict(weights=dict(image=0.0)), 'all 0.*image'),
    ('dino', dict(teacher_normalisation='none'), 'centring, sinkhorn'),
  ],
)
def test_wrong_choices_are_explained(name, changes, words):
  with pytest.raises(errors.UserError, match=words):
    tiny.make_tiny_method(name, **changes)


def test_warm_up_scales_the_weights_of_all_terms_but_the_image():
  plain = tiny.inside(tiny.make_tiny_method('cmd')).terms
  warmed = tiny.inside(
    tiny.make_tiny_method('cmd', term_warmup=schedules.linear_warmup(4))
  ).terms
  for step, factor in ((0, 0.0), (1, 0.25), (9, 1.0)):
    for name, term in plain.items():
      expected = term.weight(step) * (1.0 if name == 'image' else factor)
      assert float(warmed[name].weight(step)) == pytest.approx(expected)


@pytest.mark.parametrize(
  'changes, expected',
  [
    ({}, True),
    (dict(teacher_normalisation='sinkhorn'), False),
    (dict(use_bn=True), False),
    (dict(encoder='resnet'), False),
  ],
)
def test_whether_a_batch_can_be_seen_in_parts(changes, expected):
  method = tiny.make_tiny_method('cmd', **changes)
  assert method.is_mean_over_examples == expected


def test_unknown_method_lists_those_there_are():
  with pytest.raises(errors.UserError, match='cmd, esvit, dino'):
    make_method('barlow_twins')
