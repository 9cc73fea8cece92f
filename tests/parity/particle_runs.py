"""Stored inputs of PARTICLE's programs, driven through our own train step."""

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cmd_jax.convert import entries
from cmd_jax.data.batch import Batch, Views
from cmd_jax.devices import sharding
from cmd_jax.training.state import TrainState
from cmd_jax.training.step import make_train_step
from tests import tiny
from tests.parity import golden

STEPS = 3

# Where torchvision's names are in the released Sequential.
_CHILDREN = {'0': 'conv1', '1': 'bn1'} | {
  str(3 + stage): f'layer{stage}' for stage in range(1, 5)
}


def mlp_entries(prefix):
  """The table of a projector or predictor, a Sequential with a ReLU."""
  return [
    *entries.linear('fc1', f'{prefix}0'),
    *entries.norm('norm', f'{prefix}1'),
    *entries.linear('fc2', f'{prefix}3'),
  ]


def with_prefix(prefix, table):
  return [entry._replace(name=prefix + entry.name) for entry in table]


def from_sequential(tensors):
  """The released Network's tensors with torchvision's names."""

  def rename(name):
    return re.sub(
      r'\bencoder\.(\d)',
      lambda match: f'encoder.{_CHILDREN[match.group(1)]}',
      name,
    )

  return {
    rename(name): tensor
    for name, tensor in tensors.items()
    if not name.endswith('num_batches_tracked')
  }


class Recorded(NamedTuple):
  """State of `_record`: the gradients as the backward pass left them."""

  gradients: dict


def _record():
  return optax.GradientTransformation(
    lambda params: Recorded(jax.tree.map(jnp.zeros_like, params)),
    lambda updates, state, params=None: (updates, Recorded(updates)),
  )


class _StoredParts:
  """Gives a step the stored views, and the stored draw of their parts."""

  def augment(self, images, sizes, keys, step_key, part_ids, partners):
    """In place of the augmentation."""
    images, part_ids, self._sampled_ids = images
    return Views(images, global_part_ids=part_ids)

  def method(self, method):
    """The method with the stored draw, of the same trace as the views."""
    contrast = tiny.inside(method)
    sampling = contrast.sampling._replace(draw=lambda *_: self._sampled_ids)
    return dataclasses.replace(contrast, sampling=sampling).as_method()


def _batch(fixture, step):
  def both(name):
    return [fixture[f'in/{name}{view}'][step] for view in (1, 2)]

  images = np.stack([golden.images(x) for x in both('images')], axis=1)
  part_ids = np.stack(both('masks'), axis=1).astype(np.uint8)
  # [draw, image, sample], the draws in our order.
  sampled_ids = fixture['in/sampled_ids'][step].swapaxes(0, 1)
  size = len(images)
  return Batch(
    images=tuple(map(jnp.array, (images, part_ids, sampled_ids))),
    sizes=jnp.zeros((size, 2), jnp.int32),
    index=jnp.arange(size, dtype=jnp.int32),
  )


class Recipe(NamedTuple):
  """One of the two programs, small.

  Attributes:
    make_method: axis_name -> the method.
    optimizer: its optimiser.
    teacher_momentum: its schedule.
    tables: entries of every module of the method's parameters.
  """

  make_method: Callable
  optimizer: optax.GradientTransformationExtraArgs
  teacher_momentum: Callable
  tables: dict

  def to_tensors(self, params, stats):
    """A state dict, with the running statistics of modules that have any."""
    tensors = {}
    for name, table in self.tables.items():
      variables = {'params': params[name], 'batch_stats': stats.get(name)}
      tensors |= entries.to_torch(table, variables)
    return tensors

  def initial_state(self, optimizer, tensors):
    """The state before the first step, from a state dict."""
    variables = {
      name: entries.from_torch(table, tensors)
      for name, table in self.tables.items()
    }
    params, method_state = jax.eval_shape(
      self.make_method(None).init, jax.random.key(0)
    )
    stored = {name: tree['params'] for name, tree in variables.items()}
    assert jax.tree.map(np.shape, stored) == jax.tree.map(np.shape, params)
    params = jax.tree.map(np.asarray, stored)
    method_state = jax.tree.map(
      lambda x: np.zeros(x.shape, x.dtype), method_state
    )
    for name in ('student_stats', 'teacher_stats'):
      if name in method_state:
        method_state[name] = {
          module: jax.tree.map(np.asarray, variables[module]['batch_stats'])
          for module in method_state[name]
        }
    return TrainState(
      step=np.int32(0),
      params=params,
      teacher_params=params,
      opt_state=jax.jit(optimizer.init)(params),
      method_state=method_state,
    )


def train(recipe, fixture, tensors, *, mode, num_devices):
  """Yields the state after each step, its gradients and its metrics."""
  optimizer = optax.chain(_record(), recipe.optimizer)
  mesh = sharding.make_mesh(num_devices)

  def make_step(axis_name, mesh):
    stored = _StoredParts()
    return make_train_step(
      method=stored.method(recipe.make_method(axis_name)),
      augment=stored.augment,
      optimizer=optimizer,
      teacher_momentum=recipe.teacher_momentum,
      schedules={},
      axis_name=axis_name,
      mesh=mesh,
    )

  state = recipe.initial_state(optimizer, tensors)
  state = jax.device_put(state, sharding.replicated(mesh))
  step = sharding.compile_step(make_step, mode=mode, mesh=mesh)
  for number in range(STEPS):
    state, metrics = step(state, _batch(fixture, number), jax.random.key(0))
    on_host = jax.device_get(state)
    recorded, _ = on_host.opt_state
    yield on_host, recorded.gradients, jax.device_get(metrics)
