"""The evaluators on frozen features, and scikit-learn doing the same.

  python -m benchmarks.evaluators [--images=12000 --features=384 --classes=200]

Half of the features are train, half test: classes are clusters, apart mostly in
the directions of largest variance, as an encoder's are. `linear/logreg` chooses
among 7 values of C by 5-fold cross-validation and fits again. So does
scikit-learn's LogisticRegression, with the same folds, values and standardised
float32 features, its own solver (L-BFGS) and its own tolerance, at which it may
stop early; its accuracy at a tolerance of 1e-6 and our C is given as well. The
first round of ours compiles. Peak memory is that of the process before
scikit-learn runs.
"""

from __future__ import annotations

import time

import numpy as np

from benchmarks import record
from cmd_jax.evaluators import Features, knn, linear, retrieval

FAST = {
  'knn/20': knn.make_knn,
  'retrieval/test-vs-train': retrieval.make_retrieval,
  'retrieval/loo-test': retrieval.make_loo,
  'retrieval/cmd-ratio9': retrieval.make_cmd_ratio9,
}


def make_features(
  images: int, features: int, classes: int
) -> tuple[Features, Features]:
  """Two splits of clustered, correlated features."""
  rng = np.random.default_rng(0)
  number = np.arange(1, features + 1)
  mix = np.linalg.qr(rng.normal(size=(features, features)))[0]
  centres = 2 * rng.normal(size=(classes, features)) / number
  labels = np.arange(images) % classes
  noise = rng.normal(size=(images, features)) / np.sqrt(number)
  vectors = ((centres[labels] + noise) @ mix).astype(np.float32)
  names = tuple(map(str, range(classes)))
  # Alternating runs of all classes, so both halves are balanced.
  is_train = (np.arange(images) // classes) % 2 == 0
  return tuple(
    Features(
      vectors[rows],
      labels[rows].astype(np.int32),
      names,
      tuple(map(str, np.flatnonzero(rows))),
    )
    for rows in (is_train, ~is_train)
  )


def fit_scikit_learn(train: Features, test: Features, our_c: float) -> dict:
  """Seconds, accuracy on test and C of scikit-learn's cross-validation."""
  from sklearn.linear_model import LogisticRegression
  from sklearn.model_selection import GridSearchCV, PredefinedSplit

  mean, std = train.vectors.mean(0), train.vectors.std(0)
  x, x_test = ((s.vectors - mean) / std for s in (train, test))
  start = time.perf_counter()
  search = GridSearchCV(
    LogisticRegression(max_iter=1000),
    {'C': linear.GRID},
    cv=PredefinedSplit(linear.stratified_folds(train.labels, 5)),
  )
  search.fit(x, train.labels)
  seconds = time.perf_counter() - start
  exact = LogisticRegression(C=our_c, max_iter=10_000, tol=1e-6)
  return {
    'seconds': seconds,
    'top1': search.score(x_test, test.labels),
    'C': search.best_params_['C'],
    'top1_exact': exact.fit(x, train.labels).score(x_test, test.labels),
  }


def main() -> None:
  """Measures, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--images', type=int, default=12_000)
  parser.add_argument('--features', type=int, default=384)
  parser.add_argument('--classes', type=int, default=200)
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--no-scikit-learn', action='store_true')
  run = record.begin('evaluators', parser)
  arguments = run.options
  train, test = make_features(
    arguments.images, arguments.features, arguments.classes
  )
  rows = {}
  for name, make in (FAST | {'linear/logreg': linear.make_logreg}).items():
    score, seconds = make(), []
    for _ in range(arguments.rounds):
      start = time.perf_counter()
      scores = score(train, test)
      seconds.append(time.perf_counter() - start)
    rows[name] = {
      'evaluator': name,
      'seconds': min(seconds),
      'seconds_with_compilation': seconds[0],
      **scores,
    }
  facts = {
    'peak_memory_mib_of_ours': record.peak_memory_mib(),
    'knn_and_retrieval_seconds': sum(rows[name]['seconds'] for name in FAST),
  }
  if not arguments.no_scikit_learn:
    ours = rows['linear/logreg']
    ours['C'] = linear.fit_logreg(train.vectors, train.labels, linear.GRID).c
    theirs = fit_scikit_learn(train, test, ours['C'])
    name = 'scikit-learn LogisticRegression'
    rows[name] = {'evaluator': name, **theirs}
    facts['logreg_speed_ratio'] = theirs['seconds'] / ours['seconds']
    for name in ('top1', 'top1_exact'):
      points = 100 * (ours['top1'] - theirs[name])
      facts[f'logreg_points_above_{name}'] = points
  record.finish(run, list(rows.values()), **facts)


if __name__ == '__main__':
  record.run_main(main)
