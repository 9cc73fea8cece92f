"""Multinomial logistic regression on frozen features, without augmentation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.evaluators import lbfgs
from cmd_jax.evaluators.features import Features, usable

# Values of C that are tried.
GRID = tuple(10.0**e for e in range(-4, 3))
_PROTOCOL = 'linear/logreg'
_HIGHEST = jax.lax.Precision.HIGHEST
# Entries of the logits of all folds held at once: 64 MB.
_MAX_LOGITS = 2**24


class LogReg(NamedTuple):
  """A fitted classifier.

  Attributes:
    mean: [D] subtracted from the features.
    scale: [D] the features are then multiplied by; 0 for constant ones.
    weights: [D, K] of the standardised features.
    bias: [K].
    classes: [K] the label of every column.
    c: the inverse strength of the regularisation.
  """

  mean: np.ndarray
  scale: np.ndarray
  weights: np.ndarray
  bias: np.ndarray
  classes: np.ndarray
  c: float


def make_logreg(
  grid: Sequence[float] = GRID,
  folds: int = 5,
) -> Callable[[Features, Features], dict[str, float]]:
  """Multinomial logistic regression, its regularisation chosen on train only.

  Minimises, as scikit-learn's `LogisticRegression` does,

    C sum_i CE(softmax(W^T x_i + b), y_i) + 1/2 ||W||^2

  over features standardised by the mean and deviation of train; b isn't
  penalised. C is the value of `grid` with the most correct predictions in
  stratified cross-validation within train (the smallest on ties); the
  classifier is then fitted to all of train. Nothing is random.

  Args:
    grid: values of C to choose from; a single one is used as it is.
    folds: folds of the cross-validation. Classes with fewer members are missing
      from some of them.

  Returns:
    An evaluator giving `top1` and, for more than five train classes, `top5`,
    the shares of test examples whose class is the first, or among the first
    five. Classes that train lacks are never predicted.

  Raises:
    ValueError: `grid` is empty or has values that aren't positive, or `folds`
      is less than 2.
  """
  grid = tuple(sorted(grid))
  if not grid or grid[0] <= 0 or folds < 2:
    raise ValueError(
      f'grid must be positive and folds at least 2, got {grid} and {folds}'
    )

  def evaluate(train: Features, test: Features) -> dict[str, float]:
    train, test = usable(_PROTOCOL, train, test)
    model = fit_logreg(train.vectors, train.labels, grid, folds)
    scores = decision(model, test.vectors)  # [N, K]
    order = np.argsort(-scores, axis=1, kind='stable')
    hits = model.classes[order] == test.labels[:, None]
    metrics = {'top1': float(hits[:, 0].mean())}
    if len(model.classes) > 5:
      metrics['top5'] = float(hits[:, :5].any(axis=1).mean())
    return metrics

  return evaluate


def decision(model: LogReg, vectors: np.ndarray) -> np.ndarray:
  """Logits [N, K] (float64) of a fitted classifier for features [N, D]."""
  standardised = (vectors.astype(np.float64) - model.mean) * model.scale
  return standardised @ model.weights + model.bias


def fit_logreg(
  vectors: np.ndarray, labels: np.ndarray, grid: Sequence[float], folds: int = 5
) -> LogReg:
  """Fits the classifier that `make_logreg` describes.

  Args:
    vectors: [N, D] finite features.
    labels: [N] labels; K different ones.
    grid: values of C in ascending order; cross-validated if there are several.
    folds: folds of the cross-validation.

  Returns:
    The classifier for the chosen C, fitted to all N examples.
  """
  classes, targets = np.unique(labels, return_inverse=True)
  x, mean, scale, basis = _standardise(vectors)
  num_classes, count = len(classes), len(targets)
  if num_classes == 1 or len(grid) == 1:
    c = grid[0]
  else:
    fold_of = stratified_folds(targets, folds)
    masks = fold_of[None] != np.arange(fold_of.max() + 1)[:, None]
    data = _blocks(x, targets, masks, num_classes)
    correct = _cross_validate(
      *data, np.asarray(grid, np.float32), num_classes=num_classes
    )
    c = grid[int(np.argmax(np.asarray(correct)))]
  data = _blocks(x, targets, np.ones((1, count), bool), num_classes)
  params = _refit(*data[:3], np.float32(c), num_classes=num_classes)
  params = np.asarray(params, np.float64)
  return LogReg(mean, scale, basis @ params[:-1], params[-1], classes, c)


def stratified_folds(targets: np.ndarray, folds: int) -> np.ndarray:
  """Deals the examples of each class to the folds in turn.

  The turn goes on from class to class, so the folds' sizes differ by at most
  one however small the classes are.

  Args:
    targets: [N] classes.
    folds: number of folds.

  Returns:
    [N] int32 fold of every example, below min(`folds`, N).
  """
  # Neighbouring files are often near-duplicates (frames, bursts): shuffled.
  shuffled = np.random.default_rng(0).permutation(len(targets))
  order = shuffled[np.argsort(targets[shuffled], kind='stable')]
  fold_of = np.empty(len(targets), np.int32)
  fold_of[order] = np.arange(len(targets)) % folds
  return fold_of


def _standardise(
  vectors: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Features in the basis of their principal components, and the way there.

  A rotation changes neither the penalty nor the minimum, but in this basis the
  Hessian is nearly diagonal, which saves L-BFGS most of its iterations on the
  strongly correlated features of an encoder.

  Returns:
    x [N, D + 1] float32, the last column 1; mean [D]; scale [D]; basis [D, D].
  """
  vectors = vectors.astype(np.float64)
  mean = vectors.mean(axis=0)
  std = vectors.std(axis=0)
  # What varies less than float32 resolves is constant: it must not be blown up.
  constant = std <= 1e-6 * np.abs(mean).clip(1e-30)
  scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, std))
  standardised = (vectors - mean) * scale
  _, basis = np.linalg.eigh(standardised.T @ standardised)
  x = np.ones((len(vectors), vectors.shape[1] + 1), np.float32)
  x[:, :-1] = standardised @ basis
  return x, mean, scale, basis


