"""Encoders from weight files alone, without a config."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors
from flax import linen as nn

from cmd_jax.convert import architecture, families, files, load, pretrained
from cmd_jax.errors import UserError
from cmd_jax.files import safe_read
from cmd_jax.models.layers import DTYPES


class Recognised(NamedTuple):
  """An encoder out of a file.

  Attributes:
    encoder: the module.
    imported: its variables, and what became of the file's tensors.
    metadata: strings that a .safetensors file has beside its tensors.
  """

  encoder: nn.Module
  imported: load.Imported
  metadata: Mapping[str, str]


def _metadata(path: pathlib.Path) -> dict[str, str]:
  """What `save.save_encoder` and others write beside the tensors."""
  try:
    with safetensors.safe_open(path, framework='np') as file:
      return dict(file.metadata() or {})
  except (OSError, safetensors.SafetensorError):
    # Of another format, or damaged, which reading the tensors will tell.
    return {}


def _from_description(text: str) -> nn.Module | None:
  """The module that `save.save_encoder` described; None if it can't be told."""
  try:
    fields = safe_read.parse_json(text)
    fields = {
      name: tuple(value) if isinstance(value, list) else value
      for name, value in fields.items()
    }
    cls = architecture.class_of(fields.pop('name'))
    encoder = cls(**fields | {'dtype': DTYPES[fields['dtype']]})
    return encoder if architecture.is_of_usual_depth(encoder) else None
  except (AttributeError, LookupError, TypeError, ValueError):
    return None


def recognise_encoder(
  path: str | pathlib.Path, *, network: str = 'teacher', **changes: Any
) -> Recognised:
  """Reads an encoder from a file whose architecture nobody tells.

  Files that `save.save_encoder` wrote describe their encoder. Of others the
  shapes tell everything but a ViT's number of heads (the usual ones of its
  width are taken), the epsilon of a Swin's norms (1e-6) and the size of image a
  Swin is built for (224).

  Args:
    path: of a weight file, see `files.read_tensors`, a name of
      `pretrained.WEIGHTS`, or an address that `hub.parse` takes apart.
    network: 'teacher' or 'student', where the file has both.
    **changes: fields of config.model that are other than that.

  Raises:
    UserError: as `load.load_encoder`.
  """
  path = pretrained.resolve(path)
  metadata = _metadata(path)
  encoder = None
  if not changes and 'architecture' in metadata:
    encoder = _from_description(metadata['architecture'])
  if encoder is None:
    tensors = files.read_tensors(path, network=network).tensors
    try:
      encoder = architecture.make_fitting(families.to_timm(tensors), **changes)
    except UserError as error:
      raise UserError(f'{path}: {error}') from error
  try:
    imported = load.load_encoder(path, encoder, network=network)
  # Whatever an encoder of impossible sizes raises while it is made.
  except (ArithmeticError, LookupError, TypeError, ValueError) as error:
    raise UserError(
      f'{path} is of an encoder that cannot be made '
      f'({safe_read.one_line(error)}): give another file'
    ) from error
  return Recognised(encoder, imported, metadata)
