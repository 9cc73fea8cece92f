"""Three iterations of both released PARTICLE programs by our own train step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cmd_jax.convert import resnet
from cmd_jax.methods import make_method
from cmd_jax.models.resnet import make_resnet
from cmd_jax.optim import optimizers, schedules
from tests.parity import golden, particle_runs, small
from tests.parity.particle_runs import STEPS, from_sequential, mlp_entries
from tests.tiny import NO_LORA

two_ways = pytest.mark.parametrize(
  'mode', ['jit', pytest.param('pmap', marks=pytest.mark.slow)]
)


def _make_method(encoder, mlp, axis_name, **fields):
  return make_method(
    'particle',
    encoder=encoder,
    head=dict(
      num_prototypes=64,
      hidden_dim=96,
      bottleneck_dim=24,
      norm_last_layer=False,
    ),
    projector=dict(mlp, output_dim=16),
    predictor=mlp,
    temperature=0.1,
    local_negatives=True,
    match_empty_parts=True,
    lora=NO_LORA,
    student_temperature=0.1,
    teacher_temperature=schedules.stepwise_schedule(0.04, 0.07, 4, STEPS),
    teacher_normalisation='centring',
    centre_momentum=0.9,
    axis_name=axis_name,
    **fields,
  )


def _resnet_recipe(fixture):
  lr, momentum, weight_decay, limit = fixture['in/lr_momentum_wd_emadecay']
  encoder = make_resnet(variant='Mu').clone(dtype=jnp.float64)

  def make_method(axis_name):
    return _make_method(
      encoder.clone(axis_name=axis_name),
      dict(hidden_dim=32, initialisation='torch'),
      axis_name,
      weights=dict(parts=1.0),
      num_parts=5,
      num_samples=3,
      image_px=64,
    )

  return particle_runs.Recipe(
    make_method,
    optimizers.make_sgd(
      learning_rate=lambda step: lr,
      weight_decay=lambda step: weight_decay,
      momentum=momentum,
    ),
    schedules.ramped_ema_decay(limit),
    {
      'encoder': particle_runs.with_prefix('encoder.', resnet.entries(encoder)),
      'projector': mlp_entries('projector.'),
      'predictor': mlp_entries('predictor.'),
    },
  )


def _vit_recipe(fixture):
  network = small.make_small('vit', regions=False)

  def make_method(axis_name):
    return _make_method(
      network.encoder,
      dict(hidden_dim=64, initialisation='normal'),
      axis_name,
      weights=dict(image=1.0, parts=1.0),
      num_parts=10,
      num_samples=6,
      image_px=32,
    )

  def stored(name):
    return lambda step: jnp.array(fixture[f'in/{name}'])[step]

  return particle_runs.Recipe(
    make_method,
    optimizers.make_adamw(
      learning_rate=stored('lr'),
      weight_decay=stored('wd'),
      clip_norm=float(fixture['in/clip_grad']),
      waits=optimizers.Waits(last_layer_steps=STEPS),
      is_clipped=lambda path: path[0] != 'predictor',
      decay_vectors=True,
    ),
    stored('momentum'),
    {
      'encoder': particle_runs.with_prefix(
        'student/backbone.', network.tables['encoder']
      ),
      'image_head': particle_runs.with_prefix(
        'student/', network.tables['image_head']
      ),
      'projector': mlp_entries('student/backbone.projector.'),
      'predictor': mlp_entries('predictor/'),
    },
  )


def _network_and_predictor(fixture, step):
  tensors = fixture.under(f'network{step}/')
  for name, tensor in fixture.under(f'predictor{step}/').items():
    tensors[f'predictor.{name}'] = tensor
  return from_sequential(tensors)


def _check(ours, theirs):
  assert theirs
  for name, expected in theirs.items():
    np.testing.assert_allclose(
      ours[name], expected, rtol=1e-4, atol=2e-5, err_msg=name
    )


def _max_pool(x, window_shape, strides, padding):
  """`nn.max_pool` whose gradient goes to the first of equal values.

  Weights and images of the fixture lie on a coarse grid, so in a window in 700
  of the first pool two positions are equal. The released program's gradient
  goes to the first; ours too, unless the normalisation before, compiled for
  some processor or number of devices, rounds equal inputs differently.
  """
  height, width = (
    (size + sum(pad) - window) // stride + 1
    for size, pad, window, stride in zip(
      x.shape[1:3], padding, window_shape, strides
    )
  )
  padded = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-jnp.inf)
  window = jnp.stack(
    [
      padded[
        :,
        row : row + strides[0] * height : strides[0],
        column : column + strides[1] * width : strides[1],
      ]
      for row in range(window_shape[0])
      for column in range(window_shape[1])
    ]
  )
  first = jnp.argmax(window > window.max(0) - 1e-12, axis=0)
  return jnp.take_along_axis(window, first[None], axis=0)[0]


@golden.fixtures('particle_resnet_train_3steps')
def test_the_first_pool_of_the_resnet_program_has_ties(fixture):
  kernel = fixture['network0/encoder.0.weight']
  images = fixture['in/images1'][0]
  x = jax.lax.conv_general_dilated(images, kernel, (2, 2), [(3, 3)] * 2)
  windows = jax.lax.conv_general_dilated_patches(
    x, (3, 3), (2, 2), [(1, 1)] * 2, precision=jax.lax.Precision.HIGHEST
  )
  windows = windows.reshape(len(x), x.shape[1], 9, -1)
  # The extreme of a channel, which a negative scale of the normalisation turns
  # round.
  sign = np.sign(fixture['network0/encoder.1.weight'])[:, None, None]
  second, best = jnp.moveaxis(jnp.sort(windows * sign, 2)[:, :, -2:], 2, 0)
  ties = int((best == second).sum())
  assert 0 < ties < 0.005 * best.size
  # Between a tie and rounding there is nothing.
  assert ((best == second) | (best - second > 1e-4)).all()


@pytest.fixture
def in_float64(monkeypatch):
  """Float64 in which no rounding decides between equal values of a pool."""
  monkeypatch.setattr(nn, 'max_pool', _max_pool)
  with jax.enable_x64(True):
    yield


# The ViT's is jitted, and tests/training sees statistics of a jitted ResNet.
@golden.fixtures('particle_resnet_train_3steps')
@pytest.mark.parametrize(
  'mode', [pytest.param('jit', marks=pytest.mark.slow), 'pmap']
)
@pytest.mark.usefixtures('in_float64')
def test_the_resnet_program(fixture, mode):
  recipe = _resnet_recipe(fixture)
  start = _network_and_predictor(fixture, 0)
  for number, (state, gradients, metrics) in enumerate(
    particle_runs.train(recipe, fixture, start, mode=mode, num_devices=2)
  ):
    loss = fixture['out/loss'][number]
    np.testing.assert_allclose(metrics['loss'], loss, rtol=2e-5)
    stats = state.method_state['student_stats']
    jax.tree.map(
      np.testing.assert_array_equal, state.method_state['teacher_stats'], stats
    )
    network = recipe.to_tensors(state.params, stats)
    average = recipe.to_tensors(state.teacher_params, stats)
    if number == 0:
      ours = recipe.to_tensors(gradients, stats)
      _check(ours, from_sequential(fixture.under('grad0/')))
      # Running statistics alone are stored.
      _check(network, from_sequential(fixture.under('network1/')))
  end = _network_and_predictor(fixture, STEPS)
  assert set(network) == set(start) == set(end)
  _check(network, end)
  _check(average, from_sequential(fixture.under('ema3/')))


def _check_vit_state(ours, theirs, reach):
  """At most 1% of the elements differ by 5e-6, none by more than `reach`.

  Ten times the noise: of the program's own states in float32 0.1% are more
  than 5e-7 from those in float64, where a gradient is as small as its rounding
  and Adam divides it by its own size. The keys' third of the bias of qkv has
  no other gradient.
  """
  differing = total = 0
  for name, expected in theirs.items():
    difference = np.abs(ours[name] - expected)
    assert difference.max() <= reach, name
    if name.endswith('attn.qkv.bias'):
      query, _, value = np.split(np.arange(len(expected)), 3)
      difference = difference[np.concatenate([query, value])]
    differing += int((difference > 5e-6).sum())
    total += difference.size
  assert differing <= 0.01 * total, f'{differing} of {total} elements'


def _check_vit_gradients(fixture, step, gradients):
  names = fixture['out/grad_norm_names']
  ours = {name: gradients[f'student/{name}'] for name in names}
  norms = fixture['out/grad_norms'][step]
  np.testing.assert_allclose(
    [np.linalg.norm(ours[name]) for name in names],
    norms,
    rtol=2e-3,
    atol=1e-5 * norms.max(),
  )
  theirs = fixture.under(f'grad_pre_clip{step}/')
  assert set(theirs) == (set(names) if step == 0 else set())
  for name, gradient in theirs.items():
    np.testing.assert_allclose(
      ours[name],
      gradient,
      rtol=2e-3,
      atol=2e-5 * max(np.abs(x).max() for x in theirs.values()),
      err_msg=name,
    )


@golden.fixtures('particle_vit_train_3steps')
@two_ways
def test_the_vit_program(fixture, mode):
  recipe = _vit_recipe(fixture)
  start = fixture.under('state0/')
  for number, (state, gradients, metrics) in enumerate(
    particle_runs.train(recipe, fixture, start, mode=mode, num_devices=2)
  ):
    for ours, theirs in (('image', 'dino'), ('parts', 'detcon')):
      loss = fixture[f'out/loss_{theirs}'][number]
      np.testing.assert_allclose(metrics[f'loss/{ours}'], loss, rtol=5e-5)
    np.testing.assert_allclose(
      state.method_state['image_centre'],
      fixture['out/center'][number, 0],
      rtol=1e-4,
      atol=2e-5,
    )
    _check_vit_gradients(fixture, number, recipe.to_tensors(gradients, {}))
  reach = 2 * float(fixture['in/lr'].sum())
  end = fixture.under('state3/')
  average = {
    name.replace('teacher/', 'student/'): tensor
    for name, tensor in end.items()
    if name.startswith('teacher/')
  }
  student = {k: v for k, v in end.items() if not k.startswith('teacher/')}
  ours = recipe.to_tensors(state.params, {})
  assert set(ours) == set(student) == set(start)
  _check_vit_state(ours, student, reach)
  _check_vit_state(recipe.to_tensors(state.teacher_params, {}), average, reach)


def test_learning_rate_and_moving_average_of_the_resnet_program():
  stored = golden.read_json('particle_schedules.json')
  cosine, average = stored['resnet_cos'], stored['ema_unit_step_response']
  fields = cosine['args']
  warmup, total = (
    fields[name] * fields['iters_per_epoch']
    for name in ('warmup_epochs_hard_coded', 'epochs')
  )
  schedule = schedules.cosine_schedule(
    fields['lr'], 0.0, total, warmup_steps=warmup
  )
  rates = jax.vmap(schedule)(jnp.arange(total))
  # The released warm-up is computed and then not used: until it is over the
  # rate goes up the other half of the cosine, from half the base.
  np.testing.assert_allclose(
    rates[warmup:], cosine['lr'][warmup:], rtol=1e-4, atol=1e-9
  )
  assert rates[0] == 0 < cosine['lr'][0]

  decays = jax.vmap(schedules.ramped_ema_decay(average['decay']))(
    jnp.arange(3000)
  )
  remaining = np.cumprod(np.asarray(decays, np.float64))
  for number, value in average['values_at'].items():
    np.testing.assert_allclose(
      1 - remaining[int(number) - 1], value, rtol=0, atol=1e-6
    )
