"""The method, the optimiser and the schedules of a run, out of its config."""

from __future__ import annotations

from collections.abc import Callable

import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.losses.prototype_platforms import PLATFORMS
from cmd_jax.methods import make_method
from cmd_jax.methods.base import Method
from cmd_jax.models import make_encoder, partial
from cmd_jax.optim import optimizers, schedules
from cmd_jax.optim.schedules import Schedule

OPTIMIZERS = {'adamw': optimizers.make_adamw, 'sgd': optimizers.make_sgd}


def make_schedules(
  config: ConfigDict, steps_per_epoch: int, total_steps: int
) -> dict[str, Schedule]:
  """The schedules of a run by name."""
  optimizer, teacher = config.optim, config.teacher
  momentum = schedules.ramped_ema_decay(teacher.final_momentum)
  if teacher.momentum_schedule == 'cosine':
    momentum = schedules.cosine_schedule(
      teacher.base_momentum, teacher.final_momentum, total_steps
    )
  named = {
    'learning_rate': schedules.cosine_schedule(
      optimizer.base_learning_rate * config.batch_size / 256,
      optimizer.final_learning_rate,
      total_steps,
      warmup_steps=round(optimizer.warmup_epochs * steps_per_epoch),
    ),
    'weight_decay': schedules.cosine_schedule(
      optimizer.base_weight_decay, optimizer.final_weight_decay, total_steps
    ),
    'teacher_momentum': momentum,
    'teacher_temperature': schedules.stepwise_schedule(
      teacher.warmup_temperature,
      teacher.temperature,
      teacher.warmup_temperature_epochs,
      steps_per_epoch,
    ),
  }
  warmup_steps = round(config.term_warmup_epochs * steps_per_epoch)
  if warmup_steps > 0:
    named['term_warmup'] = schedules.linear_warmup(warmup_steps)
  return named


def resolve_encoder_scale(
  config: ConfigDict, steps_per_epoch: int, total_steps: int
) -> float:
  """The encoder's learning rate as a fraction of the heads'.

  It is config.optim.encoder_scale over so many times config.total_epochs as
  config.min_steps makes: an encoder that is shown a few hundred photographs
  eighty times forgets what ImageNet told it at a rate at which it learns from
  thousands (benchmarks/RESEARCH.md, hypothesis 38).

  Args:
    config: as cmd_jax/config/published.py makes it.
    steps_per_epoch: steps of an epoch.
    total_steps: of the run.
  """
  epochs = total_steps / max(steps_per_epoch, 1)
  return config.optim.encoder_scale / max(epochs / config.total_epochs, 1)


def explain_short_run(
  config: ConfigDict, steps_per_epoch: int, total_steps: int
) -> str | None:
  """Says that a run ends within its warm-up; None if it does not."""
  warmup_steps = round(config.optim.warmup_epochs * steps_per_epoch)
  if total_steps > warmup_steps or not total_steps:
    return None
  named = make_schedules(config, steps_per_epoch, total_steps)
  highest = float(named['learning_rate'](total_steps - 1))
  # The warm-up begins at 0.
  effect = f'rises to {highest:.2g} only' if highest else 'is 0 throughout'
  learns = '' if highest else ' and nothing is learned'
  return (
    f'all {total_steps} step(s) of the run are within the warm-up of '
    f'{warmup_steps}, so that the learning rate {effect}{learns}: raise '
    '--config.total_epochs, lower --config.optim.warmup_epochs or lower '
    '--config.batch_size'
  )


# Published learning rates of weights to go on from are below it.
_FORGETS = 2e-3


def explain_forgetting(config: ConfigDict) -> str | None:
  """Says that a learning rate is one for encoders that are drawn at random."""
  rate = config.optim.base_learning_rate * config.optim.encoder_scale
  if not config.init.path or config.optim.name != 'adamw' or rate <= _FORGETS:
    return None
  return (
    f'the base learning rate of the encoder is {rate:g}, made for one that is '
    'drawn at random: one that knows something forgets it '
    '(config.optim.base_learning_rate, encoder_scale). '
    '--config=NAME:start=pretrained has the recipe for going on'
  )


# Whose terms are of tokens, all or some of them.
_OF_TOKENS = ('esvit', 'cmd', 'detcon', 'particle')


