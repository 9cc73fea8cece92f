r"""What finished runs gain over where they started, with intervals.

  python -m benchmarks.gains --workdir=runs/compare --sets=cars14-lite0

WORKDIR is that of `benchmarks.compare`: of each run in WORKDIR/SET/ROW/seedN
the features are read that it has kept, of the encoder that it started from and
of the one that it ended with. Both are asked for the nearest training image of
each test image (rank1), and by `linear/logreg` given all training labels, a
share of them (`labels/10`, `labels/20`, `labels/50`) or five images of each
class; both get the same images, in five draws. The interval of a gain is that
of 95 % by bootstrap over the test images and the seeds of a row.

With --asked='rank1 as searched' it is that of `retrieval/search`, for whose
features each run must have been asked before:

  cmd-jax evaluate --workdir=runs/compare/cars14-lite0/cmd/seed10 \
    --config.eval.protocols="('retrieval/search',)"
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from benchmarks import record
from cmd_jax.errors import UserError
from cmd_jax.evaluators.labels import choose
from cmd_jax.evaluators.linear import GRID, decision, fit_logreg
from cmd_jax.evaluators.nearest import find_nearest
from cmd_jax.evaluators.whitening import apart_in
from cmd_jax.files import safe_read

SHARES = (10, 20, 50)
SHOTS = 5
_RANK1, _ALL, _FEW = 'rank1', 'all labels', f'{SHOTS} images a class'
_SEARCHED = 'rank1 as searched'
ASKED = (_RANK1, *(f'labels/{percent}' for percent in SHARES), _ALL, _FEW)
_NUM_DRAWS = 5
_NUM_BOOTSTRAPS = 2000


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


def read_kept(folder: pathlib.Path, name: str = 'image') -> tuple[Kept, Kept]:
  """The features before and after the training of a run.

  Args:
    folder: `features` of its work directory.
    name: of the features, as the end of their files has it; may be a pattern.

  Raises:
    UserError: not those of two encoders.
  """
  encoders: dict[str, dict[str, Split]] = {}
  paths = sorted(
    folder.glob(f'*_{name}.npz'), key=lambda path: path.stat().st_mtime_ns
  )
  for path in paths:
    with path.open('rb') as file:
      arrays = safe_read.read_npz(file)
    key = json.loads(str(arrays['key']))
    # Data sets differ in what they call the images that are learned from; the
    # split comes after '/' for folders and after a blank for TFDS.
    split = 'test' if re.search(r'[/ ]test\b', key['split']) else 'train'
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


def is_finished(workdir: pathlib.Path) -> bool:
  """Whether a run has trained and been scored to its end."""
  path = workdir / 'results.json'
  return path.exists() and 'final' in json.loads(path.read_text())


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
  yield _ALL, [np.arange(len(labels))]
  yield (
    _FEW,
    [choose_shots(labels, SHOTS, seed) for seed in range(_NUM_DRAWS)],
  )


def nearest_hits(kept: Kept) -> np.ndarray:
  """[T], 1 where the nearest training image is of a test image's class."""
  found = find_nearest(kept.test.vectors, kept.train.vectors, 1)
  nearest = found.rows[:, 0]
  return (kept.train.labels[nearest] == kept.test.labels).astype(float)


def searched_hits(kept: Kept) -> np.ndarray:
  """As `nearest_hits`, by the likeness of `cmd-jax search`."""
  told_apart = apart_in(kept.train.vectors)
  return nearest_hits(
    Kept(*(x._replace(vectors=told_apart(x.vectors)) for x in kept))
  )


def logreg_hits(kept: Kept, rows: np.ndarray) -> np.ndarray:
  """[T], 1 where the class of a test image is told by the given ones."""
  train, test = kept
  model = fit_logreg(train.vectors[rows], train.labels[rows], GRID)
  best = decision(model, test.vectors).argmax(1)
  return (model.classes[best] == test.labels).astype(float)


def hits_of_run(
  folder: pathlib.Path, asked: Sequence[str]
) -> dict[str, np.ndarray]:
  """What both encoders of a run find.

  Args:
    folder: `features` of its work directory.
    asked: of `ASKED`, and `rank1 as searched`.

  Returns:
    By what is asked: [2, T], before and after training, the mean of the draws.
  """
  pair = read_kept(folder)
  found = {}
  if _RANK1 in asked:
    found[_RANK1] = np.stack([nearest_hits(kept) for kept in pair])
  if _SEARCHED in asked:
    # Of another pooling or view than the encoder's own, or they are those.
    pair_searched = read_kept(folder, '[a-z]*_[0-9]*')
    found[_SEARCHED] = np.stack([searched_hits(x) for x in pair_searched])
  for given, chosen in draws(pair[0].train.labels):
    if given not in asked:
      continue
    found[given] = np.stack(
      [np.mean([logreg_hits(kept, x) for x in chosen], axis=0) for kept in pair]
    )
  return found


def interval(gains: np.ndarray) -> tuple[float, float]:
  """The 95 % interval of the mean of [S, T], by bootstrap over both."""
  rng = np.random.default_rng(0)
  seeds, images = gains.shape
  means = [
    gains[rng.integers(0, seeds, seeds)][
      :, rng.integers(0, images, images)
    ].mean()
    for _ in range(_NUM_BOOTSTRAPS)
  ]
  low, high = np.percentile(means, [2.5, 97.5])
  return float(low), float(high)


def score_row(
  folders: list[pathlib.Path], asked: Sequence[str] = ASKED
) -> list[dict]:
  """A line for each thing that is asked.

  Args:
    folders: `features` of the runs of a row, one of each seed.
    asked: of `ASKED`.
  """
  runs = [hits_of_run(folder, asked) for folder in folders]
  lines = []
  for name in runs[0]:
    before, after = np.stack([run[name] for run in runs], axis=1)
    low, high = interval(after - before)
    lines.append(
      {
        'asked': name,
        'seeds': len(runs),
        'before': float(before.mean()),
        'after': float(after.mean()),
        'gain': f'{100 * (after - before).mean():+.1f}',
        'gain_95': f'[{100 * low:.1f}, {100 * high:.1f}]',
      }
    )
  return lines


def main() -> None:
  """Scores, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--sets', required=True)
  parser.add_argument('--asked', default=','.join(ASKED))
  run = record.begin('gains', parser)
  asked = run.options.asked.split(',')
  known = (*ASKED, _SEARCHED)
  if unknown := set(asked) - set(known):
    raise UserError(f'--asked={unknown.pop()}: choose of {", ".join(known)}')
  rows = []
  for name in run.options.sets.split(','):
    places = sorted((run.options.workdir / name).glob('*'))
    folders = {
      place.name: found
      for place in places
      if (
        found := [
          seed / 'features'
          for seed in sorted(place.glob('seed*'))
          if is_finished(seed)
        ]
      )
    }
    if not folders:
      raise UserError(f'{run.options.workdir / name} has no finished runs')
    for row, found in tqdm.tqdm(folders.items(), desc=name, unit='row'):
      rows += [{'set': name, 'row': row} | x for x in score_row(found, asked)]
  record.finish(run, rows)


if __name__ == '__main__':
  record.run_main(main)
