import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cmd_jax
from cmd_jax.cli import program
from cmd_jax.config import builtin, check
from cmd_jax.data.batch import Views
from cmd_jax.errors import UserError
from cmd_jax.methods import distil
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training import experiment, recipe, run
from cmd_jax.training.frozen_teacher import load_teacher
from tests import saved_runs, tiny
from tests.reliability import small_run


def _views(px=16):
  images = np.random.default_rng(1).normal(size=(3, 2, px, px, 3))
  return Views(images.astype(np.float32))


def _keys():
  return jax.random.split(jax.random.key(2), 3)


def _start(method):
  """Drawn parameters, and the state as the loss is given it."""
  shapes, state = jax.eval_shape(method.init, jax.random.key(0))
  state = tiny.draw_like(state, scale=1.0, seed=5)
  if 'queue' in state:
    state['queue'] = _unit(state['queue'])
  return tiny.draw_like(shapes, scale=0.3), {**state, **method.constants}


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _loss(method, params, state):
  return jax.jit(method.loss)(params, params, state, _views(), _keys(), 0)


def _twice_as_fine(grid):
  """[2, 2, D] -> [4, 4, D]: bilinear between the middles of the cells."""
  fine = np.zeros((4, 4, grid.shape[-1]))
  for y, x in np.ndindex(4, 4):
    for i, j in np.ndindex(2, 2):
      # Their distances in coarse cells, beyond the outermost middles none.
      down, right = (
        abs(min(max((at + 0.5) / 2 - 0.5, 0), 1) - middle)
        for at, middle in ((y, i), (x, j))
      )
      fine[y, x] += (1 - down) * (1 - right) * grid[i, j]
  return fine


def _by_hand(method, params):
  """Student's projections and teacher's targets, all of length 1."""
  teacher = tiny.inside(method).teacher
  images = _views().global_views.reshape(6, 16, 16, 3)
  student = tiny.encode(method, params, {}, images)
  target = jax.jit(teacher.encoder.apply)(teacher.variables, images)

  def project(name, x):
    layer = params[f'{name}_projector']
    return _unit(np.float64(x) @ layer['kernel'] + layer['bias'])

  fine = [_twice_as_fine(x.reshape(2, 2, -1)) for x in target.tokens]
  return (
    project('image', student.image),
    _unit(np.float64(target.image)),
    project('tokens', student.tokens),
    _unit(np.reshape(fine, (6, 16, -1))),
  )


def _kl(student, teacher, anchors, temperature=0.07):
  p, q = (np.exp(anchors @ x / temperature) for x in (teacher, student))
  p, q = p / p.sum(), q / q.sum()
  return np.sum(p * np.log(p / q))


def test_the_cosine_is_that_of_projections_and_interpolated_tokens():
  method = tiny.make_tiny_method(
    'distil', drop_path=0.0, weights=dict(image=1.0, tokens=0.5)
  )
  params, state = _start(method)
  loss = _loss(method, params, state)
  student, teacher, tokens, targets = _by_hand(method, params)
  image = 1 - np.sum(student * teacher, -1).mean()
  of_tokens = 1 - np.sum(tokens * targets, -1).mean()
  np.testing.assert_allclose(loss.terms['image'], image, rtol=1e-4)
  np.testing.assert_allclose(loss.terms['tokens'], of_tokens, rtol=1e-4)
  np.testing.assert_allclose(loss.mean, image + 0.5 * of_tokens, rtol=1e-4)
  assert not loss.state
  assert method.is_mean_over_examples
  assert 0 < method.finish(loss.stats)['feature_spread'] <= 1


