"""Scores the network of a run while it trains, and knows the best step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from cmd_jax.data.augment import multi_crop
from cmd_jax.data.canvas import Canvases
from cmd_jax.data.pipeline.lazy import LazyArray
from cmd_jax.devices import processes, sharding
from cmd_jax.evaluators import validation
from cmd_jax.evaluators.features import Features, extract
from cmd_jax.evaluators.frozen_network import compile_encode
from cmd_jax.training.classification import classifier_of_state, quick_scores
from cmd_jax.training.experiment import Experiment
from cmd_jax.training.scoring import variables_of
from cmd_jax.training.state import TrainState

# What tells steps of the same score apart, and whether more of it is better:
# the likelihood of a classifier, the votes of more neighbours than the first.
_TIE_BREAKERS = {'nll': -1, 'knn': 1}


class Validation:
  """The scores of a run that were, and those that come.

  Attributes:
    best: `score`, `step` and `value` of the best step so far by
      config.checkpoint.keep_best, and those of `_TIE_BREAKERS` that there are;
      None without.
    scores: those of the first and the last evaluation, as 'start' and 'end'.
  """

  def __init__(
    self,
    experiment: Experiment,
    saved: Mapping[str, Any] | None,
    saved_steps: list[int],
  ):
    """Goes on where a checkpoint was.

    Args:
      experiment: the run's.
      saved: what `as_json` gave for the checkpoint; None for a run that begins.
      saved_steps: of the checkpoints that are there. What was best but is gone
        is the best no more.
    """
    steps, saved = experiment.steps, saved or {}
    self._every, self._total = steps.evaluate_every, steps.total
    self._keep_best, self._patience = steps.keep_best, steps.patience
    self._step = saved.get('step', -1)
    self._nearest = saved.get('nearest')
    best = saved.get('best')
    if best and (
      best['score'] != self._keep_best or best['step'] not in saved_steps
    ):
      best = None
    self.best = best
    self.scores: dict[str, dict[str, float]] = dict(saved.get('scores', {}))
    self._rows: np.ndarray | None = None
    self._encode: Callable | None = None

  @property
  def is_on(self) -> bool:
    """Whether anything is scored while it trains."""
    return self._every > 0

  def is_due(self, step: int) -> bool:
    """Whether the network is to be scored after a step."""
    if not self.is_on or step == self._step:
      return False
    return step % self._every == 0 or step == self._total

  @property
  def has_stalled(self) -> bool:
    """Whether the last evaluations found nothing better, and no more come."""
    if not self._patience or self.best is None:
      return False
    return self._step - self.best['step'] >= self._patience * self._every

  def steps_left(self, step: int) -> int:
    """Steps from a step to the next evaluation."""
    if not self.is_on:
      return self._total
    return self._every - step % self._every

  def as_json(self) -> dict[str, Any]:
    """What a checkpoint keeps, for `__init__`."""
    return {
      'step': self._step,
      'nearest': self._nearest,
      'best': self.best,
      'scores': self.scores,
    }

  def evaluate(
    self, experiment: Experiment, state: TrainState
  ) -> dict[str, float]:
    """Scores a state; all processes must call it, the first one computes.

    Returns:
      {'eval/<name>': value}; nothing where embeddings are not finite.
    """
    alone, state = experiment.on_this_process(state)
    scores, nearest = processes.broadcast_from_main(
      lambda: self._score(alone, state)
    )
    step = int(state.step)
    self._step, self._nearest = step, nearest
    self.scores = {'start': self.scores.get('start', scores), 'end': scores}
    value = scores.get(self._keep_best)
    if value is not None:
      found = {'score': self._keep_best, 'step': step, 'value': value}
      found |= {name: scores[name] for name in _TIE_BREAKERS if name in scores}
      if self.best is None or _rank(found) > _rank(self.best):
        self.best = found
    return {f'eval/{name}': value for name, value in scores.items()}

  def _score(
    self, experiment: Experiment, state: TrainState
  ) -> tuple[dict[str, float], list[int] | None]:
    variables, _ = variables_of(experiment, state)
    train = experiment.data.pretrain
    classifier = classifier_of_state(experiment, state)
    if classifier is not None:
      held_out = experiment.data.validation
      rows = validation.choose_images(held_out.labels)
      asked = self._embed(experiment, variables, held_out, rows)
      if not np.isfinite(asked).all():
        return {}, None
      features = _features(held_out, rows, asked)
      return quick_scores(classifier, features), None
    if self._rows is None:
      self._rows = validation.choose_images(train.labels)
    vectors = self._embed(experiment, variables, train, self._rows)
    if not np.isfinite(vectors).all():
      return {}, None
    before = None if self._nearest is None else np.array(self._nearest)
    scores, nearest = validation.score_unlabelled(vectors, before)
    features = _features(train, self._rows, vectors)
    held_out, queries = experiment.data.validation, None
    if held_out is not None:
      rows = validation.choose_images(held_out.labels)
      asked = self._embed(experiment, variables, held_out, rows)
      queries = _features(held_out, rows, asked)
    scores |= validation.score_labelled(features, queries)
    return scores, nearest.tolist()

  def _embed(
    self,
    experiment: Experiment,
    variables: Mapping[str, Any],
    split: Canvases,
    rows: np.ndarray,
  ) -> np.ndarray:
    """The embeddings [N, D] of some images of a split."""
    settings, mesh = experiment.evaluation.settings, experiment.mesh
    if self._encode is None:
      # Once: a network of its own would be compiled at every evaluation.
      self._encode = compile_encode(
        lambda variables, x: experiment.encoder.apply(variables, x).image,
        multi_crop.make_eval_view(
          view_px=settings['view_px'],
          crop_fraction=settings['crop_fraction'] or None,
          **experiment.data.statistics._asdict(),
        ),
        mesh,
      )
    spread = sharding.sharded(mesh)
    return extract(
      lambda *batch: self._encode(variables, *jax.device_put(batch, spread)),
      _rows_of(split.images, rows),
      _rows_of(split.sizes, rows),
      batch_size=-(-settings['batch_size'] // mesh.size) * mesh.size,
      progress=True,
    )


def _rank(found: Mapping[str, Any]) -> tuple[float, ...]:
  """How good a step is: few images tie often, which `_TIE_BREAKERS` break."""
  signs = _TIE_BREAKERS.items()
  return found['value'], *(sign * found.get(name, 0.0) for name, sign in signs)


def _rows_of(array: np.ndarray | LazyArray, rows: np.ndarray) -> LazyArray:
  """Some rows of an array, read when they are asked for."""
  return LazyArray(
    lambda chosen: array[rows[chosen]],
    (len(rows), *array.shape[1:]),
    array.dtype,
  )


def _features(
  split: Canvases, rows: np.ndarray, vectors: np.ndarray
) -> Features:
  # After the images were read: what is unreadable loses its label then.
  labels = np.asarray(split.labels)[rows]
  names = tuple(split.file_names[row] for row in rows)
  return Features(vectors, labels, split.class_names, names)
