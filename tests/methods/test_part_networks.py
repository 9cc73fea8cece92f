import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.data.batch import Views
from cmd_jax.methods import part_networks
from cmd_jax.methods.base import Setting
from cmd_jax.methods.networks import ViewFeatures
from tests import tiny

_BATCH, _DIM = 4, 16


@functools.cache
def _modules_and_params():
  modules = part_networks.make_part_networks(
    Setting(tiny.make_tiny_encoder(), image_px=16),
    has_image_head=False,
    projector=dict(hidden_dim=16, output_dim=8, initialisation='normal'),
    predictor=dict(hidden_dim=16, initialisation='kaiming'),
  )
  shapes, _ = jax.eval_shape(
    lambda rng: part_networks.init_part_networks(modules, rng, 16),
    jax.random.key(0),
  )
  # Away from the start, where hidden layers are all but constant.
  return modules, tiny.draw_like(shapes, scale=0.2)


def _part_ids(seed=0):
  coarse = np.random.default_rng(seed).integers(0, 5, (_BATCH, 2, 4, 4))
  return coarse.repeat(4, 2).repeat(4, 3).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(sampling, params, part_ids, keys, sampled_ids):
  modules, _ = _modules_and_params()
  features = jax.random.normal(jax.random.key(1), (2, _BATCH, 2, 16, _DIM))
  student, teacher = (
    ViewFeatures(x.mean(2), None, x, None, None) for x in features
  )
  if sampled_ids is not None:
    sampling = sampling._replace(draw=lambda *_: sampled_ids)
  images = jnp.zeros((*part_ids.shape, 3))
  return part_networks.project_parts(
    modules,
    params,
    jax.tree.map(lambda x: x * 1.1, params),
    student,
    teacher,
    Views(images, global_part_ids=part_ids),
    keys,
    sampling,
  )


def _project(part_ids, sampled_ids=None, num_samples=3, match_empty=True):
  sampling = part_networks.Sampling(5, num_samples, match_empty)
  _, params = _modules_and_params()
  keys = jax.random.split(jax.random.key(7), _BATCH)
  return jax.device_get(
    _compiled(sampling, params, part_ids, keys, sampled_ids)
  )


def test_teacher_and_student_draw_separately_and_by_image():
  parts = _project(_part_ids())
  assert parts.predictions.shape == parts.targets.shape == (_BATCH, 2, 3, 8)
  assert np.any(parts.prediction_ids != parts.target_ids)
  assert np.any(parts.prediction_ids[:, 0] != parts.prediction_ids[:, 1])
  # Images with the same parts draw differently.
  same = np.tile(_part_ids()[:1], (_BATCH, 1, 1, 1))
  drawn = _project(same).prediction_ids
  assert len(np.unique(drawn.reshape(_BATCH, -1), axis=0)) > 1


def test_given_samples_are_taken_and_absent_ones_are_all_alike():
  ids = np.tile(np.int32([4, 0, 2]), (_BATCH, 4, 1))
  part_ids = _part_ids()
  part_ids[:, 0] = 4
  parts = _project(part_ids, ids)
  np.testing.assert_array_equal(parts.prediction_ids, ids[:, 2:])
  np.testing.assert_array_equal(parts.target_ids, ids[:, :2])
  # All of the first view is part 4: of the others it shows the same nothing.
  for projected in (parts.predictions, parts.targets):
    first = projected[:, 0]
    np.testing.assert_allclose(first[:, 1], first[:, 2], rtol=1e-5)
    np.testing.assert_allclose(first[0, 1], first[1, 1], rtol=1e-5)
    assert np.all(np.abs(first[:, 0] - first[:, 1]).max(-1) > 1e-3)
    assert np.all(np.abs(projected[0, 1, 0] - projected[1, 1, 0]) > 1e-6)


@pytest.mark.parametrize('match_empty', [True, False])
def test_empty_parts_are_matched_only_where_wanted(match_empty):
  # The first view has part 3 alone, the second parts 1 and 3.
  part_ids = np.full((_BATCH, 2, 16, 16), 3, np.uint8)
  part_ids[:, 1, :8] = 1
  parts = _project(part_ids, num_samples=5, match_empty=match_empty)
  first, second = np.sort(parts.prediction_ids, axis=-1).swapaxes(0, 1)
  others = [0, 1, 2, 4] if match_empty else [-1] * 4
  assert all(row.tolist() == sorted([*others, 3]) for row in first)
  others = [0, 2, 4] if match_empty else [-1] * 3
  assert all(row.tolist() == sorted([*others, 1, 3]) for row in second)
  shared = [
    set(parts.prediction_ids[image, view])
    & set(parts.target_ids[image, 1 - view])
    for image in range(_BATCH)
    for view in range(2)
  ]
  expected = {0, 1, 2, 3, 4} if match_empty else {3}
  assert all(ids == expected for ids in shared)


@pytest.mark.parametrize('part', [0, 255])
def test_views_of_one_part_or_none_are_finite(part):
  part_ids = np.full((_BATCH, 2, 16, 16), part, np.uint8)
  parts = _project(part_ids)
  assert all(np.all(np.isfinite(x)) for x in parts)
  # A view without any part is all part 0.
  np.testing.assert_array_equal(parts.prediction_ids[:, :, 0], 0)
