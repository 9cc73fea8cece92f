import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from cmd_jax import errors
from cmd_jax.data.batch import MultiStepBatch
from cmd_jax.devices import products, sharding
from cmd_jax.models import partial
from cmd_jax.optim import optimizers
from tests import tiny


def _assert_same_run(one, other):
  (state, history), (other_state, other_history) = one, other
  for metrics, other_metrics in zip(history, other_history, strict=True):
    assert metrics.keys() == other_metrics.keys()
    for name, value in metrics.items():
      np.testing.assert_allclose(
        other_metrics[name], value, rtol=1e-3, atol=1e-4, err_msg=name
      )
  # Adam divides a gradient at rounding level by its own size, so that single
  # elements may differ by a whole step of the learning rate (1e-3).
  deviations = jax.tree.map(
    lambda a, b: np.abs(a - b).ravel(),
    (state.params, state.teacher_params, state.method_state),
    (other_state.params, other_state.teacher_params, other_state.method_state),
  )
  deviations = np.concatenate(jax.tree.leaves(deviations))
  assert np.quantile(deviations, 0.98) < 2e-5
  assert deviations.max() < 6e-3


def _slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


# As it augments, tests/distributed compares a program on four devices with one
# on one, and tests/data pmap with jit.
@pytest.mark.parametrize(
  'name, augmented',
  [
    ('cmd', False),
    *(
      _slow(name, True)
      for name in (*tiny.METHODS, 'simclr', 'distil', 'finetune')
    ),
  ],
)
def test_jit_on_one_device_jit_on_eight_and_pmap_agree(name, augmented):
  changes = dict(augmented=True) if augmented else {}
  one, eight, pmap = (
    tiny.run_steps(*tiny.make_step(name, **changes, **options))
    for options in (
      dict(),
      dict(num_devices=8),
      dict(mode='pmap', num_devices=8),
    )
  )
  _assert_same_run(one, eight)
  _assert_same_run(one, pmap)


@pytest.mark.parametrize(
  'name, mode', [('dino', 'jit'), _slow('esvit', 'jit'), _slow('esvit', 'pmap')]
)
def test_batch_statistics_are_those_of_all_devices(name, mode):
  def one_step(**options):
    step, state = tiny.make_step(name, encoder='resnet', use_bn=True, **options)
    return tiny.run_steps(step, state, 1)

  one, (metrics,) = one_step()
  two, (other_metrics,) = one_step(mode=mode, num_devices=2)
  for metric in ('loss', 'grad_norm'):
    np.testing.assert_allclose(
      other_metrics[metric], metrics[metric], rtol=1e-2
    )
  stats = [
    {x: run.method_state[f'{x}_stats'] for x in ('student', 'teacher')}
    for run in (one, two)
  ]
  heads = {'image_head', 'region_head'} if name == 'esvit' else {'image_head'}
  assert set(stats[0]['student']) == {'encoder'} | heads
  chex.assert_trees_all_close(*stats, rtol=1e-3, atol=1e-4)
  # Both have moved, the student's more often: it sees the local views as well.
  var = {
    name: one.method_state[f'{name}_stats']['encoder']['bn1']['var']
    for name in ('student', 'teacher')
  }
  assert np.all(var['teacher'] != 1)
  assert np.any(var['teacher'] != var['student'])


# The encoder alone is looked at in tests/models.
@pytest.mark.slow
@pytest.mark.parametrize('batch_statistics', ['frozen', 'synchronised'])
def test_statistics_of_an_efficientnet_move_unless_they_are_frozen(
  batch_statistics,
):
  step, state = tiny.make_step(
    'dino', encoder='efficientnet', batch_statistics=batch_statistics
  )
  before = jax.tree.map(np.array, state)
  after, history = tiny.run_steps(step, state, 2)
  assert all(np.isfinite(metrics['loss']) for metrics in history)
  moved = {path[1] for path in _moved(before.params, after.params)}
  assert {'conv_stem', 'block_0', 'block_6', 'bn_head'} <= moved
  for network in ('student', 'teacher'):
    old, new = (
      x.method_state[f'{network}_stats']['encoder'] for x in (before, after)
    )
    moved = {path[0] for path in _moved(old, new)}
    assert moved == (set() if batch_statistics == 'frozen' else set(old))


