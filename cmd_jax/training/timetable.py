"""When what happens in a run."""

from __future__ import annotations

import re
from typing import NamedTuple

from ml_collections import ConfigDict

from cmd_jax.errors import UserError
from cmd_jax.parts.plan import Plan

# Lines of metrics of a run, however short: a curve needs some points.
_FEWEST_LINES = 20
_RANGE = re.compile(r'(\d+):(\d+)')


class Steps(NamedTuple):
  """When what happens in a run, in steps.

  Attributes:
    batch_size: B of all devices together.
    per_epoch: steps of an epoch.
    total: steps of the run.
    per_call: steps of one call of the compiled step, at most.
    round_ends: steps after which parts are found anew, the last of all.
    log_every: from one log line to the next.
    checkpoint_every: from one checkpoint to the next.
    checkpoints_kept: number of checkpoints kept.
    non_finite_allowed: steps that may be left out, see `NonFiniteSteps`.
    term_warmup: steps over which the weights of all terms but the image's rise
      from 0, those of the run at most; 0 where they do not.
    evaluate_every: from one score to the next while it trains; 0 for none.
    keep_best: the score by which the best checkpoint is kept; '' for none.
    patience: evaluations without a better one after which the run ends; 0 for
      never.
    profile: the first and the last step that are traced; None for none.
  """

  batch_size: int
  per_epoch: int
  total: int
  per_call: int
  round_ends: tuple[int, ...]
  log_every: int
  checkpoint_every: int
  checkpoints_kept: int
  non_finite_allowed: int
  term_warmup: int
  evaluate_every: int
  keep_best: str
  patience: int
  profile: tuple[int, int] | None = None


def parse_profile_steps(
  text: str, total: int | None = None
) -> tuple[int, int] | None:
  """The first and the last step to trace; None for an empty text.

  Args:
    text: `config.log.profile_steps`, such as 10:15; steps count from 1.
    total: steps of the run; None if they are not known yet.

  Raises:
    UserError: it is no such range, or begins after the run's end.
  """
  text = text.strip()
  if not text:
    return None
  match = _RANGE.fullmatch(text)
  first, last = map(int, match.groups()) if match else (0, 0)
  if not 1 <= first <= last:
    raise UserError(
      f'config.log.profile_steps is {text!r}: give the first and the last step '
      'to trace, from 1, as in --profile_steps=10:15'
    )
  if total is not None and first > total:
    raise UserError(
      f'config.log.profile_steps is {text!r}, and the run has {total} steps: '
      'choose earlier ones'
    )
  return first, last


def count_epochs(config: ConfigDict, num_examples: int) -> int:
  """Epochs of a run: config.total_epochs, or what config.min_steps takes.

  Args:
    config: as cmd_jax/config/published.py makes it.
    num_examples: training images.
  """
  per_epoch = num_examples // config.batch_size
  least = -(-config.min_steps // per_epoch) if per_epoch else 0
  return max(config.total_epochs, least)


def make_steps(
  config: ConfigDict, num_examples: int, plan: Plan | None
) -> Steps:
  """The steps of a config.

  Args:
    config: as cmd_jax/config/published.py makes it.
    num_examples: training images.
    plan: how parts are found; None for a method without.

  Raises:
    UserError: steps to trace that the run does not have.
  """
  per_epoch = num_examples // config.batch_size
  total = count_epochs(config, num_examples) * per_epoch
  rounds = 1 if plan is None else plan.rounds
  every_epochs = config.eval.every_epochs
  weights = config.method.get('weights', {})
  return Steps(
    batch_size=config.batch_size,
    per_epoch=per_epoch,
    total=total,
    per_call=config.parallel.steps_per_dispatch,
    round_ends=tuple(total * (i + 1) // rounds for i in range(rounds)),
    log_every=min(config.log.every_steps, max(total // _FEWEST_LINES, 1)),
    checkpoint_every=config.checkpoint.every_steps,
    checkpoints_kept=config.checkpoint.keep,
    non_finite_allowed=config.optim.skip_non_finite_steps,
    term_warmup=min(round(config.term_warmup_epochs * per_epoch), total)
    if any(weight for name, weight in weights.items() if name != 'image')
    else 0,
    evaluate_every=max(round(every_epochs * per_epoch), 1)
    if every_epochs
    else 0,
    keep_best=config.checkpoint.keep_best,
    patience=config.checkpoint.patience,
    profile=parse_profile_steps(config.log.get('profile_steps', ''), total),
  )
