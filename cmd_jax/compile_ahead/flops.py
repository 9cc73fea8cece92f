"""Floating-point operations of a step, counted by hand."""

from __future__ import annotations

from ml_collections import ConfigDict

from cmd_jax.models import make_encoder

_METHODS = ('cmd', 'esvit', 'dino')


def can_count(config: ConfigDict) -> bool:
  """Whether `count_flops` knows the encoder and the method of a config."""
  return config.model.name == 'vit' and config.method.name in _METHODS


def count_flops(config: ConfigDict) -> dict[str, float]:
  """Floating-point operations of an image by part of the step.

  Counted by hand from the shapes: 2 a multiplication of the ViT, the heads and
  the prototypes, once for the teacher's views and three times for the
  student's, whose gradient takes twice its forward pass. Norms, softmax,
  losses, augmentation and the optimiser are left out.

  Args:
    config: of a ViT and a method with prototypes, see `can_count`.
  """
  model, views, head = make_encoder(**config.model), config.augment, config.head
  width, depth = model.width, model.depth

  def patches(view_px):
    return (view_px // model.patch_px) ** 2

  def encoder(view_px):
    embedding = patches(view_px) * width * 3 * model.patch_px**2
    tokens = patches(view_px) + 1
    linear = (4 + 2 * config.model.mlp_ratio) * tokens * width**2
    attention = 2 * tokens**2 * width
    return 2 * (embedding + depth * (linear + attention))

  def rows(view_px):
    # DINO alone does not look at patches.
    return 1 + (config.method.name != 'dino') * patches(view_px)

  hidden, bottleneck = head.hidden_dim, head.bottleneck_dim
  one_row = width * hidden + hidden * bottleneck
  one_row += (head.num_layers - 2) * hidden**2
  teacher_rows = 2 * rows(views.global_px)
  student_rows = teacher_rows + views.num_local * rows(views.local_px)
  teacher = 2 * encoder(views.global_px)
  student = teacher + views.num_local * encoder(views.local_px)
  counted = teacher_rows + 3 * student_rows
  return {
    'encoder': teacher + 3 * student,
    'heads': 2 * one_row * counted,
    'prototypes': 2 * bottleneck * head.num_prototypes * counted,
  }
