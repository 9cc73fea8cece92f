"""Which vectors of a frozen encoder find the same category first.

  python -m benchmarks.retrieval --photographs=FOLDER

FOLDER has cub20, cars14, grocery81 and cub100_box227 or some of them, each with
its labels.csv. Every way to make vectors is scored twice: on validation, by
which a default may be chosen (the validation split queries the training images,
or each of these the others where there is none), and on the test split, with
the difference to the encoder's own embedding at 224 pixels and its interval of
95 % (bootstrap over the queries).
"""

from __future__ import annotations

import csv
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import cmd_jax
from benchmarks import record
from cmd_jax.api import Encoder
from cmd_jax.data.augment.multi_crop import make_eval_view
from cmd_jax.errors import UserError
from cmd_jax.evaluators.features import unit_rows
from cmd_jax.evaluators.whitening import learn_whitening
from cmd_jax.models.pooling import generalised_mean, mean_by_strength

# Those cut to their boxes already are shown whole.
SETS = {
  'cub20': 0.875,
  'cars14': None,
  'grocery81': 0.875,
  'cub100_box227': None,
}
SIDES = (224, 320)
BASELINE = 'encoder, 224 px'
_BATCH = 16
_SHORTLIST = 20
_NUM_BOOTSTRAPS = 2000


class Photographs(NamedTuple):
  """The N images of a set.

  Attributes:
    files: [N] paths.
    labels: [N] classes.
    splits: [N] 'train', 'validation' or 'test'.
  """

  files: list[pathlib.Path]
  labels: np.ndarray
  splits: np.ndarray


class Ranking(NamedTuple):
  """Q queries and the gallery rows that come first, the nearest first.

  Attributes:
    queries: [Q] rows of the set.
    shortlist: [Q, k] rows of the set.
    similarities: [Q, k].
    precisions: [Q] average precision of the full ranking.
  """

  queries: np.ndarray
  shortlist: np.ndarray
  similarities: np.ndarray
  precisions: np.ndarray


def read(folder: pathlib.Path) -> Photographs:
  """The photographs that a labels.csv names."""
  try:
    with open(folder / 'labels.csv') as file:
      rows = list(csv.DictReader(file))
  except OSError as error:
    raise UserError(
      f'{folder / "labels.csv"} cannot be read ({error.strerror}): give the '
      'folder of the sets'
    ) from error
  return Photographs(
    [folder / row['file'] for row in rows],
    np.array([int(row['label']) for row in rows]),
    np.array([row['split'] for row in rows]),
  )


def feature_maps(
  encoder: Encoder, files: list[pathlib.Path], crop_fraction: float | None
) -> np.ndarray:
  """The last maps [N, h, w, C] float16 of images."""
  view = make_eval_view(
    view_px=encoder.preprocessing['view_px'], crop_fraction=crop_fraction
  )

  @jax.jit
  def encode(canvases: jax.Array, sizes: jax.Array) -> jax.Array:
    maps = encoder.module.apply(
      encoder.variables, view(canvases, sizes), method='stages'
    )
    return maps[-1].astype(jnp.float16)

  blocks = []
  with ThreadPoolExecutor(2) as pool:
    for start in tqdm.trange(0, len(files), _BATCH, unit='batch', delay=2):
      batch = files[start : start + _BATCH]
      canvases, sizes = zip(*pool.map(encoder.make_canvas, batch))
      missing = _BATCH - len(batch)
      maps = encode(
        np.stack([*canvases, *canvases[:1] * missing]),
        np.array([*sizes, *sizes[:1] * missing], np.int32),
      )
      blocks.append(np.asarray(maps)[: len(batch)])
  return np.concatenate(blocks)


def pool(maps: np.ndarray, exponent: float | None) -> np.ndarray:
  """[N, C]: the generalised mean, or by how strong patches are for None."""
  vectors = []
  for start in range(0, len(maps), 256):
    block = jnp.asarray(maps[start : start + 256], jnp.float32)
    if exponent is None:
      vectors.append(mean_by_strength(block))
    else:
      vectors.append(generalised_mean(block, exponent))
  return np.concatenate(vectors)


def centre(vectors: np.ndarray, gallery: np.ndarray) -> np.ndarray:
  """Unit vectors around the mean of the gallery's rows."""
  vectors = unit_rows(vectors)
  return unit_rows(vectors - vectors[gallery].mean(0))


def whiten(
  vectors: np.ndarray, gallery: np.ndarray, power: float, count: int = 256
) -> np.ndarray:
  """Divides principal components by a power of their deviation.

  A tenth of the mean variance is added to each, so that those of little
  variance are not made of noise.
  """
  centred = centre(vectors, gallery)
  _, deviations, directions = np.linalg.svd(
    centred[gallery], full_matrices=False
  )
  variances = deviations**2 / len(gallery)
  scale = (variances + 0.1 * variances.mean()) ** (-power / 2)
  return unit_rows(centred @ directions[:count].T * scale[:count])


def rank(
  vectors: np.ndarray,
  photographs: Photographs,
  queries: np.ndarray,
  gallery: np.ndarray,
) -> Ranking:
  """Ranks the gallery for every query, which is not its own result."""
  labels = photographs.labels
  shortlist, kept, precisions = [], [], []
  for query in queries:
    others = gallery[gallery != query]
    similarities = vectors[others] @ vectors[query]
    order = np.argsort(-similarities, kind='stable')
    right = labels[others][order] == labels[query]
    places = np.flatnonzero(right) + 1
    precisions.append(np.mean(np.arange(1, len(places) + 1) / places))
    shortlist.append(others[order[:_SHORTLIST]])
    kept.append(similarities[order[:_SHORTLIST]])
  return Ranking(
    queries, np.array(shortlist), np.array(kept), np.array(precisions)
  )


