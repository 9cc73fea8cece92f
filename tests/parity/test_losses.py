"""The terms of the losses against the released DINOLoss and DDINOLoss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.losses import blockwise
from cmd_jax.losses import dino as losses
from cmd_jax.losses import esvit as esvit_losses
from cmd_jax.methods import distillation, features, networks
from cmd_jax.models.heads import PrototypeWeights
from cmd_jax.optim import schedules
from tests import tiny
from tests.parity import golden

# Epochs whose teacher temperature the fixtures have.
EPOCHS = (0, 5)


def _temperature(epoch):
  schedule = schedules.stepwise_schedule(0.04, 0.07, 10, 1)
  return schedule(jnp.int32(epoch))


def _split_crops(rows, batch, counts):
  """Crop-major rows as [B, V, N, D] for each size of crops.

  Args:
    rows: [sum of crops * batch * patches, D].
    batch: B.
    counts: (crops, patches) of each size.
  """
  groups, start = [], 0
  for crops, patches in counts:
    size = crops * batch * patches
    group = rows[start : start + size].reshape(crops, batch, patches, -1)
    groups.append(group.swapaxes(0, 1))
    start += size
  assert start == len(rows)
  return groups


def _join_crops(groups):
  """The inverse of `_split_crops`."""
  return np.concatenate(
    [
      np.asarray(group).swapaxes(0, 1).reshape(-1, group.shape[-1])
      for group in groups
    ]
  )


_match_tokens = jax.jit(esvit_losses.match_tokens)


class _Case:
  """One call of the released loss object, as outputs of our networks."""

  def __init__(self, fixture, call):
    self.batch = int(fixture['in/batch'])
    local = int(fixture['in/ncrops']) - 2
    patches = [int(count) for count in fixture['in/student_npatch']]
    self.crops = [(2, 1), (local, 1)]
    self.tokens = [(2, patches[0]), (local, patches[1])]

    def read(name, counts):
      return _split_crops(fixture[f'in/{name}'][call], self.batch, counts)

    self.student_cls = [x[:, :, 0] for x in read('student_cls', self.crops)]
    self.student_region = read('student_region', self.tokens)
    self.features = read('student_fea', self.tokens)
    (teacher_cls,) = read('teacher_cls', self.crops[:1])
    (teacher_region,) = read('teacher_region', self.tokens[:1])
    (teacher_features,) = read('teacher_fea', self.tokens[:1])
    self.targets = features.TeacherFeatures(
      embedding=teacher_features.mean(2),
      image_bottleneck=jnp.array(teacher_cls[:, :, 0]),
      region_bottleneck=jnp.array(teacher_region),
      matches=tuple(_match_tokens(x, teacher_features) for x in self.features),
    )

  def num_bytes(self):
    """Of all logits."""
    arrays = (
      *self.student_cls,
      *self.student_region,
      self.targets.image_bottleneck,
      self.targets.region_bottleneck,
    )
    return sum(x.nbytes for x in arrays)


def _mean_loss(method, num_bytes, student, targets, state, temperature):
  """The loss and its terms, streamed in blocks of some bytes of logits."""
  cls, region = student
  # Features whose logits they are themselves.
  weights = PrototypeWeights(jnp.eye(64), None)
  prototypes = networks.Prototypes(weights, weights)
  centres = {name: state[f'{name}_centre'] for name in ('image', 'region')}
  output = distillation.ForwardOutput(
    features.StudentFeatures(tuple(cls), tuple(region), (), None),
    targets,
    prototypes,
    features.TeacherContext(prototypes, centres, temperature),
    {},
  )
  loss, values = tiny.inside(method).mean_loss(
    output, 0, blockwise.Budget(num_bytes, 2**30)
  )
  return loss, jax.tree.map(jnp.mean, values)


@functools.partial(jax.jit, static_argnames=('name', 'num_bytes'))
def _call(name, num_bytes, student, targets, state, temperature):
  """Values, loss, gradients and the next state: one program a method."""
  method = tiny.make_tiny_method(name, num_prototypes=64)
  (loss, reported), gradients = jax.value_and_grad(
    lambda student: _mean_loss(
      method, num_bytes, student, targets, state, temperature
    ),
    has_aux=True,
  )(student)
  state = {
    name: losses.update_centre(
      state[name], logits, momentum=0.9, axis_name=None
    )
    for name, logits in (
      ('image_centre', targets.image_bottleneck),
      ('region_centre', targets.region_bottleneck),
    )
  }
  return reported[0], loss, gradients, state


def _run(name, fixture, epoch):
  """Yields term values, loss, gradients and state of each call."""
  temperature = _temperature(epoch)
  np.testing.assert_allclose(
    temperature, fixture[f'e{epoch}/teacher_temp'], rtol=1e-6
  )
  state = {
    name: np.zeros(64, np.float32) for name in ('image_centre', 'region_centre')
  }
  for call in range(3):
    case = _Case(fixture, call)
    student = (case.student_cls, case.student_region)
    # A quarter of the prototypes at a time.
    values, loss, gradients, state = _call(
      name, case.num_bytes() // 4, student, case.targets, state, temperature
    )
    yield values, loss, gradients, state


# Released components by our terms' names.
_TERMS = {
  'image': 'L_I_view',
  'region': 'L_R_region',
  'student_bag': 'L_md_student',
  'teacher_bag': 'L_md_teacher',
}


def _check(name, fixture, epoch, prefix, region_tolerance):
  """Compares a method with the released numbers below `prefix`."""

  def stored(name):
    # What does not differ between the variants is stored once.
    own, shared = f'e{epoch}/{prefix}{name}', f'e{epoch}/{name}'
    return fixture[own if own in fixture else shared]

  def check_gradient(ours, name, tolerance):
    theirs = stored(name)[call]
    atol = tolerance * np.abs(theirs).max()
    np.testing.assert_allclose(_join_crops(ours), theirs, rtol=0, atol=atol)

  for call, (values, loss, gradients, state) in enumerate(
    _run(name, fixture, epoch)
  ):
    np.testing.assert_allclose(loss, stored('loss')[call], rtol=1e-5)
    for term, value in values.items():
      np.testing.assert_allclose(value, stored(_TERMS[term])[call], rtol=1e-5)
    cls, region = gradients
    cls = [x[:, :, None] for x in cls]
    check_gradient(cls, 'grad_student_cls', 1e-5)
    check_gradient(region, 'grad_student_region', region_tolerance)
    for centre, key in (
      ('image_centre', 'center'),
      ('region_centre', 'center_grid'),
    ):
      np.testing.assert_allclose(
        state[centre], stored(key)[call + 1], atol=1e-6
      )


@golden.fixtures('cmd_loss')
@pytest.mark.parametrize('epoch', EPOCHS)
def test_released_cmd_where_it_is_defined(fixture, epoch):
  _check('cmd_released', fixture, epoch, '', 1e-5)


@golden.fixtures('cmd_loss')
@pytest.mark.parametrize('epoch', EPOCHS)
def test_esvit_is_cmd_without_the_cross_level_terms(fixture, epoch):
  _check('esvit', fixture, epoch, 'nomd_', 1e-5)


@golden.fixtures('cmd_loss_signed')
@pytest.mark.parametrize('epoch', EPOCHS)
def test_released_cmd_masked_where_it_is_undefined(fixture, epoch):
  # The program itself gives NaN here; log r is steep near 0.
  assert np.isnan(fixture[f'e{epoch}/official_loss']).all()
  _check('cmd_released', fixture, epoch, 'masked/', 2e-4)


@golden.fixtures('cmd_loss_signed')
@pytest.mark.parametrize('epoch', EPOCHS)
def test_esvit_with_signed_logits(fixture, epoch):
  _check('esvit', fixture, epoch, 'nomd/', 1e-5)


def _loop_over_pairs(case):
  """(teacher view, group, view in group) in the released order."""
  for u in range(2):
    for v in range(2 + case.crops[1][0]):
      if u != v:
        yield u, int(v >= 2), v - 2 * int(v >= 2)


@golden.fixtures('cmd_loss*')
def test_every_token_is_matched_to_the_same_teacher_token(fixture):
  prefix = 'e0/' if 'e0/match' in fixture else 'e0/masked/'
  for call in range(3):
    case = _Case(fixture, call)
    ours = [
      np.asarray(case.targets.matches[group][:, u, v]).ravel()
      for u, group, v in _loop_over_pairs(case)
    ]
    np.testing.assert_array_equal(
      np.concatenate(ours), fixture[f'{prefix}match'][call]
    )


@golden.fixtures('dino_loss')
@pytest.mark.parametrize('epoch', EPOCHS)
def test_dino(fixture, epoch):
  batch, temperature = int(fixture['in/batch']), _temperature(epoch)
  centre = jnp.zeros(64)

  @jax.jit
  def run(student, teacher, centre):
    loss, gradient = jax.value_and_grad(loss_fn)(student, teacher, centre)
    centre = losses.update_centre(centre, teacher, momentum=0.9, axis_name=None)
    return loss, gradient, centre

  def loss_fn(student, teacher, centre):
    def views(rows):
      return rows.reshape(-1, batch, 64).swapaxes(0, 1)

    return losses.image_loss(
      jax.nn.softmax((views(teacher) - centre) / temperature),
      views(student) / 0.1,
      jax.nn.logsumexp(views(student) / 0.1, axis=-1),
    ).mean()

  for call in range(3):
    loss, gradient, centre = run(
      fixture['in/student'][call], fixture['in/teacher'][call], centre
    )
    np.testing.assert_allclose(loss, fixture[f'e{epoch}/loss'][call], rtol=1e-5)
    theirs = fixture[f'e{epoch}/grad_student'][call]
    np.testing.assert_allclose(
      gradient, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0
    )
    np.testing.assert_allclose(
      centre, fixture[f'e{epoch}/center'][call + 1], atol=1e-6
    )
