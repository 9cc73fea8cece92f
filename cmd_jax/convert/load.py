"""Encoders from the weight files of other programs, and from our own."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cmd_jax.convert import architecture, entries, families, files, pretrained
from cmd_jax.errors import UserError
from cmd_jax.files.safe_read import one_line
from cmd_jax.models.positions import (
  interpolate_positions,
  resize_bias_table,
)
from cmd_jax.models.swin import SwinTransformer
from cmd_jax.models.vit import VisionTransformer

_LISTED = 12
# The rule for the bias tables of a Swin in timm's naming.
_OF_TIMM = 'timm'
# Reasons beside others.
_FEW = 3

# What the encoder itself consists of, as opposed to heads and classifiers:
# a name left over here means that the network is another one.
_OF_ENCODER = {
  'vit': r'(blocks|patch_embed|norm|embeddings|encoder|layers?|rope)\.'
  r'|(pos_embed|cls_token|reg_token)$|Transformer\.',
  'swin': r'(layers|patch_embed|norm)\.',
  'resnet': r'(conv1|bn1|layer\d)\.',
  'efficientnet': r'_(conv_stem|bn0|blocks|conv_head|bn1)\.',
}


class Report(NamedTuple):
  """What became of the tensors of a file.

  Attributes:
    path: of the file.
    sha256: of the file.
    format: of the file, as `files.read_tensors` tells it.
    family: whose naming it is.
    matched: names of the parameters that were taken, as the tables name them.
    missing: those that the file lacks; a loaded encoder has none.
    unexpected: what is no part of the encoder, such as classifiers.
    resized: those that were interpolated to another grid or window.
    cast: those that were of another type than float32.
    notes: what else was changed, in words.
    is_lost: whether the file is gone and only what it was is known.
  """

  path: str
  sha256: str
  format: str
  family: str
  matched: tuple[str, ...]
  missing: tuple[str, ...]
  unexpected: tuple[str, ...]
  resized: tuple[str, ...]
  cast: tuple[str, ...]
  notes: tuple[str, ...]
  is_lost: bool = False

  def text(self) -> str:
    """The report to print: counts, and the first names of every list."""
    if self.is_lost:
      return (
        f'{self.path} is not there any more: the run goes on from its '
        f'checkpoint; it started from {self.family}, sha256 {self.sha256}'
      )
    lines = [f'{self.path}: {self.family}, {self.format}, sha256 {self.sha256}']
    for what in ('matched', 'missing', 'unexpected', 'resized', 'cast'):
      names = getattr(self, what)
      title = 'cast to float32' if what == 'cast' else what
      lines.append(f'  {title}: {len(names)}')
      if names and what != 'matched':
        lines[-1] += f' ({_listed(names)})'
    return '\n'.join(lines + [f'  note: {note}' for note in self.notes])


def report_of_lost(start: Mapping[str, Any]) -> Report:
  """The report of a file that is gone, by what results.json says of it.

  Args:
    start: as `training.scoring.describe_start` makes it.
  """
  return Report(
    path=start['path'],
    sha256=start['sha256'],
    format='',
    family=start['family'],
    matched=(),
    missing=(),
    unexpected=(),
    resized=tuple(start['resized']),
    cast=(),
    notes=(),
    is_lost=True,
  )


class Imported(NamedTuple):
  """Weights for an encoder.

  Attributes:
    variables: {'params': ...}, for networks with batch normalisation with
      'batch_stats' too; float32 numpy arrays. None of a file that is gone.
    report: where they come from.
  """

  variables: dict[str, Any] | None
  report: Report


def _listed(names: Sequence[str]) -> str:
  more = f' and {len(names) - _LISTED} more' if len(names) > _LISTED else ''
  return ', '.join(names[:_LISTED]) + more


def _as_float32(name: str, tensor: np.ndarray, path: str) -> np.ndarray:
  if not jnp.issubdtype(tensor.dtype, jnp.floating):
    raise UserError(
      f'{name} in {path} is {tensor.dtype}, not floating: give the file of a '
      'model that is not quantised'
    )
  # float64 beyond float32 becomes infinite and is refused as such.
  with np.errstate(over='ignore'):
    tensor = tensor.astype(np.float32, copy=False)
  if not np.isfinite(tensor).all():
    raise UserError(
      f'{name} in {path} has values that are not finite: the file is damaged '
      'or its training diverged; give another'
    )
  return tensor


def _resize(
  name: str, tensor: np.ndarray, shape: tuple, interpolation: str
) -> np.ndarray | None:
  """A tensor for another grid or window; None if that is not what differs."""
  if (
    name == 'pos_embed'
    and tensor.ndim == 3
    and tensor.shape[::2] == shape[::2]
    and len(tensor[0]) > 1
  ):
    side = math.isqrt(shape[1])
    # One more than those of a square grid is that of the class token.
    first = shape[1] - side**2
    patches = interpolate_positions(
      tensor[:, first:], (side, side), interpolation
    )
    return np.concatenate([tensor[:, :first], np.asarray(patches)], axis=1)
  if (
    name.endswith('.relative_position_bias_table')
    and tensor.ndim == 2
    and tensor.shape[1] == shape[1]
    and round(len(tensor) ** 0.5) ** 2 == len(tensor)
  ):
    side = round(shape[0] ** 0.5)
    if interpolation == _OF_TIMM:
      return resize_bias_table(tensor, side)
    return np.asarray(interpolate_positions(tensor[None], (side, side)))[0]
  return None


def _refuse(path: str, renamed: families.Renamed, problems: list[str]) -> None:
  """Raises UserError if the file is of another network than the encoder."""
  if not problems:
    return
  left = _what_never_fits(renamed)
  if left:
    more = '; '.join(x for x in left if x not in problems)
    nearest = f', nor does the nearest ({more})' if more else ''
    advice = f'No encoder here fits it{nearest}: choose other weights'
  else:
    advice = f'The file fits {architecture.flags_that_fit(renamed)}'
  raise UserError(
    f'{path} ({renamed.family}) is not the encoder of the config: '
    f'{"; ".join(problems)}. {advice}'
  )


def _what_never_fits(renamed: families.Renamed) -> list[str]:
  """Tries the encoder of the flags; what of the file is still unlike it."""
  try:
    encoder = architecture.make_fitting(renamed)
    name, table = architecture.table_of(encoder)
    shapes = architecture.torch_shapes(encoder, table)
  except UserError as error:
    return [str(error)]
  # Whatever an encoder of impossible sizes raises while it is made.
  except (ArithmeticError, LookupError, TypeError, ValueError) as error:
    return [one_line(error)]
  problems = _differences(name, renamed, shapes)
  if not problems:
    problems = _check_the_rest(encoder, renamed)[0]
    problems += _misshapen(renamed, shapes, _interpolation_of(encoder))
  return problems[:_FEW]


def _misshapen(
  renamed: families.Renamed, shapes: Mapping[str, tuple], interpolation: str
) -> list[str]:
  """The tensors that neither have the shape of the encoder nor can get it."""
  found = []
  for name, shape in shapes.items():
    tensor = renamed.tensors[name]
    if tensor.shape != shape and (
      _resize(name, tensor, shape, interpolation) is None
    ):
      found.append(_of_shapes(name, tensor.shape, shape))
  return found


def _interpolation_of(encoder: nn.Module) -> str:
  """How an encoder resizes positions; encoders without resize as 'dino'."""
  return getattr(encoder, 'interpolation', 'dino')


def _rule_of(encoder: nn.Module, tensors: Mapping[str, np.ndarray]) -> str:
  """How a file's tensors are resized; a Swin's by the program that named it.

  In timm a stage merges before its blocks, in Microsoft's and EsViT's after.
  """
  of_timm = not any('layers.0.downsample.' in name for name in tensors)
  if isinstance(encoder, SwinTransformer) and of_timm:
    return _OF_TIMM
  return _interpolation_of(encoder)


def _of_shapes(name: str, there: tuple, here: tuple) -> str:
  return f'{name} is {list(there)} in the file and {list(here)} in the encoder'


def _differences(
  name: str, renamed: families.Renamed, shapes: Mapping[str, tuple]
) -> list[str]:
  """How the names in a file and those of an encoder differ, in words."""
  if renamed.architecture != name:
    return [f'it holds a {renamed.architecture}, the encoder is a {name}']
  problems = []
  missing = [n for n in shapes if n not in renamed.tensors]
  if missing:
    problems.append(f'it lacks {len(missing)} parameters ({_listed(missing)})')
  pattern = _OF_ENCODER[name]
  extra = [
    n for n in renamed.tensors if n not in shapes and re.match(pattern, n)
  ]
  if extra:
    problems.append(
      f'it has {len(extra)} parameters that the encoder lacks '
      f'({_listed(extra)})'
    )
  return problems


def _check_the_rest(
  encoder: nn.Module, renamed: families.Renamed
) -> tuple[list[str], list[str]]:
  """Problems and notes about what the shapes cannot tell."""
  if isinstance(encoder, SwinTransformer):
    return [], [
      f'config.model.norm_epsilon is {encoder.norm_epsilon}, which the file '
      'does not tell: EsViT has 1e-06, Microsoft and timm have 1e-05'
    ]
  if not isinstance(encoder, VisionTransformer):
    return [], []
  heads, notes = encoder.num_heads, []
  if renamed.num_heads not in (None, heads):
    return [
      f'it has {renamed.num_heads} attention heads, the encoder has {heads}'
    ], []
  usual = architecture.usual_heads(encoder.width)
  if renamed.num_heads is None and heads != usual:
    instead = f', usual for this width are {usual}' if usual else ''
    notes.append(
      f'the file does not tell its attention heads: {heads} were taken{instead}'
    )
  for field, published in (
    ('norm_epsilon', architecture.family_epsilon(renamed.family)),
    ('gelu', architecture.family_gelu(renamed.family)),
  ):
    if getattr(encoder, field) != published:
      notes.append(
        f'config.model.{field} is {getattr(encoder, field)}, weights of '
        f'{renamed.family} are published with {published}'
      )
  rule = architecture.family_interpolation(renamed)
  if encoder.positions == 'learned' and encoder.interpolation != rule:
    notes.append(
      f'config.model.interpolation is {encoder.interpolation}, the program of '
      f'weights of {renamed.family} resizes positions by {rule}: it matters '
      f'for views other than {encoder.image_px} px and a file of another grid'
    )
  return [], notes


def _fit(
  renamed: families.Renamed,
  shapes: Mapping[str, tuple],
  path: str,
  interpolation: str,
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
  """The tensors in float32 and in shape, the resized, and what cannot be."""
  tensors, resized, misshapen = {}, [], []
  for name, shape in shapes.items():
    tensor = _as_float32(name, renamed.tensors[name], path)
    if tensor.shape == shape:
      tensors[name] = tensor
      continue
    fitting = _resize(name, tensor, shape, interpolation)
    if fitting is None:
      misshapen.append(_of_shapes(name, tensor.shape, shape))
    else:
      resized.append(name)
      tensors[name] = fitting
  return tensors, resized, misshapen


def load_encoder(
  path: str | pathlib.Path, encoder: nn.Module, *, network: str = 'teacher'
) -> Imported:
  """Reads the weights of an encoder.

  Positions of another grid and bias tables of another window are interpolated
  bicubically, as `interpolate_positions` does. Everything else must fit.

  Args:
    path: of a weight file, see `files.read_tensors`, a name of
      `pretrained.WEIGHTS`, or an address that `hub.parse` takes apart.
    encoder: the encoder that they are for.
    network: 'teacher' or 'student', where the file has both.

  Returns:
    Variables for `encoder.apply`, and a report.

  Raises:
    UserError: a file that cannot be read or whose names are unknown, weights of
      another architecture (with the flags that fit, if any do), or values that
      are not finite.
  """
  path = str(pretrained.resolve(path))
  file = files.read_tensors(path, network=network)
  try:
    renamed = families.to_timm(file.tensors)
  except UserError as error:
    raise UserError(f'{path}: {error}') from error
  name, table = architecture.table_of(encoder)
  shapes = architecture.torch_shapes(encoder, table)
  _refuse(path, renamed, _differences(name, renamed, shapes))
  problems, notes = _check_the_rest(encoder, renamed)
  tensors, resized, misshapen = _fit(
    renamed, shapes, path, _rule_of(encoder, file.tensors)
  )
  _refuse(path, renamed, problems + misshapen[:_LISTED])
  return Imported(
    entries.from_torch(table, tensors),
    Report(
      path=path,
      sha256=file.sha256,
      format=file.format,
      family=renamed.family,
      matched=tuple(shapes),
      missing=(),
      unexpected=tuple(n for n in renamed.tensors if n not in shapes),
      resized=tuple(resized),
      cast=tuple(n for n in shapes if renamed.tensors[n].dtype != np.float32),
      notes=(*renamed.notes, *notes),
    ),
  )
