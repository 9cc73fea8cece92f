"""Warns of a collapse while a run can still be saved.

A network that says the same of every image has collapsed. It does so in two
ways (Caron et al. 2021, section 5.3): its targets fall on one prototype, with
an entropy of 0, or on all alike, with an entropy of ln K; in both the
divergence of student and teacher is 0. Features may collapse besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

# Relative to ln K. Healthy runs have had entropies from 0.3 to 0.989 of it, and
# short ones divergences down to 0.007 of it with an entropy of 0.989: only both
# together, and closer to the limits, tell a collapse.
UNIFORM_ENTROPY, ONE_PROTOTYPE_ENTROPY = 0.995, 0.02
_UNIFORM_KL, _ONE_PROTOTYPE_KL = 0.005, 0.02

# A mean cosine of 0.99 between the directions of all images; healthy runs have
# had spreads from 0.3 (parts) and 0.6 (images) on.
SPREAD = 0.1

# Logits that differ by less than this from image to image, in units of the
# temperature, are the same distribution for all of them.
_LOGIT_SPREAD = 0.25

# Shares of the run: at first the targets of any run are nearly uniform, and
# what lasts for less than a hundredth recovers by itself.
_WARMUP, _SUSTAINED = 0.05, 0.01
_FEWEST_STEPS = 10


class Sign(NamedTuple):
  """A sign of collapse.

  Attributes:
    needs: metrics without which it cannot be seen.
    holds: (metrics, ln K) -> whether it is there.
    what: what happens, for people.
    advice: what to change.
  """

  needs: tuple[str, ...]
  holds: Callable[[Mapping[str, float], float], bool]
  what: str
  advice: str


def _is_uniform(metrics: Mapping[str, float], log_k: float) -> bool:
  return (
    metrics['teacher_entropy'] > UNIFORM_ENTROPY * log_k
    and metrics['student_teacher_kl'] < _UNIFORM_KL * log_k
  )


def _is_on_one_prototype(metrics: Mapping[str, float], log_k: float) -> bool:
  return (
    metrics['teacher_entropy'] < ONE_PROTOTYPE_ENTROPY * log_k
    and metrics['student_teacher_kl'] < _ONE_PROTOTYPE_KL * log_k
  )


def _is_all_centre(metrics: Mapping[str, float], _: float) -> bool:
  spread = math.sqrt(max(0.0, 1 - metrics['centre_norm'] ** 2))
  return spread < _LOGIT_SPREAD * metrics['teacher_temperature']


_ENTROPY = ('teacher_entropy', 'student_teacher_kl')
SIGNS = {
  'uniform': Sign(
    _ENTROPY,
    _is_uniform,
    'the teacher gives all prototypes the same probability',
    'lower config.teacher.temperature and warmup_temperature, or set '
    'config.teacher.normalisation=sinkhorn',
  ),
  'one_prototype': Sign(
    _ENTROPY,
    _is_on_one_prototype,
    'the teacher puts every image on one prototype',
    'set config.teacher.centre_momentum=0.9 or '
    'config.teacher.normalisation=sinkhorn, or raise '
    'config.teacher.temperature',
  ),
  'centre': Sign(
    ('centre_norm', 'teacher_temperature'),
    _is_all_centre,
    "the teacher's logits are their centre, the same for every image",
    'lower config.optim.base_learning_rate, or set '
    'config.teacher.normalisation=sinkhorn',
  ),
  'features': Sign(
    ('feature_spread',),
    lambda metrics, _: metrics['feature_spread'] < SPREAD,
    'the features of all images have one direction',
    'lower config.optim.base_learning_rate, or raise '
    'config.optim.warmup_epochs',
  ),
  'parts': Sign(
    ('part_spread',),
    lambda metrics, _: metrics['part_spread'] < SPREAD,
    'the features of all parts have one direction',
    'lower config.optim.base_learning_rate, or raise config.method.temperature',
  ),
}


class CollapseWatch:
  """Tells each kind of collapse once."""

  def __init__(
    self, *, num_prototypes: int, total_steps: int, known: Collection[str] = ()
  ):
    """Begins to watch.

    Args:
      num_prototypes: K.
      total_steps: of the run.
      known: kinds that were told already.
    """
    self._log_k = math.log(max(num_prototypes, 2))
    self._warmup = round(_WARMUP * total_steps)
    self._sustained = max(_FEWEST_STEPS, round(_SUSTAINED * total_steps))
    self._known = set(known)
    self._lasting = dict.fromkeys(SIGNS, 0)

  def look(
    self, step: int, metrics: Mapping[str, float]
  ) -> list[dict[str, Any]]:
    """Looks at the metrics of one step, whether they are logged or not.

    Args:
      step: its number, from 1.
      metrics: of the step.

    Returns:
      What is new: `kind`, `step` and `text` of each.
    """
    if step <= self._warmup:
      return []
    found = []
    for kind, sign in SIGNS.items():
      there = all(math.isfinite(metrics.get(x, math.nan)) for x in sign.needs)
      holds = there and sign.holds(metrics, self._log_k)
      self._lasting[kind] = self._lasting[kind] + 1 if holds else 0
      if self._lasting[kind] < self._sustained or kind in self._known:
        continue
      self._known.add(kind)
      values = ', '.join(f'{name} {metrics[name]:.3g}' for name in sign.needs)
      found.append(
        {
          'kind': kind,
          'step': step,
          'text': f'{sign.what} since step {step - self._sustained + 1} '
          f'({values}): {sign.advice}, in a new --workdir',
        }
      )
    return found