def test_the_kl_compares_with_the_queue_and_with_tokens_of_the_view():
  method = tiny.make_tiny_method('distil', drop_path=0.0, loss='kl')
  params, state = _start(method)
  loss = _loss(method, params, state)
  student, teacher, tokens, targets = _by_hand(method, params)
  image = np.mean(
    [
      _kl(s, t, np.concatenate([state['queue'], t[None]]))
      for s, t in zip(student, teacher)
    ]
  )
  of_tokens = np.mean(
    [
      _kl(s, t, view)
      for views, view in zip(tokens, targets)
      for s, t in zip(views, view)
    ]
  )
  np.testing.assert_allclose(loss.terms['image'], image, rtol=1e-3)
  np.testing.assert_allclose(loss.terms['tokens'], of_tokens, rtol=1e-3)
  assert set(loss.state) == {'queue'}
  np.testing.assert_allclose(loss.state['queue'][:6], teacher, atol=1e-5)
  np.testing.assert_array_equal(loss.state['queue'][6:], state['queue'][:-6])
  assert not method.is_mean_over_examples


def test_encoder_and_projectors_learn_and_nothing_else():
  method = tiny.make_tiny_method('distil')
  params, state = _start(method)

  def mean(params, teacher, constants):
    return method.loss(
      params, teacher, {**state, **constants}, _views(), _keys(), 0
    ).mean

  gradients = jax.jit(jax.grad(mean, argnums=(0, 1, 2)))
  student, *others = jax.device_get(gradients(params, params, method.constants))
  assert set(student) == {'encoder', 'image_projector', 'tokens_projector'}
  for module in student.values():
    assert any(np.any(x != 0) for x in jax.tree.leaves(module))
  assert not any(np.any(x != 0) for x in jax.tree.leaves(others))


def test_it_is_trained_by_the_step_in_whole_batches_and_in_parts():
  step, state = tiny.make_step('distil', drop_path=0.0)
  before = jax.device_get(state.params)
  state, (metrics, _) = tiny.run_steps(step, state, 2)
  total = metrics['loss/image'] + metrics['loss/tokens']
  np.testing.assert_allclose(metrics['loss'], total, rtol=1e-5)
  moved = jax.tree.map(lambda a, b: np.any(a != b), before, state.params)
  assert all(jax.tree.leaves(moved['image_projector']))
  # No step carries the frozen teacher, so none can change or save it.
  assert not state.method_state
  step, start = tiny.make_step('distil', drop_path=0.0, grad_accum_steps=2)
  _, (in_parts, _) = tiny.run_steps(step, start, 2)
  np.testing.assert_allclose(in_parts['loss'], metrics['loss'], rtol=1e-5)


@pytest.mark.parametrize(
  'student, teacher',
  [
    ('vit', 'efficientnet'),
    ('swin', 'resnet'),
    ('resnet', 'swin'),
    ('efficientnet', 'vit'),
  ],
)
def test_any_teacher_teaches_any_encoder(student, teacher):
  frozen = tiny.make_tiny_teacher(teacher)
  method = tiny.make_tiny_method(
    'distil', encoder=student, teacher=frozen, loss='kl'
  )
  params, state = jax.eval_shape(method.init, jax.random.key(0))
  loss = jax.eval_shape(
    functools.partial(method.loss, step=0),
    params,
    params,
    {**state, **method.constants},
    _views(),
    _keys(),
  )
  assert loss.mean.shape == ()
  shapes = jax.tree.map(lambda x: x.shape, state)
  assert jax.tree.map(lambda x: x.shape, loss.state) == shapes


def test_tokens_on_a_coarser_grid_are_means_of_those_around():
  tokens = np.random.default_rng(0).normal(size=(2, 16, 3)).astype(np.float32)
  coarse = distil.resize_grid(jnp.asarray(tokens), 4)
  # Triangles as wide as the coarse cells, around the middles of these.
  weights = np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
  expected = np.einsum(
    'iy,jx,byxd->bijd', weights, weights, tokens.reshape(2, 4, 4, 3)
  )
  np.testing.assert_allclose(coarse, expected.reshape(2, 4, 3), atol=1e-5)
  assert distil.resize_grid(tokens, 16) is tokens


