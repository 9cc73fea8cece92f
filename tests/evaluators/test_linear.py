from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cmd_jax.evaluators import Features, linear
from cmd_jax.evaluators.linear import fit_logreg, make_logreg, stratified_folds


def _data(
  count: int, classes: int, dims: int = 24, noise: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Correlated features with means far from 0, as an encoder gives them."""
  fixed = np.random.default_rng(7)
  centres = fixed.normal(size=(classes, dims)) * np.logspace(0, -1.5, dims)
  mix = fixed.normal(size=(dims, dims))
  rng = np.random.default_rng(seed)
  labels = (np.arange(count) % classes).astype(np.int32)
  spread = noise * np.logspace(0, -1.5, dims) * rng.normal(size=(count, dims))
  vectors = (centres[labels] + spread) @ mix + 5.0
  return vectors.astype(np.float32), labels


def _split(vectors: np.ndarray, labels: np.ndarray, classes: int) -> Features:
  return Features(
    vectors,
    labels,
    tuple(map(str, range(classes))),
    tuple(map(str, range(len(labels)))),
  )


def _objective(x, labels, weights, bias, c) -> float:
  logits = x @ weights + bias
  logits -= logits.max(axis=1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  loss = -log_p[np.arange(len(labels)), labels].sum()
  return c * loss + 0.5 * np.sum(weights**2)


@pytest.mark.parametrize('c', [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize('classes', [2, 7])
def test_minimises_the_objective_of_scikit_learn(c, classes):
  vectors, labels = _data(400, classes, noise=2.0)
  x = vectors.astype(np.float64)
  x = (x - x.mean(axis=0)) / x.std(axis=0)
  reference = LogisticRegression(C=c, tol=1e-8, solver='newton-cholesky')
  if classes == 2:
    # scikit-learn penalises one vector w for two classes, which is the softmax
    # of +w/2 and -w/2 with half the penalty: C doubles.
    reference = reference.set_params(C=2 * c)
  reference.fit(x, labels)
  weights, bias = reference.coef_.T, reference.intercept_
  if classes == 2:
    weights, bias = (
      np.hstack([-weights, weights]) / 2,
      np.append(-bias, bias) / 2,
    )
  want = _objective(x, labels, weights, bias, c)

  model = fit_logreg(vectors, labels, (c,))
  got = _objective(x, labels, model.weights, model.bias, c)
  # Not better than the minimum (a wrong objective), nor much worse.
  assert want * (1 - 1e-5) < got < want * (1 + 1e-3)
  fresh, _ = _data(300, classes, noise=2.0, seed=1)
  scaled = (fresh - vectors.mean(axis=0, dtype=np.float64)) / vectors.std(
    axis=0, dtype=np.float64
  )
  same = linear.decision(model, fresh).argmax(axis=1) == reference.predict(
    scaled
  )
  assert same.mean() >= 0.99


def test_blocks_change_nothing(monkeypatch):
  vectors, labels = _data(203, 4)
  want = fit_logreg(vectors, labels, (1e-2, 1.0))
  monkeypatch.setattr(linear, '_MAX_LOGITS', 50 * 4)
  got = fit_logreg(vectors, labels, (1e-2, 1.0))
  assert got.c == want.c
  np.testing.assert_allclose(got.weights, want.weights, atol=2e-3)
  np.testing.assert_allclose(got.bias, want.bias, atol=2e-3)


def test_cross_validation_counts_as_scikit_learn_does():
  vectors, labels = _data(150, 5, noise=2.5)
  grid = (1e-4, 1e-2, 1.0, 100.0)
  x, mean, scale, _ = linear._standardise(vectors)
  fold_of = stratified_folds(labels, 5)
  masks = fold_of != np.arange(5)[:, None]
  blocks = linear._blocks(x, labels, masks, 5)
  got = linear._cross_validate(*blocks, np.float32(grid), num_classes=5)
  features = (vectors - mean) * scale
  want = []
  for c in grid:
    correct = 0
    for kept in masks:
      model = LogisticRegression(C=c, tol=1e-6, solver='newton-cholesky')
      model.fit(features[kept], labels[kept])
      correct += (model.predict(features[~kept]) == labels[~kept]).sum()
    want.append(correct)
  assert max(want) - min(want) > 5
  np.testing.assert_allclose(got, want, atol=3)
  assert fit_logreg(vectors, labels, grid).c == grid[int(np.argmax(got))]


@pytest.mark.parametrize('c', [1e-6, 1e-5, 1e-4])
def test_strong_regularisation_does_not_end_at_the_start(c):
  # The constant C N log K hides how much there is to gain here.
  rng = np.random.default_rng(0)
  labels = (np.arange(240) % 7).astype(np.int32)
  vectors = 0.4 * rng.normal(size=(7, 24))[labels] + rng.normal(size=(240, 24))
  x, mean, scale, _ = linear._standardise(vectors)
  masks = stratified_folds(labels, 5) != np.arange(5)[:, None]
  got = linear._cross_validate(
    *linear._blocks(x, labels, masks, 7), np.float32([c]), num_classes=7
  )
  features = (vectors - mean) * scale
  want = 0
  for kept in masks:
    model = LogisticRegression(C=c, tol=1e-10, solver='newton-cholesky')
    model.fit(features[kept], labels[kept])
    want += (model.predict(features[~kept]) == labels[~kept]).sum()
  assert want > 60  # One class for all would give 35.
  np.testing.assert_allclose(got, [want], atol=3)


def test_noisy_features_get_strong_regularisation():
  rng = np.random.default_rng(0)
  labels = (np.arange(120) % 3).astype(np.int32)
  vectors = rng.normal(size=(120, 60)).astype(np.float32)
  vectors[:, 0] += 2 * labels
  grid = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
  assert fit_logreg(vectors, labels, grid).c < 1.0


def test_deterministic_and_close_to_scikit_learn_on_test():
  train = _split(*_data(300, 8, noise=0.8), 8)
  test = _split(*_data(160, 8, noise=0.8, seed=1), 8)
  evaluator = make_logreg()
  got = evaluator(train, test)
  assert evaluator(train, test) == got
  mean, std = train.vectors.mean(axis=0), train.vectors.std(axis=0)
  reference = max(
    LogisticRegression(C=c, solver='newton-cholesky')
    .fit((train.vectors - mean) / std, train.labels)
    .score((test.vectors - mean) / std, test.labels)
    for c in (1e-2, 1.0, 100.0)
  )
  assert got['top1'] > 0.5
  assert got['top1'] >= reference - 0.04
  assert got['top5'] >= got['top1']


def test_absent_classes_and_top5():
  vectors, labels = _data(120, 8, noise=0.3)
  kept = labels != 3
  train = _split(vectors[kept], labels[kept], 8)
  got = make_logreg((1.0,))(train, _split(*_data(80, 8, 24, 0.3, 1), 8))
  # One class of eight can't be predicted.
  assert 0.7 < got['top1'] <= 7 / 8
  assert got['top5'] <= 7 / 8
  few = _split(*_data(40, 5), 5)
  assert set(make_logreg((1.0,))(few, few)) == {'top1'}


def test_constant_features_do_not_matter():
  vectors, labels = _data(100, 4, 12)
  rng = np.random.default_rng(0)
  # Constant up to float32's rounding.
  constant = 7 * (1 + 1e-7 * rng.normal(size=(100, 3)))
  wider = np.hstack([vectors, constant.astype(np.float32)])
  want = fit_logreg(vectors, labels, (1.0,))
  got = fit_logreg(wider, labels, (1.0,))
  np.testing.assert_allclose(got.weights[:12], want.weights, atol=1e-2)
  np.testing.assert_array_equal(got.weights[12:] * got.scale[12:, None], 0)


@pytest.mark.parametrize('counts', [[50, 1, 2, 7], [1, 1], [2, 3, 1, 1, 1, 4]])
def test_folds_are_stratified_and_small_classes_work(counts):
  targets = np.repeat(np.arange(len(counts)), counts)
  fold_of = stratified_folds(targets, 5)
  sizes = np.bincount(fold_of, minlength=min(5, len(targets)))
  assert sizes.max() - sizes.min() <= 1 and sizes.min() >= 1
  for target in range(len(counts)):
    members = np.bincount(fold_of[targets == target], minlength=len(sizes))
    assert members.max() - members.min() <= 1
  rng = np.random.default_rng(0)
  centres = 9 * np.eye(len(counts), 8)
  vectors = centres[targets] + 0.01 * rng.normal(size=(len(targets), 8))
  split = _split(
    vectors.astype(np.float32), targets.astype(np.int32), len(counts)
  )
  assert make_logreg()(split, split)['top1'] == 1.0


def test_refuses_bad_arguments():
  for grid, folds in (((), 5), ((0.0, 1.0), 5), ((1.0,), 1)):
    with pytest.raises(ValueError, match='must be positive'):
      make_logreg(grid, folds)