def _moved(before, after):
  """Paths of the parameters that training changed."""
  before, after = (traverse_util.flatten_dict(x) for x in (before, after))
  return {
    path for path in before if np.any(before[path] != np.asarray(after[path]))
  }


def _sgd():
  # Adam would blow rounding up to whole steps.
  return optimizers.make_sgd(
    learning_rate=lambda step: 0.1,
    weight_decay=lambda step: 0.04,
    clip_norm=3.0,
  )


def _compile(name, **options):
  """The compiled step, which knows its memory, and its first state."""
  several = options.get('several')
  step, state = tiny.make_step(name, optimizer=_sgd(), **options)
  batch = tiny.make_batch()
  if several:
    batch = MultiStepBatch(_stack([batch] * 3), np.int32(1))
  return sharding.compile_ahead(step, state, batch, jax.random.key(1)), state


def _stack(batches):
  return jax.tree.map(lambda *x: np.stack(x), *batches)


@functools.cache
def _whole_batch_on_one_device(name):
  step, state = _compile(name)
  start = jax.device_get(state.params)
  run = tiny.run_steps(step, state, 2)
  assert len(_moved(start, run[0].params)) == len(jax.tree.leaves(start))
  return step, run


def _assert_equal_runs(run, other):
  (state, history), (other_state, other_history) = run, other
  chex.assert_trees_all_close(
    (state.params, state.teacher_params, state.method_state),
    (other_state.params, other_state.teacher_params, other_state.method_state),
    rtol=1e-5,
    atol=1e-5,
  )
  # What is watched is that of the whole batch too.
  chex.assert_trees_all_close(history, other_history, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'name, options',
  [
    _slow('dino', dict(num_devices=2, grad_accum_steps=2, mode='pmap')),
    _slow('cmd', dict(num_devices=8, fsdp=True)),
    _slow('cmd', dict(num_devices=8, num_slices=2, fsdp=True)),
    ('dino', dict(num_devices=4, num_slices=2, fsdp=True)),
    _slow('cmd', dict(num_devices=2, grad_accum_steps=2)),
    _slow('cmd_released', dict(grad_accum_steps=2)),
    _slow('esvit', dict(grad_accum_steps=8)),
    _slow('dino', dict(num_devices=4, grad_accum_steps=2)),
  ],
)
def test_spread_states_and_parts_of_a_batch_change_nothing(name, options):
  _, whole = _whole_batch_on_one_device(name)
  step, state = tiny.make_step(name, optimizer=_sgd(), **options)
  _assert_equal_runs(whole, tiny.run_steps(step, state, 2))


def test_parts_of_a_batch_need_less_memory_and_change_nothing():
  whole, run = _whole_batch_on_one_device('dino')
  parts, state = _compile('dino', grad_accum_steps=4)
  _assert_equal_runs(run, tiny.run_steps(parts, state, 2))
  temporary = [
    step.memory_analysis().temp_size_in_bytes for step in (whole, parts)
  ]
  assert temporary[1] < 0.5 * temporary[0]


def test_a_device_keeps_its_share_of_the_state_and_nothing_changes():
  step, state = tiny.make_step(
    'dino', optimizer=_sgd(), num_devices=4, fsdp=True, grad_accum_steps=2
  )
  batch = tiny.make_batch()
  compiled = sharding.compile_ahead(step, state, batch, jax.random.key(1))
  wanted = jax.tree.map(lambda x: x.sharding, state)
  for layout in (
    compiled.input_shardings[0][0],
    compiled.output_shardings[0],
  ):
    for layout_of, want, x in zip(
      *map(jax.tree.leaves, (layout, wanted, state)), strict=True
    ):
      assert layout_of.is_equivalent_to(want, x.ndim)
  shares = sharding.bytes_per_device(state)
  assert shares < sum(x.nbytes for x in jax.tree.leaves(state)) / 3
  num_bytes = shares + sum(x.nbytes for x in jax.tree.leaves(batch)) / 4
  arguments = compiled.memory_analysis().argument_size_in_bytes
  assert arguments == pytest.approx(num_bytes, rel=0.02)
  _, whole = _whole_batch_on_one_device('dino')
  _assert_equal_runs(whole, tiny.run_steps(compiled, state, 2))


