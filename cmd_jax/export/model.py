"""What `cmd-jax export` writes."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import cmd_jax
from cmd_jax.api import Encoder
from cmd_jax.errors import UserError, missing_extra
from cmd_jax.export.preprocessing import describe
from cmd_jax.export.stablehlo import describe_stablehlo, to_stablehlo
from cmd_jax.export.weights import export_weights
from cmd_jax.files.atomic import write_atomically
from cmd_jax.files.formats import VERSION_FIELD

# Of the sidecar.
_FORMAT_VERSION = 1

# The content of a file, and what its sidecar says.
Exported = tuple[bytes, dict[str, Any]]


class Request(NamedTuple):
  """What is asked for; the flags of main.py of the same names.

  Attributes:
    source: work directory of a run, or file of weights.
    network: 'teacher' or 'student'; empty for what the run evaluates.
    output: file to write; None for `encoder` in the work directory, or in the
      folder where the program runs.
    format: 'safetensors', 'stablehlo' or 'onnx'.
    attention: whether the attention is computed too.
    canvases: whether canvases are taken in place of views.
    newest: whether the newest checkpoint is used, not the best.
  """

  source: str
  network: str = ''
  output: str | None = None
  format: str = 'safetensors'
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
  if path.suffix != f'.{request.format}':
    raise UserError(
      f'{path} does not end in .{request.format}: name --output so, or choose '
      'another --format'
    )
  if path.is_dir():
    raise UserError(f'{path} is a folder: give --output a file')
  if path.exists() and source.exists() and path.samefile(source):
    raise UserError(f'{path} is what is exported: choose another --output')
  if request.attention and request.format == 'safetensors':
    raise UserError(
      '--attention is of --format=stablehlo and onnx: choose one, or leave it '
      'out'
    )
  if request.canvases and request.format != 'stablehlo':
    raise UserError(
      '--canvases is of --format=stablehlo: choose that, or leave it out'
    )
  return path


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
  model = to_onnx(encoder, attention=request.attention)
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
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    write_atomically(sidecar, text + '\n')
  except OSError as error:
    raise UserError(
      f'{path} cannot be written ({error.strerror}): choose another --output'
    ) from error
  return sidecar


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
    constructor = export_weights(encoder, path)
    return f'{path}: the state dict of\n{constructor}'
  convert = {'stablehlo': _as_stablehlo, 'onnx': _as_onnx}[request.format]
  sidecar = _write(path, *convert(encoder, request))
  return f'{path}\n{sidecar}: what goes in and comes out'
