"""Several processes that train one model: how they meet, agree and end.

Arrays travel by XLA's collectives. What the hosts have to tell each other goes
through the key-value store of JAX's coordination service instead, which needs
no device and waits as long as it is told to. Nothing here needs JAX until there
is more than one process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from cmd_jax.devices.launchers import Address, is_tpu_vm, launcher_of
from cmd_jax.errors import UserError

# Seconds between two looks at whether another process has failed.
_WATCH_S = 0.5
# Seconds that process 0, which has the store, waits for the others to leave.
_LEAVE_S = 10.0
# Seconds after which JAX gives up, later than this program.
_LATER_S = 60
# Milliseconds of one wait for a key; signals are looked at between two.
_WAIT_MS = 2000
# Milliseconds that processes may be apart where they meet: a checkpoint or the
# first compilation may hold one of them up.
_MEET_MS = 30 * 60 * 1000
_FAILURE, _GONE = 'cmd_jax/failure', 'cmd_jax/gone'


class _Group:
  """The processes of a run, as one of them sees them."""

  def __init__(self, client: Any, count: int, index: int):
    self.client, self.count, self.index = client, count, index
    self._number = 0
    self._done = threading.Event()
    self._lock = threading.Lock()
    self._watcher = threading.Thread(target=self._watch, daemon=True)
    self._watcher.start()

  def next_key(self) -> str:
    """A key that all processes get in the same place of the program."""
    self._number += 1
    return f'cmd_jax/said/{self._number}'

  def failure(self) -> str | None:
    """What the first process to fail has said."""
    found = self.client.key_value_dir_get(_FAILURE)
    return found[0][1] if found else None

  def _watch(self) -> None:
    while not self._done.wait(_WATCH_S):
      try:
        message = self.failure()
      except Exception:
        # The store is gone, and JAX ends this process.
        return
      if message is not None:
        self.leave(message, 2)

  def fail(self, message: str, code: int) -> None:
    """Ends all processes; the first message is the one that is shown."""
    try:
      self.client.key_value_set(f'{_FAILURE}/0', f'{self.index} {message}')
    except Exception:
      with contextlib.suppress(Exception):
        message = self.failure()
      self.leave(message, 2)
    self.leave(None, code)

  def leave(self, message: str | None, code: int) -> None:
    """Ends this process without the farewell that the others can't answer."""
    with self._lock:
      if message is not None:
        index, _, reason = message.partition(' ')
        print(
          f'process {self.index} ends, because process {index} failed: '
          f'{reason}',
          file=sys.stderr,
        )
      with contextlib.suppress(Exception):
        self.client.key_value_set(f'{_GONE}/{self.index}', '')
        deadline = time.monotonic() + _LEAVE_S
        while (
          self.index == 0
          and time.monotonic() < deadline
          and len(self.client.key_value_dir_get(_GONE)) < self.count
        ):
          time.sleep(0.05)
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)

  def close(self) -> None:
    """Ends the thread that looks for failures."""
    self._done.set()
    self._watcher.join()


_group: _Group | None = None


def process_count() -> int:
  """Number of processes of the run."""
  return 1 if _group is None else _group.count


def process_index() -> int:
  """Number of this process; 0 is the one that writes and prints."""
  return 0 if _group is None else _group.index


def is_main_process() -> bool:
  """Whether this is the process that writes and prints."""
  return process_index() == 0


def start(address: Address | None, *, timeout_s: int) -> None:
  """Meets the other processes, if there are any; before JAX sees a device.

  Args:
    address: from `launchers.check_address`; None asks the environment, and a
      machine on its own goes on alone at once.
    timeout_s: seconds to wait for the others.

  Raises:
    UserError: the launcher says too little. Where the others cannot be reached
      the process ends with a message.
  """
  if address is not None and address.num_processes == 1:
    return
  launcher = None if address else launcher_of(os.environ)
  if address is None and launcher is None and not is_tpu_vm():
    return
  import jax

  # JAX's own service would take SIGTERM, which the training loop answers.
  jax.config.update('jax_enable_preemption_service', False)
  fields = {}
  if address is not None:
    fields = dict(
      coordinator_address=address.coordinator,
      num_processes=address.num_processes,
      process_id=address.process_id,
      # What the flags say holds, on whatever cluster.
      cluster_detection_method='deactivate',
    )
  where = address.coordinator if address else 'process 0'
  # JAX would end the process with a stack trace.
  clock = threading.Timer(timeout_s, _give_up, (where, timeout_s))
  clock.daemon = True
  clock.start()
  try:
    jax.distributed.initialize(
      **fields, initialization_timeout=timeout_s + _LATER_S
    )
  except RuntimeError as error:
    reason = str(error).strip().splitlines()[0]
    raise UserError(
      f'the processes cannot meet at {where} ({reason}): give '
      '--coordinator_address a port that no other program uses'
    ) from error
  except ValueError as error:
    if launcher is None and address is None:
      # A machine of one host.
      return
    raise UserError(
      f'{launcher or "--coordinator_address"} tells too little about the '
      f'processes ({error}): give --coordinator_address, --num_processes and '
      '--process_id'
    ) from error
  finally:
    clock.cancel()
  _join()