def test_steps_of_one_call_are_those_of_as_many_calls():
  _, (one, history) = _whole_batch_on_one_device('dino')
  step, state = _compile('dino', several=True)
  # Three batches, the last of which is not for now.
  batches = _stack([tiny.make_batch(n) for n in (0, 1, 7)])
  state, metrics = step(
    state, MultiStepBatch(batches, np.int32(2)), jax.random.key(1)
  )
  assert int(state.step) == 2
  metrics = jax.device_get(metrics)
  assert all(value[2] == 0 for value in metrics.values())
  other_history = [
    {name: value[i] for name, value in metrics.items()} for i in range(2)
  ]
  _assert_equal_runs((one, history), (jax.device_get(state), other_history))


def _train_partly(encoder, **partly):
  is_frozen = partial.make_is_frozen(
    tiny.make_tiny_encoder(encoder),
    **dict(train_last_blocks=-1, lora_rank=0) | partly,
  )
  rank = partly.get('lora_rank', 0)
  step, state = tiny.make_step(
    'esvit',
    encoder=encoder,
    is_frozen=is_frozen,
    lora=dict(rank=rank, alpha=2.0),
  )
  before = jax.device_get((state.params, state.teacher_params))
  stats = {
    name: jax.device_get(state.method_state[name])
    for name in ('student_stats', 'teacher_stats')
    if name in state.method_state
  }
  opt_state = jax.eval_shape(lambda x: x, state.opt_state)
  after, _ = tiny.run_steps(step, state, 2)
  students = _moved(before[0], after.params)
  for name, old in stats.items():
    changed = {path[1] for path in _moved(old, after.method_state[name])}
    # The running statistics of frozen layers stand still as well.
    assert changed <= {path[1] for path in students if path[0] == 'encoder'}
    assert bool(changed) == (partly.get('train_last_blocks', 0) > 0)
  # The teacher follows: what stands still is equal to the bit.
  assert _moved(before[1], after.teacher_params) == students
  return students, opt_state


@pytest.mark.parametrize(
  'encoder, num_blocks, moving',
  [
    ('vit', 1, {'block_1', 'norm'}),
    _slow('swin', 2, {'stage_1_block_0', 'stage_1_block_1', 'norm'}),
    ('resnet', 1, {'layer4_0'}),
    _slow('resnet', 0, set()),
    _slow('vit', 0, set()),
  ],
)
def test_only_the_last_blocks_are_trained(encoder, num_blocks, moving):
  moved, _ = _train_partly(encoder, train_last_blocks=num_blocks)
  assert {path[1] for path in moved if path[0] == 'encoder'} == moving
  assert {path[0] for path in moved} - {'encoder'} == {
    'image_head',
    'region_head',
  }


@pytest.mark.parametrize('encoder', ['vit', _slow('swin')])
def test_adapters_are_trained_in_place_of_the_encoder(encoder):
  moved, opt_state = _train_partly(encoder, lora_rank=3)
  assert {path[0] for path in moved} == {'lora', 'image_head', 'region_head'}
  adapted = {path[2:-1] for path in moved if path[0] == 'lora'}
  assert adapted == {
    ('attn', 'qkv'),
    ('attn', 'proj'),
    ('mlp', 'fc1'),
    ('mlp', 'fc2'),
  }
  # The frozen encoder has no moments.
  num_encoder = sum(
    x.size
    for x in jax.tree.leaves(
      tiny.make_step('dino', encoder=encoder)[1].params['encoder']
    )
  )
  moments = sum(x.size for x in jax.tree.leaves(opt_state))
  assert moments < 2 * num_encoder


def test_state_has_no_device_axis_under_pmap():
  step, state = tiny.make_step('cmd', mode='pmap', num_devices=8)
  shapes = jax.tree.map(jnp.shape, state)
  state, metrics = step(state, tiny.make_batch(), jax.random.key(1))
  assert jax.tree.map(jnp.shape, state) == shapes
  assert metrics['loss'].shape == ()