def explain_still_tokens(
  config: ConfigDict, encoder: nn.Module, is_frozen: partial.IsFrozen
) -> str | None:
  """Says that terms of patches train no encoder; None if they do."""
  blocks = config.optim.train_last_blocks
  # Without any block it is heads alone that are asked for.
  is_meant = not blocks or config.lora.rank
  if is_meant or config.method.name not in _OF_TOKENS:
    return None
  if partial.moves_tokens(encoder, is_frozen):
    return None
  return (
    f'config.model.tokens={config.model.tokens} are made before the '
    f'{blocks} blocks of config.optim.train_last_blocks, so that what '
    f'{config.method.name} asks of patches trains no part of the encoder: '
    'choose config.model.tokens=stride32, or train more blocks'
  )


def explain_channels(config: ConfigDict) -> str | None:
  """Says what is left out of the views of other than photographs."""
  channels = config.model.get('channels', 3)
  if channels == 3:
    return None
  return (
    f'config.model.channels is {channels}: saturation, hue and grayscale are '
    'left out of the views, and mean and deviation of the channels are those '
    'of the training images'
  )


def warnings_about(
  config: ConfigDict,
  encoder: nn.Module,
  is_frozen: partial.IsFrozen,
  steps_per_epoch: int,
  total_steps: int,
) -> tuple[str, ...]:
  """What of a config may surprise, a sentence each."""
  epochs = total_steps // max(steps_per_epoch, 1)
  more = None
  if epochs > config.total_epochs:
    more = (
      f'the set is small and is trained on for {epochs} epochs rather than '
      f'config.total_epochs={config.total_epochs}, to take '
      f'config.min_steps={config.min_steps}'
    )
    if config.optim.encoder_scale != 1:
      scale = resolve_encoder_scale(config, steps_per_epoch, total_steps)
      more += (
        f", the encoder at {scale:.3g} of the heads' learning rate rather than "
        f'config.optim.encoder_scale={config.optim.encoder_scale:g}'
      )
  said = (
    more,
    explain_short_run(config, steps_per_epoch, total_steps),
    explain_forgetting(config),
    explain_still_tokens(config, encoder, is_frozen),
    explain_channels(config),
  )
  return tuple(x for x in said if x)


def check_parallel(config: ConfigDict, num_devices: int, platform: str) -> None:
  """Refuses layouts of state and steps that cannot be.

  Args:
    config: as cmd_jax/config/published.py makes it.
    num_devices: that share the batch.
    platform: of these, as JAX names it.

  Raises:
    UserError: the field that stands in the way.
  """
  fields = config.parallel
  sharding.check_state(fields.state, fields.mode)
  if fields.num_slices > 1 and fields.mode != 'jit':
    raise UserError(
      f'config.parallel.num_slices is {fields.num_slices}, which '
      f'config.parallel.mode={fields.mode} cannot do: set '
      'config.parallel.mode=jit'
    )
  if fields.steps_per_dispatch > 1 and fields.mode != 'jit':
    raise UserError(
      f'config.parallel.steps_per_dispatch is {fields.steps_per_dispatch}, '
      f'which config.parallel.mode={fields.mode} cannot do: set '
      'config.parallel.mode=jit'
    )
  if fields.kernels == 'pallas' and platform not in PLATFORMS:
    raise UserError(
      f'config.parallel.kernels=pallas has none for a {platform}: use auto'
    )
  if fields.grad_accum_steps > 1:
    _check_grad_accum(config, num_devices)


def _check_grad_accum(config: ConfigDict, num_devices: int) -> None:
  """Refuses what is not for parts of a batch as it is for the whole."""
  steps = config.parallel.grad_accum_steps
  field = f'config.parallel.grad_accum_steps is {steps}'
  share = config.batch_size // num_devices
  # By a head and a teacher's logits; `check_accumulates` refuses the others.
  weights = config.method.get('weights', {})
  learns_images = (
    'image' in weights
    and 'parts' not in weights
    and 'teacher' not in config.method
  )
  if share % steps:
    divisors = [str(n) for n in range(1, share + 1) if not share % n]
    raise UserError(
      f'{field}, which does not divide the {share} images of each of '
      f'{num_devices} device(s): use one of {", ".join(divisors)}, or another '
      'config.batch_size'
    )
  for is_so, of_batch, instead in (
    (
      learns_images and config.teacher.normalisation == 'sinkhorn',
      'config.teacher.normalisation=sinkhorn balances the whole batch',
      'config.teacher.normalisation=centring',
    ),
    (
      config.model.name == 'resnet',
      'config.model.name=resnet normalises by the whole batch',
      'a vit or swin',
    ),
    (
      config.model.get('batch_statistics') == 'synchronised',
      'config.model.batch_statistics=synchronised are of the whole batch',
      'config.model.batch_statistics=frozen',
    ),
    (
      learns_images and config.head.use_bn,
      'config.head.use_bn=True normalises by the whole batch',
      'config.head.use_bn=False',
    ),
  ):
    if is_so:
      raise UserError(
        f'{field}, but {of_batch}: use {instead}, or 1 and more devices'
      )


