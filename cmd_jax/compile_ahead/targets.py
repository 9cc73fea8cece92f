"""What a step is compiled for: TPU topologies and GPUs, by their names."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from cmd_jax.compile_ahead import gpus
from cmd_jax.devices.chips import CHIPS, Chip
from cmd_jax.errors import UserError, missing_extra

_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = (
  '2x2x1',
  '2x2x2',
  '2x2x4',
  '2x4x4',
  '4x4x4',
  '4x4x8',
  '4x8x8',
  '8x8x8',
)
TPUS = {'v5e': _FLAT, 'v6e': _FLAT, 'v5p': _CUBES}
# GPUs that NVLink connects within a machine.
_GPU_COUNTS = (1, 2, 4, 8)

# Autotuning would run candidates on the device, and the Triton products are
# made by it alone.
_GPU_OPTIONS = {
  'xla_gpu_enable_triton_gemm': False,
  'xla_gpu_autotune_level': 0,
}


class Target(NamedTuple):
  """What a step is compiled for.

  Attributes:
    name: as `--topology` has it, after the number of slices if several.
    devices: all devices, which are only described.
    chip: what each of them is.
    compiler_options: of XLA, by name.
  """

  name: str
  devices: tuple[jax.Device, ...]
  chip: Chip
  compiler_options: Mapping[str, bool | int]


def describe_known() -> str:
  """The known names, for messages."""
  tpus = (f'{kind}:{"|".join(sizes)}' for kind, sizes in TPUS.items())
  counts = '|'.join(map(str, _GPU_COUNTS[1:]))
  named = ', '.join(gpus.GPUS)
  return f'{", ".join(tpus)}, {named}, or several of these, as in h100:{counts}'


def _known_names() -> list[str]:
  names = [f'{kind}:{size}' for kind, sizes in TPUS.items() for size in sizes]
  return [*names, *gpus.GPUS]


def parse_name(name: str) -> tuple[str, str]:
  """(kind, size) of a topology's name; the size of one GPU is '1'.

  Raises:
    UserError: an unknown one.
  """
  kind, _, size = name.partition(':')
  if kind in TPUS and size in TPUS[kind]:
    return kind, size
  if kind in gpus.GPUS and (size or '1') in map(str, _GPU_COUNTS):
    return kind, size or '1'
  found = difflib.get_close_matches(name, _known_names(), 1)
  hint = f' (did you mean {found[0]}?)' if found else ''
  raise UserError(
    f'--topology={name} is not known{hint}: choose {describe_known()}'
  )


def prepare_process() -> None:
  """Keeps JAX and libtpu from looking for accelerators of this machine.

  Must be called before JAX has found its devices.
  """
  for variable, value in {
    'TPU_SKIP_MDS_QUERY': '1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_STDERR_LOG_LEVEL': '3',
    'TPU_MIN_LOG_LEVEL': '3',
  }.items():
    os.environ.setdefault(variable, value)
  jax.config.update('jax_platforms', 'cpu')


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
  """Drops what libtpu prints when it finds no TPU, which is as it should be."""
  kept = os.dup(2)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)


def _describe_tpu(name: str, size: str, num_slices: int):
  from jax.experimental import topologies

  options = {}
  if math.prod(map(int, size.split('x'))) == 1:
    # A host has four chips unless it is told otherwise.
    options['chips_per_host_bounds'] = (1, 1, 1)
  if num_slices > 1:
    options['num_slices'] = num_slices
  return topologies.get_topology_desc(
    platform='tpu', topology_name=name, **options
  )


def _describe_gpu(kind: str, count: str):
  from jax.experimental import topologies

  # Slices, hosts of a slice, devices of a host.
  return topologies.get_topology_desc(
    '',
    'cuda',
    topology=f'1x1x{count}',
    target_config=gpus.target_config(gpus.GPUS[kind]),
  )


def find_target(name: str, num_slices: int = 1) -> Target:
  """Describes the devices of a topology by their own compiler.

  Args:
    name: such as 'v5e:2x4', 'h100' or 'h100:8'.
    num_slices: config.parallel.num_slices; so many TPU slices of this size are
      described. GPUs are those of one machine, however they are divided.

  Raises:
    UserError: an unknown topology, or its compiler is not installed.
  """
  kind, size = parse_name(name)
  is_tpu = kind in TPUS
  if is_tpu and importlib.util.find_spec('libtpu') is None:
    raise missing_extra(f'--topology={name} needs libtpu', 'tpu')
  plugins = ('jax_cuda13_plugin', 'jax_cuda12_plugin')
  if not is_tpu and not any(map(importlib.util.find_spec, plugins)):
    raise missing_extra(
      f"--topology={name} needs JAX's plugin for CUDA", 'cuda'
    )
  try:
    with _quiet_loading():
      if is_tpu:
        found = _describe_tpu(name, size, num_slices)
      else:
        found = _describe_gpu(kind, size)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    raise UserError(
      f'--topology={name} is refused by its compiler '
      f'({str(error).splitlines()[0]}): use another one, or other versions of '
      f'JAX and of the extra {"tpu" if is_tpu else "cuda"}'
    ) from error
  by_name = {chip.name: chip for chip in CHIPS.values()}
  said = f'{num_slices} x {name}' if is_tpu and num_slices > 1 else name
  return Target(
    said, tuple(found.devices), by_name[kind], {} if is_tpu else _GPU_OPTIONS
  )
