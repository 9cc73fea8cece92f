"""When what happens in a run."""

from __future__ import annotations

from typing import NamedTuple

from ml_collections import ConfigDict

from cmd_jax.parts.plan import Plan

# Lines of metrics of a run, however short: a curve needs some points.
_FEWEST_LINES = 20


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
  )
