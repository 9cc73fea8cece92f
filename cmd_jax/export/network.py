"""What is exported: the network of a run or of a weight file, as a function."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn

import cmd_jax
from cmd_jax.api import Encoder
from cmd_jax.errors import UserError
from cmd_jax.rundir.saved_run import read_config, read_network
from cmd_jax.rundir.workdir import Workdir

Function = Callable[[Mapping[str, Any], jax.Array], dict[str, jax.Array]]
EMBEDDING, ATTENTION = 'embedding', 'attention'


class Network(NamedTuple):
  """An encoder, and the multi-instance attention that was trained with it.

  Attributes:
    encoder: as `cmd_jax.load` gives it.
    training: how it was trained, for people; empty for a file of weights.
    mil: multi-instance attention over the encoder's tokens; None without.
    mil_params: parameters of `mil`; None without.
  """

  encoder: Encoder
  training: Mapping[str, str]
  mil: nn.Module | None = None
  mil_params: Mapping[str, Any] | None = None


def _dataset_name(dataset: Mapping[str, Any]) -> str:
  """A data set as its own kind of source names it."""
  fields = (dataset.get(field) for field in ('path', 'train', 'name'))
  return next(filter(None, fields), dataset['source'])


def load_network(source: str, network: str = '') -> Network:
  """Loads what is to be exported.

  Args:
    source: work directory of a run, or weight file.
    network: as of `cmd_jax.load`.

  Raises:
    UserError: as `cmd_jax.load`.
  """
  path = pathlib.Path(source).expanduser()
  encoder = cmd_jax.load(path, network=network)
  if not path.is_dir():
    return Network(encoder, {})
  workdir = Workdir(str(path))
  config = read_config(workdir)
  network = network or config.eval.network
  saved = read_network(workdir, network, config)
  method = config.method
  variant = method.get('variant', 'paper')
  training = {
    'method': method.name if variant == 'paper' else f'{method.name}_{variant}',
    'dataset': _dataset_name(config.dataset),
    'network': network,
    'steps': str(saved.step),
  }
  return Network(encoder, training, saved.mil, saved.mil_params)


def make_function(
  network: Network, *, attention: bool, dtype: Any = None
) -> tuple[Function, Mapping[str, Any]]:
  """The network as a function of a batch of images.

  Every image goes through by itself, vectorised: the encoders ask for the
  length of the batch, which a batch of any size does not have.

  Args:
    network: the network.
    attention: whether attention is wanted too: the multi-instance attention
      where there is one, otherwise the encoder's own, the mean over its heads.
    dtype: of the computation; None leaves it.

  Returns:
    A function of variables and of images [B, H, W, 3] float32, normalised, that
    gives `embedding` [B, D] and, if wanted, `attention` [B, h * w], both
    float32; and the variables, numpy arrays.

  Raises:
    UserError: attention is wanted of a network that has none.
  """
  module, mil = network.encoder.module, network.mil
  if attention and mil is None and not hasattr(module, 'num_heads'):
    raise UserError(
      f'{network.encoder.source} has no attention: leave out --attention'
    )
  if dtype is not None:
    module = module.clone(dtype=dtype)
    mil = mil and mil.clone(dtype=dtype)
  variables = {'encoder': network.encoder.variables}
  if attention and mil is not None:
    variables['mil'] = {'params': network.mil_params}

  def encode(
    variables: Mapping[str, Any], image: jax.Array
  ) -> dict[str, jax.Array]:
    output = module.apply(variables['encoder'], image[None])
    results = {EMBEDDING: output.image[0]}
    if 'mil' in variables:
      results[ATTENTION] = mil.apply(variables['mil'], output.tokens)[0]
    elif attention:
      results[ATTENTION] = output.attention.mean(1)[0]
    return results

  return jax.vmap(encode, in_axes=(None, 0)), jax.device_get(variables)
