"""Fine-tuning: an encoder and a linear classifier, by the labels there are.

Both global views of an image are learned from (Hoffer et al. 2020, "Augment
your batch"); local views are not looked at. The moving average of the network
that every run keeps can be scored as its teacher, but nothing is learned from
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cmd_jax.data.batch import Views
from cmd_jax.errors import UserError
from cmd_jax.losses import classification
from cmd_jax.methods import metrics
from cmd_jax.methods.base import (
  Loss,
  Method,
  MethodState,
  Params,
  Setting,
)
from cmd_jax.methods.networks import (
  Networks,
  Stats,
  apply_networks,
  draw_uniforms,
  encoder_variables,
  init_networks,
  make_networks,
)
from cmd_jax.models import partial
from cmd_jax.models.layers import Dense, images_like

# Salt of the keys of mixup; those of stochastic depth are salted by 0.
_MIX_UP = 1


@dataclasses.dataclass(frozen=True)
class FineTune:
  """A classifier over the image embedding, trained with its encoder.

  Attributes:
    setting: what it is built for.
    networks: the encoder.
    classifier: image embedding [..., D] -> logits [..., C].
    class_weights: [C] weights of the classes, of mean 1 over the images.
    label_smoothing: share of a target that goes to all classes evenly.
    mixup: alpha of the Beta distribution of shares; 0 mixes nothing.
  """

  setting: Setting
  networks: Networks
  classifier: nn.Module
  class_weights: np.ndarray
  label_smoothing: float
  mixup: float

  def as_method(self) -> Method:
    """The method, for the train step."""
    return Method(
      init=self.init,
      loss=self.loss,
      encoder_variables=self.encoder_variables,
      finish=metrics.finish,
      # Mixup pairs the images of a batch.
      is_mean_over_examples=not self.mixup,
    )

  def init(self, rng: jax.Array) -> tuple[Params, MethodState]:
    """See `Method`."""
    rngs = jax.random.split(rng)
    image_px = self.setting.image_px
    params, stats = init_networks(self.networks, rngs[0], image_px)
    image = jnp.zeros(images_like(self.networks.encoder, image_px).shape)
    output, _ = jax.eval_shape(
      self.networks.encoder.init_with_output, rngs[0], image
    )
    params['classifier'] = self.classifier.init(
      rngs[1], jnp.zeros(output.image.shape)
    )['params']
    if not stats:
      return params, {}
    return params, {
      'student_stats': stats,
      'teacher_stats': jax.tree.map(jnp.copy, stats),
    }

  def _mix(
    self, images: jax.Array, targets: jax.Array, keys: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    if not self.mixup:
      return images, targets

    def draw(key):
      key = jax.random.fold_in(key, _MIX_UP)
      return jax.random.beta(key, self.mixup, self.mixup)

    return classification.mix_up(images, targets, jax.vmap(draw)(keys))

  def loss(
    self,
    params: Params,
    teacher_params: Params,
    state: MethodState,
    views: Views,
    keys: jax.Array,
    step: jax.Array,
  ) -> Loss:
    """See `Method`; `views.labels` are the classes."""
    del teacher_params, step
    params = partial.freeze(params, self.setting.is_frozen)
    depth = self.networks.encoder.depth
    targets = classification.smooth_targets(
      views.labels, len(self.class_weights), self.label_smoothing
    )
    images, targets = self._mix(views.global_views, targets, keys)
    (view,), stats = apply_networks(
      self.networks,
      params,
      state.get('student_stats', {}),
      (images,),
      [draw_uniforms(keys, 0, images.shape[1], depth)],
    )
    logits = self.classifier.apply(
      {'params': params['classifier']}, view.embedding
    ).astype(jnp.float32)
    mean = classification.cross_entropy(
      logits, targets, jnp.asarray(self.class_weights)
    ).mean()
    hits = jnp.argmax(logits, -1) == views.labels[:, None]
    direction = metrics.mean_direction(view.embedding)
    return Loss(
      mean,
      {'class': mean},
      {
        # Of mixed images, how often the first one is what is seen.
        'accuracy': hits.astype(jnp.float32).mean(),
        'mean_direction': jax.lax.stop_gradient(direction),
      },
      # Those of the moving average are the student's.
      {
        name: partial.keep_frozen(stats, value, self.setting.is_frozen)
        for name, value in state.items()
      },
    )

  def encoder_variables(self, params: Params, stats: Stats) -> Mapping:
    """See `Method`."""
    return encoder_variables(self.networks, params, stats)


def weigh_classes(counts: Sequence[int], balance: float) -> np.ndarray:
  """Weights by which rare classes count as often as common ones.

  In expectation the loss is that of drawing every image n ** -balance times as
  often, n being the images of its class.

  Args:
    counts: C numbers of training images.
    balance: 0 for no weights, 1 for classes that count alike.

  Returns:
    [C] float32, of mean 1 over the images; 0 for a class without images.
  """
  counts = np.asarray(counts, np.float64)
  weights = np.where(counts > 0, np.maximum(counts, 1) ** -balance, 0)
  return (weights * counts.sum() / (weights @ counts)).astype(np.float32)


def make_finetune(
  setting: Setting,
  *,
  class_counts: Sequence[int],
  label_smoothing: float,
  mixup: float,
  class_balance: float,
) -> Method:
  """Builds fine-tuning.

  Args:
    setting: what it is built for.
    class_counts: training images of each of the C classes.
    label_smoothing: share of a target that goes to all classes evenly.
    mixup: alpha of the Beta distribution of shares; 0 mixes nothing.
    class_balance: see `weigh_classes`.

  Raises:
    UserError: fewer than two classes.
  """
  if len(class_counts) < 2:
    raise UserError(
      f'there are {len(class_counts)} classes to tell apart: label images of '
      'two classes or more'
    )
  return FineTune(
    setting,
    make_networks(setting, regions=False, has_image_head=False),
    Dense(len(class_counts), dtype=setting.encoder.dtype),
    weigh_classes(class_counts, class_balance),
    label_smoothing,
    mixup,
  ).as_method()
