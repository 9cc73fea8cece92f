"""The smallest run that has every part: shared by the tests."""

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.config import choices
from cmd_jax.data.augment import multi_crop
from cmd_jax.data.batch import Batch, MultiStepBatch, Views
from cmd_jax.devices import sharding
from cmd_jax.losses import blockwise
from cmd_jax.methods import features, make_method
from cmd_jax.methods.distil import FrozenTeacher
from cmd_jax.models import make_encoder
from cmd_jax.optim import optimizers, schedules
from cmd_jax.training.state import TrainState, state_shardings
from cmd_jax.training.step import make_train_step, multi_step

# Those that see whole images; tests/methods/test_particle.py has the others.
METHODS = ('cmd', 'cmd_released', 'esvit', 'dino')
NO_LORA = dict(rank=0, alpha=1.0)
_NEAR_ONE = ('scale', 'var', 'weight_g', 'gamma')
BATCH = 8
CANVAS_PX = 16


def make_tiny_encoder(
  name='vit', *, drop_path=0.2, axis_name=None, batch_statistics='synchronised'
):
  if name == 'resnet':
    return make_encoder(
      'resnet', variant='Mu', width_ratio=0.25, axis_name=axis_name
    )
  if name == 'efficientnet':
    return make_encoder(
      'efficientnet',
      variant='Mu',
      width_ratio=0.25,
      drop_path_rate=drop_path,
      batch_statistics=batch_statistics,
      axis_name=axis_name,
    )
  if name == 'swin':
    return make_encoder(
      'swin',
      variant='Mu',
      width=8,
      num_heads=(1, 2),
      image_px=16,
      patch_px=2,
      window=2,
      drop_path_rate=drop_path,
    )
  return make_encoder(
    'vit',
    variant='Mu',
    width=16,
    depth=2,
    num_heads=2,
    image_px=16,
    patch_px=4,
    drop_path_rate=drop_path,
  )


def make_tiny_teacher(name='vit', view_px=0):
  """A frozen teacher of method=distil; the ViT has half the student's grid."""
  encoder = make_tiny_encoder(name)
  if name == 'vit':
    encoder = encoder.clone(patch_px=8, patch_stride_px=8, width=12)
  image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), image)
  variables = draw_like(shapes, scale=0.3, seed=2)
  return FrozenTeacher(encoder, variables, view_px)


def make_tiny_method(
  name='cmd',
  *,
  axis_name=None,
  mesh=None,
  drop_path=0.2,
  encoder='vit',
  batch_statistics='synchronised',
  use_bn=False,
  num_prototypes=12,
  **changes,
):
  fields = choices.method_fields(name).to_dict()
  if name == 'cmd':
    fields['mil'] = dict(hidden_dim=8)
  if name == 'simclr':
    fields['projector'].update(hidden_dim=16, output_dim=8)
  if name == 'distil':
    fields.update(teacher=make_tiny_teacher(), queue_size=24)
  if name == 'finetune':
    fields['class_counts'] = (4, 2, 2)
  fields.setdefault('teacher_normalisation', 'centring')
  fields.setdefault('lora', NO_LORA)
  return make_method(
    encoder=make_tiny_encoder(
      encoder,
      drop_path=drop_path,
      axis_name=axis_name,
      batch_statistics=batch_statistics,
    ),
    image_px=16,
    head=dict(
      num_prototypes=num_prototypes,
      hidden_dim=16,
      bottleneck_dim=8,
      use_bn=use_bn,
    ),
    student_temperature=0.1,
    teacher_temperature=schedules.stepwise_schedule(0.04, 0.07, 2, 2),
    centre_momentum=0.9,
    axis_name=axis_name,
    mesh=mesh,
    **fields | changes,
  )


def inside(method):
  """What a method's functions belong to: its terms, and its forward pass."""
  return method.loss.__self__


def encode(method, params, stats, images):
  """What the encoder of a method says of images."""
  encoder = inside(method).networks.encoder
  return jax.jit(encoder.apply)(method.encoder_variables(params, stats), images)


def forward(method, params, teacher, state, views, keys, step=0):
  """What both networks of a method say."""
  return jax.jit(inside(method).forward)(
    params, teacher, state, views, keys, jnp.int32(step)
  )


def compare(method, *args):
  """Everything the terms of a distillation are made of."""
  return compared_of(method, forward(method, *args))


def compared_of(method, output):
  """Everything the terms are made of, from all prototypes at once."""
  distillation = inside(method)
  num_prototypes = distillation.networks.image_head.num_prototypes
  return features.compare(
    output.prototypes,
    output.context,
    output.student,
    output.teacher,
    student_temperature=distillation.setting.student_temperature,
    bags=distillation.bags,
    plan=blockwise.Plan(BATCH, num_prototypes, keeps=False),
  )