def check_accumulates(config: ConfigDict, method: Method) -> None:
  """Refuses microbatches for a method that compares the images of a batch.

  Raises:
    UserError: config.parallel.grad_accum_steps and the method.
  """
  steps = config.parallel.grad_accum_steps
  if steps > 1 and not method.is_mean_over_examples:
    raise UserError(
      f'config.parallel.grad_accum_steps is {steps}, but '
      f'config.method.name={config.method.name} compares all images of a '
      'batch: use 1 and more devices, or a method such as cmd or dino'
    )


def has_bfloat16_products(config: ConfigDict, platform: str) -> bool:
  """Whether products alone are bfloat16, and all that is computed float32.

  It is the faster half of bfloat16 on a CPU (benchmarks/README.md).

  Args:
    config: as cmd_jax/config/published.py makes it.
    platform: of the devices that train.
  """
  return platform == 'cpu' and config.model.dtype == 'bfloat16'


def make_method_maker(
  config: ConfigDict,
  named: dict[str, Schedule],
  is_frozen: partial.IsFrozen,
  *,
  platform: str,
  **made,
) -> Callable[[str | None, Mesh | None], Method]:
  """A function that builds the method, for one device or for global arrays.

  Args:
    config: as cmd_jax/config/published.py makes it.
    named: from `make_schedules`.
    is_frozen: path of a parameter -> whether it stays as it is.
    platform: of the devices that train.
    **made: arguments of the method that the config does not have, or in place
      of those that it has.

  Returns:
    (axis over which the batch is spread or None, devices over which global
    arrays are spread or None) -> `Method`.

  Raises:
    UserError: when it is called, for what the factories of encoders and methods
      refuse.
  """
  model = config.model.to_dict()
  if has_bfloat16_products(config, platform):
    model['dtype'] = 'float32'

  def make(axis_name: str | None, mesh: Mesh | None) -> Method:
    return make_method(
      encoder=make_encoder(
        axis_name=axis_name, device=mesh and mesh.devices.flat[0], **model
      ),
      image_px=config.augment.global_px,
      head=config.head.to_dict(),
      student_temperature=config.student_temperature,
      teacher_temperature=named['teacher_temperature'],
      centre_momentum=config.teacher.centre_momentum,
      teacher_normalisation=config.teacher.normalisation,
      axis_name=axis_name,
      mesh=mesh,
      lora=config.lora.to_dict(),
      is_frozen=is_frozen,
      term_warmup=named.get('term_warmup'),
      kernels=config.parallel.kernels,
      platform=platform,
      **{**config.method.to_dict(), **made},
    )

  return make


def make_optimizer(
  config: ConfigDict,
  named: dict[str, Schedule],
  steps_per_epoch: int,
  is_frozen: optimizers.IsIn,
  encoder: nn.Module,
  *,
  encoder_scale: float,
) -> optax.GradientTransformationExtraArgs:
  """The optimiser of config.optim.

  Args:
    config: config.optim.
    named: from `make_schedules`.
    steps_per_epoch: steps of an epoch.
    is_frozen: path of a parameter -> whether it stays as it is.
    encoder: whose layers have learning rates of their own.
    encoder_scale: from `resolve_encoder_scale`.
  """
  scale_of = None
  if (encoder_scale, config.layer_decay) != (1, 1):
    scale_of = partial.make_layer_scale(
      encoder,
      encoder_scale=encoder_scale,
      layer_decay=config.layer_decay,
    )

  def steps(epochs):
    return round(epochs * steps_per_epoch)

  return OPTIMIZERS[config.name](
    learning_rate=named['learning_rate'],
    weight_decay=named['weight_decay'],
    is_frozen=is_frozen,
    clip_norm=config.clip_norm,
    waits=optimizers.Waits(
      last_layer_steps=steps(config.freeze_last_layer_epochs),
      encoder_steps=steps(config.freeze_encoder_epochs),
    ),
    # PARTICLE's program clips the student and not its predictor.
    is_clipped=lambda path: path[0] != 'predictor',
    decay_vectors=config.decay_vectors,
    scale_of=scale_of,
  )