# CMD has the terms of EsViT, and tests/parity trains by those released.
@pytest.mark.parametrize(
  'name', ['cmd', 'dino', _slow('esvit'), _slow('cmd_released')]
)
def test_metrics_name_every_term_and_add_up(name):
  step, state = tiny.make_step(name)
  _, (metrics,) = tiny.run_steps(step, state, 1)
  method = tiny.make_tiny_method(name)
  terms = {k for k in metrics if k.startswith('loss/')}
  assert terms == {f'loss/{term}' for term in tiny.inside(method).terms}
  total = sum(
    float(term.weight(0)) * metrics[f'loss/{key}']
    for key, term in tiny.inside(method).terms.items()
  )
  np.testing.assert_allclose(metrics['loss'], total, rtol=1e-5)
  assert 0 < metrics['teacher_entropy'] < np.log(12) + 1e-5
  assert 0 < metrics['feature_spread'] <= 1
  assert metrics['student_teacher_kl'] > 0


@pytest.mark.parametrize('mode', ['jit', _slow('pmap')])
def test_factors_of_all_products_may_be_rounded(monkeypatch, mode):
  monkeypatch.setattr(products, '_LEAST_MULTIPLICATIONS', 0)
  exact = tiny.make_step('cmd', num_devices=8)
  rounded = tiny.make_new_step(
    'cmd', mode=mode, num_devices=8, bfloat16_products=True
  )
  (exact,), (rounded,) = (tiny.run_steps(*x, 1)[1] for x in (exact, rounded))
  for name in ('loss', 'loss/student_bag', 'grad_norm'):
    error = abs(rounded[name] / exact[name] - 1)
    assert 1e-7 < error < 1e-2, name


def test_compiles_once():
  step, state = tiny.make_step('cmd')
  tiny.run_steps(step, state, 4)
  assert step._cache_size() == 1


def test_state_is_donated():
  step, state = tiny.make_step('dino')
  before = jax.tree.leaves(state.params)[0]
  step(state, tiny.make_batch(), jax.random.key(1))
  assert before.is_deleted()


def test_teacher_is_the_moving_average_of_the_new_student():
  step, state = tiny.make_step('dino')
  teacher = jax.device_get(state.teacher_params)
  new_state, _ = tiny.run_steps(step, state, 1)
  jax.tree.map(
    lambda old, student, new: np.testing.assert_allclose(
      new, 0.9 * old + 0.1 * student, rtol=1e-5, atol=1e-7
    ),
    teacher,
    new_state.params,
    new_state.teacher_params,
  )


def test_last_layer_waits_for_its_first_step():
  step, state = tiny.make_step('cmd')
  start = jax.device_get(state.params)
  (after_one, _) = tiny.run_steps(step, state, 1)
  step, state = tiny.make_step('cmd')
  (after_two, _) = tiny.run_steps(step, state, 2)
  for head in ('image_head', 'region_head'):
    before = start[head]['last_layer']['weight_v']
    np.testing.assert_array_equal(
      after_one.params[head]['last_layer']['weight_v'], before
    )
    assert np.any(after_two.params[head]['last_layer']['weight_v'] != before)


def test_same_seed_same_bits_and_another_seed_another_run():
  step, state = tiny.make_step('cmd')
  first, _ = tiny.run_steps(step, state)
  _, state = tiny.make_step('cmd')
  second, _ = tiny.run_steps(step, state)
  chex.assert_trees_all_equal(first, second)
  _, state = tiny.make_step('cmd')
  _, metrics = step(state, tiny.make_batch(), jax.random.key(2))
  _, state = tiny.make_step('cmd')
  _, other = step(state, tiny.make_batch(), jax.random.key(1))
  assert float(metrics['loss']) != float(other['loss'])


def test_batch_that_the_devices_cannot_share_is_refused():
  mesh = sharding.make_mesh(8)
  with pytest.raises(errors.UserError, match='12.*8 devices.*8 or 16'):
    sharding.check_batch_size(12, mesh)
  sharding.check_batch_size(16, mesh)


def test_more_devices_than_there_are_is_refused():
  with pytest.raises(errors.UserError, match='num_devices is 99'):
    sharding.make_mesh(99)


def test_unknown_mode_lists_the_modes():
  with pytest.raises(errors.UserError, match='jit, pmap'):
    sharding.compile_step(
      lambda axis_name, mesh: None, mode='xmap', mesh=sharding.make_mesh(1)
    )