def make_batch(seed=0, batch=BATCH):
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (batch, 4, 4, 3), np.uint8)
  return Batch(
    images=jnp.array(
      coarse.repeat(CANVAS_PX // 4, 1).repeat(CANVAS_PX // 4, 2)
    ),
    sizes=jnp.full((batch, 2), CANVAS_PX, jnp.int32),
    index=jnp.arange(batch, dtype=jnp.int32) + 10 * seed,
    labels=jnp.arange(batch, dtype=jnp.int32) % 3,
  )


def normal(*shape, seed=0):
  """Draws of numpy, for which nothing is compiled."""
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw_like(shapes, scale=0.1, seed=0):
  """Arrays of these shapes; compiling what draws the real start takes long.

  Scales and variances are near 1, so that the networks work.
  """
  rng = np.random.default_rng(seed)

  def draw(path, like):
    values = rng.normal(0, scale, like.shape).astype(like.dtype)
    return 1 + np.abs(values) if path[-1].key in _NEAR_ONE else values

  return jax.tree_util.tree_map_with_path(draw, shapes)


def draw_train_state(method, optimizer):
  """A state before the first step, of a drawn student; the teacher is alike."""
  shapes, method_shapes = jax.eval_shape(method.init, jax.random.key(0))
  params = draw_like(shapes)
  method_state = jax.tree_util.tree_map_with_path(
    lambda path, x: np.full(x.shape, path[-1].key == 'var', x.dtype),
    method_shapes,
  )
  return TrainState(
    np.int32(0), params, params, optimizer.init(params), method_state
  )


def make_optimizer(learning_rate=1e-3, **options):
  return optimizers.make_adamw(
    learning_rate=schedules.cosine_schedule(learning_rate, 1e-6, 20),
    weight_decay=schedules.cosine_schedule(0.04, 0.4, 20),
    waits=optimizers.Waits(last_layer_steps=1),
    **options,
  )


def noisy_views(images, sizes, keys, step_key, part_ids, partners):
  """Views drawn by the key of each image, by little of a program.

  The augmentation is a third of what a step takes to compile.
  """
  del sizes, step_key, part_ids, partners
  shape = (2, *images.shape[1:])
  noise = jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)
  views = images[:, None] / 255 - 1 + noise
  return Views(views[:, :, :16, :16], views[:, :, -8:, -8:])


_STEPS = {}


def make_step(name='cmd', **options):
  """A step as `make_new_step` makes it, once for all tests that ask alike.

  Returns:
    The jitted step, and a state that it may consume.
  """
  key = name, repr(sorted(options.items()))
  if key not in _STEPS:
    step, state = make_new_step(name, **options)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    # The options are kept so that no other object gets their addresses.
    _STEPS[key] = options, step, jax.tree.map(np.array, state), shardings
  _, step, state, shardings = _STEPS[key]
  return step, jax.device_put(state, shardings)


def make_new_step(
  name='cmd',
  *,
  mode='jit',
  num_devices=1,
  num_slices=1,
  fsdp=False,
  grad_accum_steps=1,
  several=False,
  skip_non_finite=False,
  optimizer=None,
  augmented=False,
  bfloat16_products=False,
  **changes,
):
  """The jitted step, augmented or of noisy views, and where it starts from."""
  mesh = sharding.make_mesh(num_devices, num_slices=num_slices)
  is_frozen = changes.get('is_frozen', lambda path: False)
  optimizer = optimizer or make_optimizer(is_frozen=is_frozen)
  method = make_tiny_method(name, **changes)
  state = draw_train_state(method, optimizer)
  shardings = state_shardings(state, mesh, fsdp=fsdp, min_size=64)

  def make(axis_name, mesh):
    step = make_train_step(
      method=make_tiny_method(name, axis_name=axis_name, mesh=mesh, **changes),
      augment=multi_crop.make_augment(
        global_px=16, local_px=8, num_local=2, mesh=mesh
      )
      if augmented
      else noisy_views,
      optimizer=optimizer,
      teacher_momentum=schedules.cosine_schedule(0.9, 1.0, 20),
      schedules={},
      axis_name=axis_name,
      mesh=mesh,
      param_shardings=shardings.params if fsdp else None,
      grad_accum_steps=grad_accum_steps,
      skip_non_finite=skip_non_finite,
      bfloat16_products=bfloat16_products,
    )
    return multi_step(step) if several else step

  each, whole = sharding.each_sharded(mesh), sharding.replicated(mesh)
  step = sharding.compile_step(
    make,
    mode=mode,
    mesh=mesh,
    state_shardings=shardings,
    batch_shardings=MultiStepBatch(each, whole) if several else None,
    has_constants=bool(method.constants),
  )
  if method.constants:
    constants = jax.device_put(method.constants, whole)
    return (
      lambda *arguments: step(*arguments, constants),
      jax.device_put(state, shardings),
    )
  return step, jax.device_put(state, shardings)


def run_steps(step, state, count=3):
  """Takes steps and returns the state and each step's metrics on the host."""
  history = []
  for number in range(count):
    state, metrics = step(state, make_batch(number), jax.random.key(1))
    history.append(jax.device_get(metrics))
  return jax.device_get(state), history
