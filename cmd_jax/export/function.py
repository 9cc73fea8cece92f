"""What is exported: a frozen encoder as a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.api import Encoder
from cmd_jax.errors import UserError

Function = Callable[[Mapping[str, Any], jax.Array], dict[str, jax.Array]]
EMBEDDING, ATTENTION = 'embedding', 'attention'
PROBABILITIES = 'probabilities'


def make_function(
  encoder: Encoder, *, attention: bool, dtype: Any = None
) -> tuple[Function, Mapping[str, Any]]:
  """An encoder as a function of a batch of images.

  Every image goes through by itself, vectorised: the encoders ask for the
  length of the batch, which a batch of any size does not have.

  Args:
    encoder: the encoder.
    attention: whether attention is wanted too: the multi-instance attention
      where there is one, otherwise the encoder's own, the mean over its heads.
    dtype: of the computation; None leaves it.

  Returns:
    A function of variables and of images [B, H, W, 3] float32, normalised, that
    gives `embedding` [B, D], of a fine-tuned encoder `probabilities` [B, C],
    calibrated, and, if wanted, `attention` [B, h * w], all float32; and the
    variables, numpy arrays.

  Raises:
    UserError: attention is wanted of a network that has none.
  """
  module, mil = encoder.module, encoder.network.mil
  if attention and mil is None and not hasattr(module, 'num_heads'):
    raise UserError(f'{encoder.source} has no attention: leave out --attention')
  if dtype is not None:
    module = module.clone(dtype=dtype)
    mil = mil and mil.clone(dtype=dtype)
  variables = {'encoder': encoder.variables}
  classifier = encoder.classifier
  if classifier is not None:
    # The temperature in the layer itself: nothing else is needed then.
    variables['classifier'] = tuple(
      x / np.float32(classifier.temperature)
      for x in (classifier.kernel, classifier.bias)
    )
  if attention and mil is not None:
    variables['mil'] = encoder.network.mil_variables

  def encode(
    variables: Mapping[str, Any], image: jax.Array
  ) -> dict[str, jax.Array]:
    output = module.apply(variables['encoder'], image[None])
    results = {EMBEDDING: output.image[0]}
    if 'classifier' in variables:
      kernel, bias = variables['classifier']
      image = output.image[0].astype(jnp.float32)
      results[PROBABILITIES] = jax.nn.softmax(image @ kernel + bias)
    if 'mil' in variables:
      results[ATTENTION] = mil.apply(variables['mil'], output.tokens)[0]
    elif attention:
      results[ATTENTION] = output.attention.mean(1)[0]
    return results

  return jax.vmap(encode, in_axes=(None, 0)), jax.device_get(variables)
