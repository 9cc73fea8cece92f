import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import errors
from cmd_jax.data.batch import Views
from cmd_jax.devices import sharding
from cmd_jax.methods import make_method
from cmd_jax.optim import schedules
from tests import tiny

_BATCH = 4
# Tuples, which unlike dicts are keys of a cache.
_BOTH = (('image', 1.0), ('parts', 1.0))
_PARTS = (('parts', 1.0),)


def _make(encoder='vit', *, axis_name=None, **changes):
  fields = dict(
    head=dict(num_prototypes=12, hidden_dim=16, bottleneck_dim=8),
    weights=_BOTH,
    num_parts=5,
    num_samples=3,
    projector=dict(hidden_dim=16, output_dim=8, initialisation='normal'),
    predictor=dict(hidden_dim=16, initialisation='kaiming'),
    temperature=0.1,
    local_negatives=True,
    match_empty_parts=True,
    lora=tiny.NO_LORA,
    image_px=16,
    student_temperature=0.1,
    teacher_temperature=schedules.stepwise_schedule(0.04, 0.07, 2, 2),
    teacher_normalisation='centring',
    centre_momentum=0.9,
  )
  fields |= changes
  fields['weights'] = dict(fields['weights'])
  return make_method(
    'particle',
    encoder=tiny.make_tiny_encoder(encoder, axis_name=axis_name),
    axis_name=axis_name,
    **fields,
  )


def _views(px=16, local=True, seed=0):
  rng = np.random.default_rng(seed)
  shapes = [(_BATCH, 2, px, px, 3)] + [(_BATCH, 1, 8, 8, 3)] * local
  images = [rng.normal(size=s).astype(np.float32) for s in shapes]
  part_ids = rng.integers(0, 5, (_BATCH, 2, px // 4, px // 4), np.uint8)
  part_ids = part_ids.repeat(4, 2).repeat(4, 3)
  return Views(*images, global_part_ids=part_ids)


def _keys():
  return jax.random.split(jax.random.key(7), _BATCH)


def _init(method):
  shapes, state_shapes = jax.eval_shape(method.init, jax.random.key(0))
  # Not the official start, where hidden layers are all but constant.
  params = tiny.draw_like(shapes, scale=0.2)
  state = jax.tree_util.tree_map_with_path(
    lambda path, x: np.full(x.shape, path[-1].key == 'var', x.dtype),
    state_shapes,
  )
  return params, jax.tree.map(lambda x: x * np.float32(1.1), params), state


def _forward(method, start, views, keys):
  """Terms, what is watched, what is compared, and the next state."""
  contrast = tiny.inside(method)
  output = tiny.forward(method, *start, views, keys, 1)
  compared = contrast.compare(output)
  terms = {name: t.value(compared) for name, t in contrast.terms.items()}
  loss = method.loss(*start, views, keys, jnp.int32(1))
  watched = method.finish(
    sharding.pmean(loss.stats, contrast.setting.axis_name)
  )
  return terms, watched, compared, loss.state


@functools.cache
def _make_runner(encoder, changes):
  method = _make(encoder, **dict(changes))
  start = _init(method)
  # As an argument, for XLA computes with constants what it can.
  forward = jax.jit(functools.partial(_forward, method))

  def run(views, keys):
    return jax.device_get(forward(start, views, keys))

  return method, start, run


def _runner(encoder='vit', **changes):
  """A method, where it starts, and (views, keys) -> what `_forward` gives."""
  return _make_runner(encoder, tuple(changes.items()))


def _gradients(method, start, views, keys):
  """Gradients of the mean of each term, for student and teacher."""

  def means(params, teacher):
    terms, *_ = _forward(method, (params, teacher, start[2]), views, keys)
    return {name: values.mean() for name, values in terms.items()}

  jacobian = jax.jit(jax.jacrev(means, argnums=(0, 1)))
  return jax.device_get(jacobian(*start[:2]))


def _moved(gradients):
  return {
    name
    for name, tree in gradients.items()
    if any(np.any(x != 0) for x in jax.tree.leaves(tree))
  }


def _is_finite(tree):
  return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


def test_each_term_trains_just_its_modules_and_never_the_teacher():
  method, start, _ = _runner()
  expected = {
    'image': {'encoder', 'image_head'},
    'parts': {'encoder', 'projector', 'predictor'},
  }
  gradients = _gradients(method, start, _views(), _keys())
  assert _is_finite(gradients)
  assert set(gradients) == set(expected)
  for name, (student, teacher) in gradients.items():
    assert _moved(student) == expected[name]
    assert _moved(teacher) == set()


def test_terms_metrics_and_centre():
  _, _, run = _runner()
  terms, metrics, _, state = run(_views(), _keys())
  for values in terms.values():
    assert values.shape == (_BATCH,)
    assert np.all(values > 0)
  assert _is_finite((terms, metrics))
  assert set(state) == {'image_centre'}
  assert np.any(state['image_centre'] != 0)
  assert 0 < metrics['part_positives'] < 1
  assert 0 < metrics['part_spread'] < 1


def test_permuting_the_batch_permutes_every_term():
  _, _, run = _runner()
  views, keys, order = _views(), _keys(), np.array([2, 0, 3, 1])
  plain, *_ = run(views, keys)
  shuffled, *_ = run(jax.tree.map(lambda x: x[order], views), keys[order])
  for term, values in plain.items():
    np.testing.assert_allclose(shuffled[term], values[order], rtol=1e-4)


def test_four_devices_do_as_one():
  views, keys = _views(), _keys()
  _, start, run = _runner()
  terms, metrics, _, state = run(views, keys)
  mesh = sharding.make_mesh(4)
  spread = jax.device_put((views, keys), sharding.sharded(mesh))
  by_jit = run(*spread)

  def share(start, views, keys):
    method = _make(axis_name=sharding.DATA_AXIS)
    return _forward(method, start, views, keys)

  def split(x):
    return x.reshape(4, 1, *x.shape[1:])

  by_pmap = jax.pmap(share, sharding.DATA_AXIS, in_axes=(None, 0, 0))(
    start, *jax.tree.map(split, (views, keys))
  )
  by_pmap = jax.device_get(by_pmap)
  by_pmap = (
    jax.tree.map(lambda x: x[:, 0], by_pmap[0]),
    *jax.tree.map(lambda x: x[0], (by_pmap[1], None, by_pmap[3])),
  )
  for other_terms, other_metrics, _, other_state in (by_jit, by_pmap):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      (other_terms, other_metrics, other_state),
      (terms, metrics, state),
    )


@pytest.mark.parametrize('part', [0, 255])
def test_images_of_one_part_or_none_have_finite_terms(part):
  _, _, run = _runner()
  views = _views()
  views = views._replace(
    global_part_ids=np.full_like(views.global_part_ids, part)
  )
  terms, metrics, _, _ = run(views, _keys())
  assert _is_finite((terms, metrics))


def test_swin_contrasts_parts_without_images():
  method, (params, _, state), run = _runner('swin', weights=_PARTS)
  assert set(params) == {'encoder', 'projector', 'predictor'}
  views = _views(local=False)
  terms, metrics, _, after = run(views, _keys())
  assert set(terms) == {'parts'}
  assert _is_finite((terms, metrics))
  assert state == after == {}


def test_statistics_of_a_resnet_are_shared_and_updated_once_a_view():
  method, start, run = _runner('resnet', weights=_PARTS)
  params, teacher, state = start
  views = _views(64, local=False)
  _, _, _, after = run(views, _keys())
  encoder = tiny.make_tiny_encoder('resnet')

  @jax.jit
  def update(params, stats, images):
    _, updated = encoder.apply(
      {'params': params, 'batch_stats': stats},
      images,
      train=True,
      mutable=['batch_stats'],
    )
    return updated['batch_stats']

  stats = state['student_stats']['encoder']
  for weights in (teacher, params):
    for view in range(2):
      images = views.global_views[:, view]
      stats = update(weights['encoder'], stats, images)
  assert set(after) == {'student_stats', 'teacher_stats'}
  for shared in after.values():
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      shared,
      {'encoder': stats},
    )


