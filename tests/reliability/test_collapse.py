import jax
import jax.numpy as jnp
import pytest

from cmd_jax.config import choices
from cmd_jax.data.augment import multi_crop
from cmd_jax.methods import make_method
from cmd_jax.optim import optimizers
from cmd_jax.training.collapse import SIGNS, CollapseWatch
from cmd_jax.training.state import init_train_state
from cmd_jax.training.step import make_train_step
from tests import tiny

_PROTOTYPES = 12
_HEALTHY = {
  'teacher_entropy': 1.5,
  'student_teacher_kl': 0.5,
  'feature_spread': 0.7,
  'part_spread': 0.5,
  'centre_norm': 0.6,
  'teacher_temperature': 0.04,
}


def _watch(**changes):
  fields = dict(num_prototypes=_PROTOTYPES, total_steps=100)
  return CollapseWatch(**fields | changes)


def _make_step(temperature, centre_momentum):
  """A step that is too fast for its targets, and its first state."""
  method = make_method(
    encoder=tiny.make_tiny_encoder(drop_path=0.0),
    image_px=16,
    head=dict(num_prototypes=_PROTOTYPES, hidden_dim=16, bottleneck_dim=8),
    student_temperature=0.1,
    teacher_temperature=lambda step: temperature,
    centre_momentum=centre_momentum,
    teacher_normalisation='centring',
    axis_name=None,
    lora=tiny.NO_LORA,
    **choices.method_fields('dino').to_dict(),
  )
  optimizer = optimizers.make_adamw(
    learning_rate=lambda step: 1e-2, weight_decay=lambda step: 0.0
  )
  step = make_train_step(
    method=method,
    augment=multi_crop.make_augment(global_px=16, local_px=8, num_local=0),
    optimizer=optimizer,
    teacher_momentum=lambda step: 0.5,
    schedules={'teacher_temperature': lambda step: temperature},
  )

  @jax.jit
  def init():
    return init_train_state(method, optimizer, jax.random.key(0))

  return step, init


@jax.jit
def _step(state, batch, temperature, centre_momentum):
  # Compiled once for both collapses.
  step, _ = _make_step(temperature, centre_momentum)
  return step(state, batch, jax.random.key(1))


def _train(temperature, centre_momentum, num_steps):
  """Metrics of each step."""
  fields = jnp.float32(temperature), jnp.float32(centre_momentum)
  state = _make_step(*fields)[1]()
  for number in range(num_steps):
    state, metrics = _step(state, tiny.make_batch(number), *fields)
    yield {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize(
  'kind, temperature, centre_momentum, advice',
  [
    # Without centring one prototype wins by the slightest lead.
    pytest.param(
      *('one_prototype', 0.002, 1.0, 'centre_momentum'),
      marks=pytest.mark.slow,
    ),
    # Without sharpening all become equal.
    ('uniform', 1.0, 0.9, 'lower config.teacher.temperature'),
  ],
)
def test_both_collapses_are_told_when_they_happen(
  kind, temperature, centre_momentum, advice
):
  watch, found = _watch(total_steps=70), {}
  for step, metrics in enumerate(_train(temperature, centre_momentum, 70), 1):
    found |= {x['kind']: x for x in watch.look(step, metrics)}
  assert kind in found
  # They are not each other.
  assert len(found.keys() & {'uniform', 'one_prototype'}) == 1
  assert advice in found[kind]['text']
  assert 'teacher_entropy' in found[kind]['text']


@pytest.mark.parametrize(
  'kind, bad',
  [
    ('uniform', {'teacher_entropy': 2.484, 'student_teacher_kl': 0.001}),
    ('one_prototype', {'teacher_entropy': 1e-3, 'student_teacher_kl': 1e-3}),
    ('centre', {'centre_norm': 0.99999}),
    ('features', {'feature_spread': 0.05}),
    ('parts', {'part_spread': 0.05}),
  ],
)
def test_each_kind_is_told_once_and_only_where_it_lasts(kind, bad):
  bad = _HEALTHY | bad
  watch = _watch()
  steps = [*range(1, 6)], [*range(6, 15)], [15], [*range(16, 60)]
  # Early on, and not long enough; then for good.
  for numbers, metrics in zip(steps, (bad, bad, _HEALTHY, bad), strict=True):
    told = [x for n in numbers for x in watch.look(n, metrics)]
    assert len(told) == (len(numbers) > 20)
  assert (told[0]['kind'], told[0]['step']) == (kind, 25)
  assert 'since step 16' in told[0]['text']
  assert 'config.' in told[0]['text']
  known = _watch(known=[kind])
  assert not any(known.look(step, bad) for step in range(1, 60))


def test_what_only_looks_like_a_collapse_is_not_told():
  watch = _watch()
  for step in range(1, 99):
    for sharp in ({'teacher_entropy': 0.01}, {'student_teacher_kl': 0.001}):
      assert not watch.look(step, _HEALTHY | sharp)
    # Methods without prototypes or parts have none of these.
    assert not watch.look(step, {'loss': 1.0})
    assert not watch.look(step, {'feature_spread': float('nan')})
  assert {'uniform', 'one_prototype'} <= SIGNS.keys()