def _blocks(
  x: np.ndarray, targets: np.ndarray, masks: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Cuts the examples into blocks whose logits fit into memory.

  Args:
    x: [N, D].
    targets: [N].
    masks: [F, N] examples that each of the F problems is fitted to.
    num_classes: K.

  Returns:
    x [n, M, D], targets [n, M], weights [F, n, M] float32 (the masks) and held
    [F, n, M] float32 (their complements); both 0 for padding.
  """
  problems, count = masks.shape
  block = max(1, min(count, _MAX_LOGITS // (problems * num_classes)))
  blocks = -(-count // block)
  block = -(-count // blocks)
  padding = blocks * block - count
  x = np.pad(x, ((0, padding), (0, 0))).reshape(blocks, block, -1)
  targets = np.pad(targets, (0, padding)).reshape(blocks, block)
  weights, held = (
    np.pad(m.astype(np.float32), ((0, 0), (0, padding))).reshape(
      problems, blocks, block
    )
    for m in (masks, ~masks)
  )
  return x, targets.astype(np.int32), weights, held


@functools.partial(jax.jit, static_argnames=('num_classes',))
def _cross_validate(
  x: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  held: jax.Array,
  grid: jax.Array,
  *,
  num_classes: int,
) -> jax.Array:
  """Correct held-out predictions [len(grid)], all folds in one program."""

  def correct(params: jax.Array, held: jax.Array) -> jax.Array:
    def add(total, block):
      x, targets, held = block
      logits = jnp.matmul(x, params, precision=_HIGHEST)
      return total + jnp.sum(held * (jnp.argmax(logits, 1) == targets)), None

    return jax.lax.scan(add, 0.0, (x, targets, held))[0]

  def along_grid(params: jax.Array, c: jax.Array):
    # Started from the solution for the neighbouring C.
    params = jax.vmap(
      lambda p, w: _minimise(p, x, targets, w, c, tolerance=1e-3, max_evals=60)
    )(params, weights)
    return params, jax.vmap(correct)(params, held).sum()

  start = jnp.zeros((len(weights), x.shape[-1], num_classes))
  return jax.lax.scan(along_grid, start, grid)[1]


@functools.partial(jax.jit, static_argnames=('num_classes',))
def _refit(
  x: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  c: jax.Array,
  *,
  num_classes: int,
) -> jax.Array:
  """Parameters [D + 1, K] fitted to all examples."""
  start = jnp.zeros((x.shape[-1], num_classes))
  return _minimise(
    start, x, targets, weights[0], c, tolerance=1e-6, max_evals=1000
  )


def _minimise(
  params: jax.Array,
  x: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  c: jax.Array,
  *,
  tolerance: float,
  max_evals: int,
) -> jax.Array:
  """Minimises the objective of `make_logreg`.

  Args:
    params: [D + 1, K] start; the last row is the bias.
    x: [n, M, D + 1] blocks of examples, the last feature 1.
    targets: [n, M] classes.
    weights: [n, M] weights of the examples.
    c: inverse strength of the regularisation.
    tolerance: relative accuracy.
    max_evals: most evaluations.

  Returns:
    [D + 1, K] parameters.
  """
  # The Hessian's diagonal where all K classes are equally probable.
  energy = jnp.einsum('nmd,nm->d', x * x, weights, precision=_HIGHEST)
  penalty = jnp.ones(x.shape[-1]).at[-1].set(0.0)
  diagonal = (penalty + c * energy / params.shape[1])[:, None]
  return lbfgs.minimise(
    functools.partial(_objective, x, targets, weights, c),
    params,
    diagonal,
    tolerance=tolerance,
    max_evals=max_evals,
  )


def _objective(
  x: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  c: jax.Array,
  params: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The objective and its gradient [D + 1, K], summed over blocks."""

  def add(total, block):
    x, targets, weights = block
    log_p = jax.nn.log_softmax(jnp.matmul(x, params, precision=_HIGHEST))
    truth = jax.nn.one_hot(targets, params.shape[1])
    loss = -jnp.sum(weights * jnp.sum(truth * log_p, axis=1))
    residual = weights[:, None] * (jnp.exp(log_p) - truth)
    grad = jnp.matmul(x.T, residual, precision=_HIGHEST)
    return (total[0] + loss, total[1] + grad), None

  zero = (jnp.zeros(()), jnp.zeros_like(params))
  (loss, grad), _ = jax.lax.scan(add, zero, (x, targets, weights))
  penalised = params.at[-1].set(0.0)
  return c * loss + 0.5 * jnp.sum(penalised * penalised), c * grad + penalised