def test_frozen_parameters_get_no_gradient():
  method, start, _ = _runner(
    weights=_PARTS, is_frozen=lambda path: path[0] == 'encoder'
  )
  gradients = _gradients(method, start, _views(local=False), _keys())
  assert _moved(gradients['parts'][0]) == {'projector', 'predictor'}


def test_sinkhorn_uses_the_prototypes_equally():
  def inequality(**changes):
    """How far the mean prototype is from that of equal use."""
    _, (params, *_), run = _runner(**changes)
    _, _, compared, _ = run(_views(), _keys())
    direction = params['image_head']['last_layer']['weight_v']
    prototypes = direction / np.linalg.norm(direction, axis=0)
    used = np.asarray(compared.images.expected_images).mean((0, 1))
    return np.linalg.norm(used - prototypes.mean(1))

  balanced = inequality(teacher_normalisation='sinkhorn')
  assert balanced < 0.5 * inequality()


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(weights=dict(image=1.0)), "no 'parts'.*dino"),
    (dict(weights=dict(parts=1.0, region=1.0)), 'region.*image, parts'),
    (dict(num_parts=300), 'there are 300 part ids.*1 to 256'),
    (dict(num_samples=6), 'num_samples is 6.*config.parts gives, 5'),
    (dict(num_samples=0), 'num_samples is 0'),
    (dict(teacher_normalisation='none'), 'centring, sinkhorn'),
  ],
)
def test_wrong_choices_are_explained(changes, words):
  with pytest.raises(errors.UserError, match=words):
    _make(**changes)


def test_views_that_the_tokens_do_not_tile_are_explained():
  method, start, run = _runner('resnet', weights=_PARTS)
  with pytest.raises(errors.UserError, match='global_px'):
    run(_views(68, local=False), _keys())