def rerank(ranking: Ranking, maps: np.ndarray, gallery: np.ndarray) -> Ranking:
  """Adds how well patches that are each other's nearest fit, alike weighted.

  A query's patches count by their strength, as they do to `pool` for None.
  """
  rng = np.random.default_rng(0)
  sample = maps[rng.choice(gallery, min(len(gallery), 256), replace=False)]
  mean = sample.astype(np.float32).mean((0, 1, 2))

  def patches(row: int) -> tuple[np.ndarray, np.ndarray]:
    flat = maps[row].reshape(-1, maps.shape[-1]).astype(np.float32)
    strength = np.linalg.norm(flat, axis=1)
    return unit_rows(flat - mean), strength / strength.sum()

  fits = np.zeros(ranking.shortlist.shape)
  for place, query in enumerate(tqdm.tqdm(ranking.queries, delay=2)):
    own, strength = patches(query)
    for column, row in enumerate(ranking.shortlist[place]):
      similar = own @ patches(row)[0].T
      nearest = similar.argmax(1)
      mutual = similar.argmax(0)[nearest] == np.arange(len(own))
      best = np.maximum(similar.max(1), 0)
      fits[place, column] = (strength * mutual * best).sum()
  scores = sum((x - x.mean()) / x.std() for x in (ranking.similarities, fits))
  order = np.argsort(-scores, axis=1, kind='stable')
  return ranking._replace(
    shortlist=np.take_along_axis(ranking.shortlist, order, axis=1),
    precisions=np.full(len(ranking.queries), np.nan),
  )


def make_vectors(
  maps: dict[int, np.ndarray], gallery: np.ndarray
) -> dict[str, np.ndarray]:
  """By what it is, unit vectors [N, D] to compare by cosine."""
  made = {}
  for side, of_side in maps.items():
    for name, exponent in (
      ('encoder', 1.0),
      ('GeM 2', 2.0),
      ('GeM 3', 3.0),
      ('patches by strength', None),
    ):
      made[f'{name}, {side} px'] = centre(pool(of_side, exponent), gallery)
  small, large = (made[f'{x} px'] for x in ('encoder, 224', 'GeM 2, 320'))
  both = np.concatenate([small, large], axis=1)
  made['both: encoder, 224 and GeM 2, 320 px'] = unit_rows(both)
  pooled = pool(maps[320], 2.0)
  for power in (0.25, 0.5):
    name = f'GeM 2, 320 px, whitened to the power {power}'
    made[name] = whiten(pooled, gallery, power)
  for name, vectors in (
    ('encoder, 224 px', pool(maps[224], 1.0)),
    ('patches by strength, 320 px', pool(maps[320], None)),
  ):
    learned = learn_whitening(vectors[gallery])
    made[f'{name}, whitened by neighbours'] = learned(vectors)
  return made


def interval(differences: np.ndarray) -> list[float]:
  """The 95 % interval of the mean, by bootstrap."""
  rng = np.random.default_rng(0)
  count = len(differences)
  means = [
    differences[rng.integers(0, count, count)].mean()
    for _ in range(_NUM_BOOTSTRAPS)
  ]
  return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def score_set(name: str, folder: pathlib.Path, weights: str) -> list[dict]:
  """The rows of a set."""
  photographs = read(folder)
  train, held_out, test = (
    np.flatnonzero(photographs.splits == split)
    for split in ('train', 'validation', 'test')
  )
  maps = {
    side: feature_maps(
      cmd_jax.load(weights, view_px=side), photographs.files, SETS[name]
    )
    for side in SIDES
  }
  asked = {
    'validation': (held_out if len(held_out) else train, train),
    'test': (test, np.concatenate([train, held_out])),
  }
  rows: dict[str, dict] = {}
  for split, (queries, gallery) in asked.items():
    hits = {}
    for way, vectors in make_vectors(maps, gallery).items():
      found = {way: rank(vectors, photographs, queries, gallery)}
      if way == 'GeM 2, 320 px':
        found[f'{way}, re-ranked'] = rerank(found[way], maps[320], gallery)
      for label, ranking in found.items():
        first = photographs.labels[ranking.shortlist[:, 0]]
        hits[label] = (first == photographs.labels[queries]).astype(float)
        row = rows.setdefault(label, {'set': name, 'vectors': label})
        row[f'{split}_rank1'] = float(hits[label].mean())
        if np.isfinite(ranking.precisions).all():
          row[f'{split}_mAP'] = float(ranking.precisions.mean())
        if split == 'test':
          row['test_gain'] = float((hits[label] - hits[BASELINE]).mean())
          row['test_gain_95'] = interval(hits[label] - hits[BASELINE])
  return list(rows.values())


def main() -> None:
  """Measures, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--photographs', type=pathlib.Path, required=True)
  parser.add_argument('--weights', default='efficientnet_lite0')
  parser.add_argument('--sets', default=','.join(SETS))
  run = record.begin('retrieval', parser)
  options = run.options
  names = options.sets.split(',')
  if unknown := set(names) - set(SETS):
    raise UserError(f'--sets={unknown.pop()}: choose of {", ".join(SETS)}')
  for name in names:
    rows = score_set(name, options.photographs / name, options.weights)
    # A record a set: a long run that is stopped keeps what it has.
    record.finish(run, rows, weights=options.weights)


if __name__ == '__main__':
  record.run_main(main)
