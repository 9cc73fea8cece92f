"""Scores of frozen networks, each under the name of its protocol.

`base.Evaluator` is what a protocol is, `run.EVALUATORS` lists them, and
`frozen_network.FrozenNetwork` gives them embeddings, feature maps and
attention. docs/extending.md adds one.
"""

from cmd_jax.evaluators.base import Evaluator, Splits
from cmd_jax.evaluators.features import Features
from cmd_jax.evaluators.frozen_network import FrozenNetwork
from cmd_jax.evaluators.run import (
  EVALUATORS,
  check_protocol,
  evaluate,
  explain_protocols,
  make_evaluators,
  remark_on_labels,
  why_not_scored,
)

__all__ = [
  'EVALUATORS',
  'explain_protocols',
  'Evaluator',
  'Features',
  'FrozenNetwork',
  'Splits',
  'check_protocol',
  'evaluate',
  'make_evaluators',
  'remark_on_labels',
  'why_not_scored',
]