def _give_up(where: str, timeout_s: int) -> None:
  """Ends the process: the main thread is waiting in JAX."""
  print(
    f'error: the processes did not all meet at {where} within {timeout_s} s: '
    'start all of them, give the same --num_processes, and a host and port of '
    'process 0 that the others can reach and that no other run uses',
    file=sys.stderr,
    flush=True,
  )
  os._exit(2)


def _join() -> None:
  """Begins to watch the others."""
  global _group
  import jax
  from jax._src.distributed import global_state

  # The public functions go through the devices, which have work to do.
  if global_state.num_processes > 1:
    # Without it CPUs have no collectives between processes.
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    _group = _Group(
      global_state.client, global_state.num_processes, global_state.process_id
    )


def check_parallel(mode: str, num_devices: int) -> None:
  """Refuses what several processes cannot do together.

  Args:
    mode: config.parallel.mode.
    num_devices: of all processes together, as far as they are used.

  Raises:
    UserError: pmap, or devices left out.
  """
  if _group is None:
    return
  import jax

  if mode != 'jit':
    raise UserError(
      f'config.parallel.mode is {mode!r}, which is for one process, and there '
      f'are {_group.count}: use jit'
    )
  if num_devices != jax.device_count():
    raise UserError(
      f'config.parallel.num_devices is {num_devices}, but the {_group.count} '
      f'processes have {jax.device_count()} devices together: leave it at 0, '
      'or start fewer processes'
    )


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """Ends all processes when one fails, instead of leaving them waiting."""
  if _group is None:
    yield
    return

  def stop(number, frame):
    del frame
    name = signal.Signals(number).name
    print(f'stopped by {name} between the steps', file=sys.stderr)
    _group.fail(f'stopped by {name}', 128 + number)

  # In place of `stopping`: this process must not end without the others.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
  try:
    yield
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    _group.fail(str(error), 2)
  except KeyboardInterrupt:
    _group.fail('stopped by SIGINT', 128 + signal.SIGINT)
  except Exception as error:
    # Often the echo of another's failure; that one says more.
    time.sleep(_WATCH_S)
    with contextlib.suppress(Exception):
      message = _group.failure()
      if message is not None:
        _group.leave(message, 2)
    traceback.print_exc()
    _group.fail(f'{type(error).__name__}: {error}', 1)
  else:
    # The others may have more to do, and would be killed if the first process
    # left them; after a signal `stopping` ends a program at once.
    import jax

    with contextlib.suppress(Exception):
      # JAX's own farewell waits for five minutes, and the first may be scoring.
      _group.client.wait_at_barrier(_group.next_key(), _MEET_MS)
      jax.distributed.shutdown()
  finally:
    _group.close()


def broadcast_from_main(compute: Callable[[], Any]) -> Any:
  """What the first process computes, told to all.

  All processes must call it in the same order. The others wait; should the
  first one fail, `failing_together` ends them.

  Args:
    compute: () -> anything that JSON can represent; called in the first process
      alone, and free to take its time.
  """
  if _group is None:
    return compute()
  key = _group.next_key()
  if _group.index == 0:
    value = compute()
    _group.client.key_value_set(key, json.dumps(value))
    return value
  while True:
    try:
      return json.loads(_group.client.blocking_key_value_get(key, _WAIT_MS))
    except RuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise


def barrier() -> None:
  """Waits until all processes are here."""
  if _group is not None:
    _group.client.wait_at_barrier(_group.next_key(), _MEET_MS)


def assert_same_on_all(what: str, value: str) -> None:
  """Refuses a run whose processes differ in what must be equal.

  Args:
    what: that is compared, for the message.
    value: of this process.

  Raises:
    UserError: it is another one in the first process.
  """
  first = broadcast_from_main(lambda: value)
  if value != first:
    raise UserError(
      f'{what} of process {process_index()} are others than those of process '
      '0: let all processes read the same files and give them the same flags'
    )


def agree_on_signal(received: int | None) -> int | None:
  """A signal that reached any of the processes before they all came here.

  Args:
    received: number of the signal that this process has received, if any.
  """
  if _group is None:
    return received
  key = _group.next_key()
  if received is not None:
    with contextlib.suppress(RuntimeError):
      # Another may have been first.
      _group.client.key_value_set(f'{key}/signal', str(int(received)))
  _group.client.wait_at_barrier(key, _MEET_MS)
  said = _group.client.key_value_dir_get(f'{key}/')
  return int(said[0][1]) if said else None
