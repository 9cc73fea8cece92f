"""What an evaluator is: data and a function of a frozen network and splits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flax import linen as nn

from cmd_jax.data.canvas import Canvases
from cmd_jax.evaluators.frozen_network import FrozenNetwork


class Splits(NamedTuple):
  """The images that a network is scored on.

  Attributes:
    train: what a protocol may fit or search.
    test: what is scored; None where there are no test images.
  """

  train: Canvases
  test: Canvases | None


def _check_nothing(encoder: nn.Module, splits: Splits) -> None:
  del encoder, splits


class Evaluator(NamedTuple):
  """A protocol by which frozen networks are scored.

  Attributes:
    name: of the protocol, such as 'knn/20'; metrics are called after it.
    run: (network, splits) -> {metric: value in [0, 1]}. It asks the network
      for what it needs: embeddings, feature maps, attention.
    needs_labels: whether it is left out where a split has no labels; `run` may
      then take both splits for given.
    check: (encoder, splits) -> None, before anything is trained; raises
      UserError for what `run` would refuse.
  """

  name: str
  run: Callable[[FrozenNetwork, Splits], dict[str, float]]
  needs_labels: bool = True
  check: Callable[[nn.Module, Splits], None] = _check_nothing
