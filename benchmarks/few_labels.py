"""What finished runs gain where few images have labels.

  python -m benchmarks.few_labels --workdir=runs/compare --sets=cars14-lite0

WORKDIR is that of `benchmarks.compare`: of each run in WORKDIR/SET/ROW/seedN
the features are read that it has kept, of the encoder that it started from and
of the one that it ended with. `linear/logreg` is given a share of the training
labels (`labels/10`, `labels/20`, `labels/50`) or five images of each class.
Both encoders get the same images, in five draws; the interval of the gain is a
bootstrap over the test images, of which each counts with the mean of its draws.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tqdm

from benchmarks import record
from benchmarks.retrieval import interval
from cmd_jax.errors import UserError
from cmd_jax.evaluators.labels import choose
from cmd_jax.evaluators.linear import GRID, decision, fit_logreg
from cmd_jax.files import safe_read

SHARES = (10, 20, 50)
SHOTS = 5
_NUM_DRAWS = 5


class Split(NamedTuple):
  """Features of N images.

  Attributes:
    vectors: [N, D].
    labels: [N].
  """

  vectors: np.ndarray
  labels: np.ndarray


class Kept(NamedTuple):
  """The features that a run has kept of one encoder.

  Attributes:
    train: of the images whose labels may be given.
    test: of those that are scored.
  """

  train: Split
  test: Split


def read_kept(folder: pathlib.Path) -> tuple[Kept, Kept]:
  """The features before and after the training of a run.

  Args:
    folder: `features` of its work directory.

  Raises:
    UserError: not those of two encoders.
  """
  encoders: dict[str, dict[str, Split]] = {}
  paths = sorted(
    folder.glob('*_image.npz'), key=lambda path: path.stat().st_mtime_ns
  )
  for path in paths:
    with path.open('rb') as file:
      arrays = safe_read.read_npz(file)
    key = json.loads(str(arrays['key']))
    # Data sets differ in what they call the images that are learned from.
    split = 'test' if key['split'].endswith('/test') else 'train'
    encoders.setdefault(key['encoder_sha256'], {})[split] = Split(
      arrays['vectors'], arrays['labels']
    )
  found = [
    Kept(x['train'], x['test']) for x in encoders.values() if len(x) == 2
  ]
  if len(found) == 1:
    # The start was the best checkpoint of all.
    found *= 2
  if len(found) != 2:
    raise UserError(
      f'{folder} has features of {len(found)} encoders where those of two are '
      'needed: the run is not finished, or has been evaluated otherwise since'
    )
  before, after = found
  return before, after


def choose_shots(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
  """`count` images of each class, in ascending order; all where it has fewer.

  Args:
    labels: [N].
    count: of every class.
    seed: of the order in which a class's images are taken.
  """
  shuffled = np.random.default_rng(seed).permutation(len(labels))
  return np.sort(
    np.concatenate(
      [
        shuffled[labels[shuffled] == label][:count]
        for label in np.unique(labels)
      ]
    )
  )


def draws(labels: np.ndarray) -> Iterator[tuple[str, list[np.ndarray]]]:
  """(what is given, the images of each draw)."""
  for percent in SHARES:
    yield (
      f'labels/{percent}',
      [choose(labels, percent, seed) for seed in range(_NUM_DRAWS)],
    )
  yield (
    f'{SHOTS} images a class',
    [choose_shots(labels, SHOTS, seed) for seed in range(_NUM_DRAWS)],
  )


def hits(kept: Kept, rows: np.ndarray) -> np.ndarray:
  """[T], 1 where the class of a test image is told by the given ones."""
  train, test = kept
  model = fit_logreg(train.vectors[rows], train.labels[rows], GRID)
  best = decision(model, test.vectors).argmax(1)
  return (model.classes[best] == test.labels).astype(float)


def score_run(folder: pathlib.Path) -> list[dict]:
  """The rows of a run.

  Args:
    folder: `features` of its work directory.
  """
  before, after = read_kept(folder)
  rows = []
  for given, chosen in draws(before.train.labels):
    start, end = (
      np.mean([hits(kept, x) for x in chosen], axis=0)
      for kept in (before, after)
    )
    rows.append(
      {
        'given': given,
        'images': float(np.mean([len(x) for x in chosen])),
        'frozen': float(start.mean()),
        'trained': float(end.mean()),
        'gain': float((end - start).mean()),
        'gain_95': interval(end - start),
      }
    )
  return rows


def main() -> None:
  """Scores, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--sets', required=True)
  run = record.begin('few_labels', parser)
  rows = []
  for name in run.options.sets.split(','):
    folders = sorted((run.options.workdir / name).glob('*/seed*/features'))
    if not folders:
      raise UserError(f'{run.options.workdir / name} has no finished runs')
    for folder in tqdm.tqdm(folders, desc=name, unit='run'):
      *_, row, seed, _ = folder.parts
      said = {'set': name, 'row': row, 'seed': int(seed[len('seed') :])}
      rows += [said | scores for scores in score_run(folder)]
  record.finish(run, rows)


if __name__ == '__main__':
  record.run_main(main)
