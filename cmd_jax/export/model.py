"""What `cmd-jax export` writes."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

from safetensors.numpy import save as to_safetensors

import cmd_jax
from cmd_jax.api import Encoder
from cmd_jax.errors import UserError, missing_extra
from cmd_jax.export import transformers
from cmd_jax.export.preprocessing import describe
from cmd_jax.export.stablehlo import describe_stablehlo, to_stablehlo
from cmd_jax.export.weights import export_weights
from cmd_jax.files import disk_errors
from cmd_jax.files.atomic import write_atomically
from cmd_jax.files.formats import VERSION_FIELD
from cmd_jax.files.safe_read import one_line

# Of the sidecar.
_FORMAT_VERSION = 1
# Of --format=transformers, in the order in which they are written.
_FILES = (
  'model.safetensors',
  'preprocessor_config.json',
  'cmd_jax.json',
  'config.json',
)

# The content of a file, and what its sidecar says.
Exported = tuple[bytes, dict[str, Any]]


class Request(NamedTuple):
  """What is asked for; the flags of main.py of the same names.

  Attributes:
    source: work directory of a run, or file of weights.
    network: 'teacher' or 'student'; empty for what the run evaluates.
    output: file to write, of 'transformers' a folder; None for `encoder` in the
      work directory, or in the folder where the program runs.
    format: 'safetensors', 'stablehlo', 'onnx' or 'transformers'.
    dtype: of ONNX, 'float32' or 'float16'.
    attention: whether the attention is computed too.
    canvases: whether canvases are taken in place of views.
    newest: whether the newest checkpoint is used, not the best.
  """

  source: str
  network: str = ''
  output: str | None = None
  format: str = 'safetensors'
  dtype: str = 'float32'
  attention: bool = False
  canvases: bool = False
  newest: bool = False


def _output_file(request: Request) -> pathlib.Path:
  """Where to write, after all has been checked that can be beforehand."""
  source = pathlib.Path(request.source).expanduser()
  folder = source if source.is_dir() else pathlib.Path()
  path = folder / f'encoder.{request.format}'
  if request.output:
    path = pathlib.Path(request.output).expanduser()
  if request.format == 'transformers':
    _check_folder(path)
  elif path.suffix != f'.{request.format}':
    raise UserError(
      f'{path} does not end in .{request.format}: name --output so, or choose '
      'another --format'
    )
  elif path.is_dir():
    raise UserError(f'{path} is a folder: give --output a file')
  if path.exists() and source.exists() and path.samefile(source):
    raise UserError(f'{path} is what is exported: choose another --output')
  if request.attention and request.format in ('safetensors', 'transformers'):
    raise UserError(
      '--attention is of --format=stablehlo and onnx: choose one, or leave it '
      'out'
    )
  if request.dtype != 'float32' and request.format != 'onnx':
    raise UserError(
      f'--dtype={request.dtype} is of --format=onnx: choose that, or leave it '
      'out'
    )
  if request.canvases and request.format != 'stablehlo':
    raise UserError(
      '--canvases is of --format=stablehlo: choose that, or leave it out'
    )
  return path


def _check_folder(path: pathlib.Path) -> None:
  """Refuses an output that would mix with other files."""
  if path.exists() and not path.is_dir():
    raise UserError(f'{path} is a file: give --output a folder')
  if path.is_dir():
    others = sorted(set(os.listdir(path)).difference(_FILES))
    if others:
      raise UserError(
        f'{path} has other files, such as {one_line(others[0])}: give --output '
        'a folder of its own'
      )


def _as_stablehlo(encoder: Encoder, request: Request) -> Exported:
  exported = to_stablehlo(
    encoder, attention=request.attention, canvases=request.canvases
  )
  return bytes(exported.serialize()), describe(
    encoder, canvases=request.canvases, **describe_stablehlo(exported)
  )


def _as_onnx(encoder: Encoder, request: Request) -> Exported:
  try:
    from cmd_jax.export.onnx import describe_onnx, to_onnx
  except ModuleNotFoundError as error:
    if error.name != 'onnx':
      raise
    raise missing_extra(
      '--format=onnx needs the onnx package', 'onnx'
    ) from error
  model = to_onnx(encoder, attention=request.attention, dtype=request.dtype)
  return model.SerializeToString(), describe(encoder, **describe_onnx(model))


def _write(
  path: pathlib.Path, content: bytes, description: dict[str, Any]
) -> pathlib.Path:
  """Writes a file and its sidecar, whose path is returned."""
  sidecar = path.with_name(f'{path.name}.json')
  sha256 = hashlib.sha256(content).hexdigest()
  text = json.dumps(
    {VERSION_FIELD: _FORMAT_VERSION, 'file': path.name, 'sha256': sha256}
    | description,
    indent=2,
  )
  with disk_errors.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    write_atomically(sidecar, text + '\n')
  return sidecar


def _check_photographs(encoder: Encoder) -> None:
  """Refuses other channels, for which no file of weights is read back."""
  channels = encoder.preprocessing.get('channels', 3)
  if channels != 3:
    raise UserError(
      f'{encoder.source} takes images of {channels} channels, which '
      '--format=safetensors does not know: use --format=onnx, stablehlo or '
      'transformers'
    )


def _write_folder(path: pathlib.Path, encoder: Encoder) -> str:
  """Writes the folder of `transformers.convert`, and says what it is."""
  converted = transformers.convert(encoder)
  side = encoder.preprocessing['view_px']
  channels = encoder.preprocessing.get('channels', 3)
  told = {VERSION_FIELD: _FORMAT_VERSION, 'embedding': converted.embedding}
  told |= describe(
    encoder,
    inputs=[{'name': 'pixel_values', 'shape': ['batch', channels, side, side]}],
    outputs=[],
    notes=list(converted.notes),
  )
  # config.json comes last: without it the folder is none of a model.
  contents = (
    to_safetensors(converted.tensors, {'format': 'pt'}),
    _as_json(converted.preprocessor),
    _as_json(told),
    _as_json(converted.config),
  )
  with disk_errors.writing(path):
    path.mkdir(parents=True, exist_ok=True)
    for name, content in zip(_FILES, contents, strict=True):
      write_atomically(path / name, content)
  (name,) = converted.config['architectures']
  return '\n'.join(
    (
      f'{path}: a {name} for transformers.AutoModel.from_pretrained',
      f'the embedding is {converted.embedding}',
      *converted.notes,
    )
  )


def _as_json(value: dict[str, Any]) -> str:
  return json.dumps(value, indent=2) + '\n'


def export_model(request: Request) -> str:
  """Does what is asked for.

  Args:
    request: what is asked for.

  Returns:
    What to print.

  Raises:
    UserError: anything about the request that cannot be.
  """
  path = _output_file(request)
  encoder = cmd_jax.load(
    request.source, network=request.network, newest=request.newest
  )
  if request.format == 'safetensors':
    _check_photographs(encoder)
    constructor = export_weights(encoder, path)
    return f'{path}: the state dict of\n{constructor}'
  if request.format == 'transformers':
    return _write_folder(path, encoder)
  convert = {'stablehlo': _as_stablehlo, 'onnx': _as_onnx}[request.format]
  sidecar = _write(path, *convert(encoder, request))
  return f'{path}\n{sidecar}: what goes in and comes out'
