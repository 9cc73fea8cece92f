"""Where a process stands among others, as flags or its launcher say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from cmd_jax.errors import UserError


class Address(NamedTuple):
  """Where a process stands among the others.

  Attributes:
    coordinator: host:port of process 0.
    num_processes: how many there are.
    process_id: number of this one, from 0.
  """

  coordinator: str
  num_processes: int
  process_id: int


def check_address(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Address | None:
  """Reads the three flags; None if there are none.

  Raises:
    UserError: some are missing, or they do not fit together.
  """
  given = {
    '--coordinator_address': coordinator,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    return None
  if missing:
    raise UserError(
      f'{", ".join(missing)} missing: several processes need '
      '--coordinator_address=HOST:PORT of process 0, --num_processes and '
      '--process_id, each with its own'
    )
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit():
    raise UserError(
      f'--coordinator_address is {coordinator!r}: it must be HOST:PORT of '
      'process 0, e.g. node1:5678'
    )
  if not 0 <= process_id < num_processes:
    raise UserError(
      f'--process_id is {process_id}: it must be from 0 to --num_processes '
      f'minus 1, which is {num_processes - 1}'
    )
  return Address(coordinator, num_processes, process_id)


def launcher_of(environ: Mapping[str, str]) -> str | None:
  """The launcher that has started more than one process; None if none has.

  Args:
    environ: the environment's variables.

  Returns:
    'SLURM', 'Open MPI' or 'TPU', as far as variables tell.
  """

  def number(name):
    value = environ.get(name, '')
    return int(value) if value.isdigit() else 1

  # A shell inside an allocation of many tasks is one process all the same.
  slurm = 'SLURM_STEP_NUM_TASKS'
  if 'SLURM_PROCID' in environ and number(slurm) > 1:
    return 'SLURM'
  if number('OMPI_COMM_WORLD_SIZE') > 1:
    return 'Open MPI'
  hosts = environ.get('TPU_PROCESS_ADDRESSES') or environ.get(
    'TPU_WORKER_HOSTNAMES', ''
  )
  if ',' in hosts or number('MEGASCALE_NUM_SLICES') > 1:
    return 'TPU'
  return None


def is_tpu_vm() -> bool:
  """Whether there are TPU chips, whose metadata tell the other hosts."""
  from jax._src import cloud_tpu_init

  return cloud_tpu_init.running_in_cloud_tpu_vm
