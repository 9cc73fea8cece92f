"""Fine-tuning: its loss, its weights of classes, and what it learns."""

import jax
import numpy as np
import pytest

from cmd_jax.data.batch import Views
from cmd_jax.errors import UserError
from cmd_jax.losses import classification
from cmd_jax.methods import finetune
from tests import tiny

_LABELS = np.int32([0, 1, 2, 0])


def _views():
  images = np.random.default_rng(0).normal(size=(4, 2, 16, 16, 3))
  return Views(images.astype(np.float32), labels=_LABELS)


def _draw(method):
  shapes = jax.eval_shape(method.init, jax.random.key(0))
  return tiny.draw_like(shapes, scale=0.3)


def _loss(method, params, state, views):
  keys = jax.random.split(jax.random.key(1), 4)
  return jax.jit(method.loss)(params, params, state, views, keys, 0)


def test_the_loss_is_that_of_the_classifier_of_both_views():
  method = tiny.make_tiny_method('finetune', drop_path=0.0, class_balance=1.0)
  params, state = _draw(method)
  views = _views()
  got = _loss(method, params, state, views)
  images = views.global_views.reshape(8, 16, 16, 3)
  image = tiny.encode(method, params, {}, images).image
  layer = params['classifier']
  logits = np.asarray(image) @ layer['kernel'] + layer['bias']
  logits = logits.reshape(4, 2, 3)
  # Four images of the first class and two of the others: 8 / 3 over both.
  weights = np.float32([2 / 3, 4 / 3, 4 / 3])

  @jax.jit
  def compare(logits):
    targets = classification.smooth_targets(_LABELS, 3, 0.1)
    return classification.cross_entropy(logits, targets, weights).mean()

  wanted = compare(logits)
  np.testing.assert_allclose(got.mean, wanted, rtol=1e-5)
  hits = logits.argmax(-1) == _LABELS[:, None]
  np.testing.assert_allclose(got.stats['accuracy'], hits.mean())


@pytest.mark.parametrize(
  'balance, wanted', [(0.0, [1, 1, 1]), (1.0, [2 / 3, 2, 0])]
)
def test_weights_of_classes(balance, wanted):
  counts = [6, 2, 0]
  weights = finetune.weigh_classes(counts, balance)
  np.testing.assert_allclose(weights[:2], wanted[:2], rtol=1e-6)
  assert weights[2] == 0
  np.testing.assert_allclose(weights @ counts, 8)


def test_mixup_mixes_and_is_a_matter_of_the_batch():
  plain = tiny.make_tiny_method('finetune', drop_path=0.0)
  mixed = tiny.make_tiny_method('finetune', drop_path=0.0, mixup=1.0)
  assert plain.is_mean_over_examples and not mixed.is_mean_over_examples
  params, state = _draw(plain)
  views = _views()
  losses = [_loss(m, params, state, views).mean for m in (plain, mixed)]
  assert losses[0] != losses[1]


def test_one_class_is_refused():
  with pytest.raises(UserError, match='1 classes to tell apart'):
    tiny.make_tiny_method('finetune', class_counts=(4,))


def test_it_learns_a_batch_by_heart():
  step, state = tiny.make_step('finetune', drop_path=0.0)
  batch = tiny.make_batch()
  seen = []
  for _ in range(12):
    state, metrics = step(state, batch, jax.random.key(1))
    seen.append(float(metrics['loss/class']))
  assert seen[-1] < seen[0] - 0.05
  moved = state.params['encoder'], state.params['classifier']
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(moved))