def test_views_are_resized_for_the_teacher_alone():
  method = tiny.make_tiny_method(
    'distil', drop_path=0.0, teacher=tiny.make_tiny_teacher(view_px=8)
  )
  params, state = _start(method)
  loss = _loss(method, params, state)
  teacher = tiny.inside(method).teacher
  images = _views().global_views.reshape(6, 16, 16, 3)
  seen = jax.image.resize(images, (6, 8, 8, 3), 'bilinear')
  target = jax.jit(teacher.encoder.apply)(teacher.variables, seen)
  student = tiny.encode(method, params, {}, images).image
  layer = params['image_projector']
  projected = _unit(np.float64(student) @ layer['kernel'] + layer['bias'])
  expected = 1 - np.sum(projected * _unit(target.image), -1).mean()
  np.testing.assert_allclose(loss.terms['image'], expected, rtol=1e-4)


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(loss='mse'), "loss is 'mse': choose one of cosine, kl"),
    (dict(temperature=0.0), 'temperature is 0.0'),
    (dict(weights=dict(image=0.0, tokens=0.0)), 'weights are all 0'),
    (
      dict(teacher=tiny.make_tiny_teacher(view_px=18)),
      'patches of 8 do not tile: set config.method.teacher.view_px=16',
    ),
  ],
)
def test_wrong_choices_are_explained(changes, words):
  with pytest.raises(UserError, match=words) as caught:
    tiny.make_tiny_method('distil', **changes)
  assert '\n' not in str(caught.value)


def test_a_teacher_that_cannot_be_read_is_named(tmp_path):
  (tmp_path / 'notes.pth').write_text('no weights')
  for path, words in (
    ('', 'efficientnet_lite0'),
    (str(tmp_path / 'gone.pth'), 'does not exist'),
    (str(tmp_path / 'notes.pth'), 'notes.pth'),
    (str(tmp_path), 'is a folder without'),
  ):
    with pytest.raises(UserError, match=words) as caught:
      load_teacher(path=path, network='teacher', view_px=0)
    assert str(caught.value).startswith('config.method.teacher.path')
    assert '\n' not in str(caught.value)


def test_the_heads_that_it_lacks_do_not_forbid_parts_of_a_batch():
  config = builtin.folder('method=distil').unlock()
  config.parallel.grad_accum_steps = 2
  assert config.head.use_bn
  recipe.check_parallel(config, 1, 'cpu')
  check.check_config(config)


def test_a_run_is_distilled_resumed_and_starts_another(tmp_path, monkeypatch):
  photos, teacher = tmp_path / 'photos', tmp_path / 'teacher'
  small_run.write_photos(photos)
  small_run.leave_out_scores(monkeypatch)
  saved_runs.make_run(teacher, 'dino')
  method = builtin.folder('method=distil').method.to_dict()
  method['teacher']['path'] = str(teacher)
  workdir = Workdir(str(tmp_path / 'run'))
  config = small_run.make_config(photos, method=method, total_epochs=1)
  run.train(config, workdir.path)
  assert small_run.read_metrics(workdir)[-1]['step'] == 2
  assert len(workdir.results()['distilled_sha256']) == 64
  config.total_epochs = 2
  run.train(config, workdir.path)
  assert small_run.read_metrics(workdir)[-1]['step'] == 4
  # The teacher of the run as it is scored; its encoder alone goes on.
  encoder = cmd_jax.load(workdir.path)
  assert encoder.training['method'] == 'distil'
  assert program.run(['export', f'--workdir={workdir.path}']) == 0
  start = experiment.build(
    small_run.make_config(photos, init__path=str(workdir.path))
  ).init_state()
  for mine, theirs in zip(
    jax.tree.leaves(start.params['encoder']),
    jax.tree.leaves(encoder.variables['params']),
    strict=True,
  ):
    np.testing.assert_array_equal(mine, theirs)
  results = json.loads(workdir.results_file.read_text())
  results['distilled_sha256'] = '0' * 64
  workdir.results_file.write_text(json.dumps(results))
  with pytest.raises(UserError, match='distilled from another teacher'):
    run.train(config, workdir.path)
