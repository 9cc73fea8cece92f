"""A linear classifier trained by SGD: `linear/esvit4`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cmd_jax.evaluators.features import Features, usable

_PROTOCOL = 'linear/esvit4'


def make_esvit4(
  *,
  num_epochs: int = 100,
  batch_size: int = 256,
  learning_rate: float = 1e-3,
  momentum: float = 0.9,
  seed: int = 0,
) -> Callable[[Features, Features], dict[str, float]]:
  """`linear/esvit4`: the linear evaluation of DINO and EsViT (eval_linear.py).

  SGD with momentum and without weight decay on the cross entropy; the learning
  rate, for a batch of 256, falls to 0 by a cosine, epoch by epoch; weights
  start at N(0, 0.01^2), biases at 0. The features are those of
  `models.last_blocks`, of the last four blocks.

  It departs from the released program where that augments (random crops and
  flips of the training images: here features are frozen, of one central view),
  reports the best epoch on the test images (here the last), and counts an
  incomplete last batch (here left out).

  Args:
    num_epochs: passes over train.
    batch_size: of a step; all of train where it is smaller.
    learning_rate: of the first epoch, per 256 examples of a batch.
    momentum: of SGD.
    seed: of the initial weights and the order.

  Returns:
    An evaluator giving `top1` and, for more than five classes, `top5`.

  Raises:
    ValueError: a number that isn't positive.
  """
  if min(num_epochs, batch_size, learning_rate) <= 0:
    raise ValueError('num_epochs, batch_size, learning_rate must be positive')

  def evaluate(train: Features, test: Features) -> dict[str, float]:
    train, test = usable(_PROTOCOL, train, test)
    num_classes = len(train.class_names)
    batch = min(batch_size, len(train.labels))
    params = _fit(
      train.vectors,
      train.labels,
      jax.random.key(seed),
      learning_rate * batch / 256,
      num_classes=num_classes,
      num_epochs=num_epochs,
      batch_size=batch,
      momentum=momentum,
    )
    weights, bias = (np.asarray(x, np.float64) for x in params)
    logits = test.vectors @ weights + bias
    order = np.argsort(-logits, axis=1, kind='stable')
    hits = order == test.labels[:, None]
    scores = {'top1': float(hits[:, 0].mean())}
    if num_classes > 5:
      scores['top5'] = float(hits[:, :5].any(axis=1).mean())
    return scores

  return evaluate


@functools.partial(
  jax.jit,
  static_argnames=('num_classes', 'num_epochs', 'batch_size', 'momentum'),
)
def _fit(
  vectors: jax.Array,
  labels: jax.Array,
  rng: jax.Array,
  learning_rate: jax.Array,
  *,
  num_classes: int,
  num_epochs: int,
  batch_size: int,
  momentum: float,
) -> tuple[jax.Array, jax.Array]:
  """Weights [D, K] and bias [K] after all epochs, in one program."""
  steps_per_epoch = len(vectors) // batch_size
  init_rng, order_rng = jax.random.split(rng)
  shape = (vectors.shape[1], num_classes)
  params = 0.01 * jax.random.normal(init_rng, shape), jnp.zeros(num_classes)

  def schedule(step: jax.Array) -> jax.Array:
    epoch = step // steps_per_epoch
    return learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * epoch / num_epochs))

  optimizer = optax.sgd(schedule, momentum)

  def loss(params, rows):
    weights, bias = params
    logits = (
      jnp.matmul(vectors[rows], weights, precision=jax.lax.Precision.HIGHEST)
      + bias
    )
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, labels[rows]
    ).mean()

  def step(carry, rows):
    params, opt_state = carry
    updates, opt_state = optimizer.update(
      jax.grad(loss)(params, rows), opt_state
    )
    return (optax.apply_updates(params, updates), opt_state), None

  def epoch(carry, number):
    key = jax.random.fold_in(order_rng, number)
    order = jax.random.permutation(key, len(vectors))
    order = order[: steps_per_epoch * batch_size].reshape(-1, batch_size)
    return jax.lax.scan(step, carry, order)[0], None

  carry = params, optimizer.init(params)
  return jax.lax.scan(epoch, carry, jnp.arange(num_epochs))[0][0]
