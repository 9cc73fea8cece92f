"""PARTICLE (Saha & Maji 2023), and DetCon: the contrast of parts.

Both are one method; they differ in where the parts come from, clusters of
features or an image's segments. With an image term it is the released ViT
variant, without the ResNet variant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.losses import detcon
from cmd_jax.losses.blockwise import Scores
from cmd_jax.methods import base, comparison, dino, distillation
from cmd_jax.methods.base import MethodState, Params, Seen, Term
from cmd_jax.methods.centring import Centring
from cmd_jax.methods.networks import draw_uniforms, prototypes_of
from cmd_jax.methods.part_networks import (
  PartNetworks,
  Parts,
  Sampling,
  apply_view_by_view,
  check_sampling,
  init_part_networks,
  make_part_networks,
  project_parts,
)
from cmd_jax.models import partial
from cmd_jax.models.heads import l2_normalise
from cmd_jax.optim.schedules import Schedule


class Examples(NamedTuple):
  """What the networks say of each example, prototypes aside.

  Attributes:
    images: of whole images.
    parts: of parts, by both networks.
  """

  images: comparison.Examples
  parts: Parts


class Outputs(NamedTuple):
  """Everything the terms of the loss are made of.

  Attributes:
    distilled: outputs for whole images; None without the image term.
    parts: outputs for parts.
  """

  distilled: comparison.Outputs | None
  parts: Parts


def _part_monitors(parts: Parts, axis_name: str | None) -> dict[str, jax.Array]:
  """Scalars that show a collapse, or views that share no parts."""
  monitors = sharding.pmean(
    {
      'direction': l2_normalise(parts.targets).mean((0, 1, 2)),
      'positives': detcon.share_with_positives(
        parts.prediction_ids, parts.target_ids
      ).mean(),
    },
    axis_name,
  )
  # 1 for directions spread evenly over the sphere, 0 for a single one.
  spread = jnp.sqrt(jnp.maximum(1 - jnp.sum(monitors['direction'] ** 2), 0))
  return {'part_spread': spread, 'part_positives': monitors['positives']}


def _make_terms(
  weights: Mapping[str, float],
  temperature: float,
  local_negatives: bool,
  axis_name: str | None,
) -> dict[str, Term]:
  if not weights.get('parts'):
    raise UserError(
      "config.method.weights has no 'parts': set it above 0, or choose the "
      "method 'dino'"
    )

  def image_value(outputs: Outputs) -> jax.Array:
    return dino.image_value(outputs.distilled)

  def parts_value(outputs: Outputs) -> jax.Array:
    return detcon.part_contrast(
      *outputs.parts,
      temperature=temperature,
      local_negatives=local_negatives,
      axis_name=axis_name,
    )

  values = {'image': image_value, 'parts': parts_value}
  return base.weighted_terms(values, weights)


def make_particle(
  encoder: nn.Module,
  *,
  head: Mapping,
  weights: Mapping[str, float],
  num_parts: int,
  num_samples: int,
  projector: Mapping,
  predictor: Mapping,
  temperature: float,
  local_negatives: bool,
  match_empty_parts: bool,
  lora: Mapping,
  axis_name: str | None,
  **kwargs,
) -> base.Method:
  """Builds PARTICLE or DetCon; its `forward` takes `PartViews` as the views.

  Student and teacher share their running batch statistics: both update them,
  the teacher first, as in the released ResNet program, which swaps the weights
  of one network (train_particle_resnet.py). The ViT program has two networks,
  but no such statistics; where the image head of a ViT normalises by the batch
  (`head.use_bn`) its statistics are shared likewise.

  The released programs draw parts without replacement, so where a view has
  fewer parts than samples they contrast empty ones, whose features are 0, and
  pull a part that is out of sight in the other view towards that constant.
  DetCon draws present parts alone. `match_empty_parts=False` keeps the draw but
  takes empty parts from the positives on both sides.

  Args:
    encoder: images -> `EncoderOutput` with a grid of tokens.
    head: arguments of `PrototypeHead`, for the image term.
    weights: weights of the terms `parts` and `image`, DINO's.
    num_parts: P, one more than the largest part id.
    num_samples: S, parts drawn from each view, at most P.
    projector: arguments of `make_mlp_head`.
    predictor: likewise, without `output_dim`, which is the projector's.
    temperature: tau of the contrast.
    local_negatives: whether other parts of the same image are negatives.
    match_empty_parts: whether empty parts can be positives, as released.
    lora: argument of `make_networks`.
    axis_name: axis over which the batch is spread, None if it is global.
    **kwargs: arguments of `make_distillation`.

  Raises:
    UserError: a number or a choice that cannot be.
  """
  sampling = Sampling(num_parts, num_samples, match_empty_parts)
  check_sampling(sampling)
  terms = _make_terms(weights, temperature, local_negatives, axis_name)
  modules = make_part_networks(
    encoder,
    head=head,
    has_image_head='image' in terms,
    projector=projector,
    predictor=predictor,
    lora=lora,
    axis_name=axis_name,
  )
  images_only = distillation.make_distillation(
    modules.networks, terms, axis_name=axis_name, **kwargs
  )
  return _add_parts(images_only, modules, sampling, axis_name, **kwargs)


def _add_parts(
  images_only: base.Method,
  modules: PartNetworks,
  sampling: Sampling,
  axis_name: str | None,
  *,
  image_px: int,
  teacher_temperature: Schedule,
  teacher_normalisation: str,
  centre_momentum: float,
  mesh: Mesh | None = None,
  is_frozen: partial.IsFrozen = lambda path: False,
  **_,
) -> base.Method:
  """The method on whole images, with parts beside them."""
  networks = modules.networks
  centring = Centring(teacher_normalisation, centre_momentum, axis_name, mesh)

  def init(rng: jax.Array) -> tuple[Params, MethodState]:
    params, stats = init_part_networks(modules, rng, image_px)
    method_state = {}
    if modules.has_image_head:
      centre = jnp.zeros(networks.image_head.num_prototypes)
      method_state['image_centre'] = centre
    if stats:
      method_state['student_stats'] = stats
      method_state['teacher_stats'] = jax.tree.map(jnp.copy, stats)
    return params, method_state

  def forward(params, teacher_params, method_state, views, keys, step):
    params = partial.freeze(params, is_frozen)
    stats = method_state.get('student_stats', {})
    # Local views have no parts: without the image term nothing looks at them.
    images = views.images if modules.has_image_head else views.images[:1]
    (teacher,), stats = jax.lax.stop_gradient(
      apply_view_by_view(networks, teacher_params, stats, views.images[:1])
    )
    uniforms = [
      draw_uniforms(keys, index, x.shape[1], networks.encoder.depth)
      for index, x in enumerate(images)
    ]
    student, stats = apply_view_by_view(
      networks, params, stats, images, uniforms
    )
    parts = project_parts(
      modules,
      params,
      teacher_params,
      student[0],
      teacher,
      views,
      keys,
      sampling,
    )
    prototypes = jax.lax.stop_gradient(prototypes_of(networks, teacher_params))
    temperature = teacher_temperature(step)
    of_images, targets = comparison.gather_examples(student, teacher)
    centres = centring.centres(method_state, targets, prototypes, temperature)
    return Seen(
      Examples(of_images, parts),
      targets,
      prototypes_of(networks, params),
      comparison.Constants(prototypes, centres, temperature),
      {'student_stats': stats, 'teacher_stats': stats},
    )

  def scores(prototypes, constants, examples, targets) -> Scores:
    return images_only.scores(prototypes, constants, examples.images, targets)

  def outputs(scores, normalisers, examples, targets) -> Outputs:
    distilled = None
    if modules.has_image_head:
      distilled = images_only.outputs(
        scores, normalisers, examples.images, targets
      )
    return Outputs(distilled, examples.parts)

  def example_monitors(outputs: Outputs) -> dict[str, jax.Array]:
    if outputs.distilled is None:
      return {}
    return images_only.example_monitors(outputs.distilled)

  def monitors(seen: Seen) -> dict[str, jax.Array]:
    values = _part_monitors(seen.examples.parts, axis_name)
    if modules.has_image_head:
      values |= images_only.monitors(seen)
    return values

  return images_only._replace(
    init=init,
    forward=forward,
    scores=scores,
    outputs=outputs,
    example_monitors=example_monitors,
    monitors=monitors,
    # The contrast is with the parts of all other examples.
    sums_over_examples=False,
  )
