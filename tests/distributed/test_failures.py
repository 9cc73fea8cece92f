"""What one process can't do ends all of them, at once and with its reason."""

import time

import pytest

from cmd_jax.devices import launchers, processes
from cmd_jax.errors import UserError


def test_a_mistake_in_one_ends_all(launcher, tmp_path):
  processes = launcher.start(
    tmp_path / 'run',
    count=2,
    of_process={1: ['--config.seed=1']},
  )
  start = time.monotonic()
  first, other = launcher.finish(processes)
  # JAX alone would find out after its heartbeats stop, in 100 s.
  assert time.monotonic() - start < 90
  assert first[0] == other[0] == 2, (first, other)
  assert other[2].splitlines()[-1].startswith('error: the flags of process 1')
  assert 'process 0 ends, because process 1 failed: ' in first[2]
  assert 'Traceback' not in first[2] + other[2]
  assert not (tmp_path / 'run' / 'results.json').exists()


def test_processes_that_do_not_come_are_not_waited_for(launcher, tmp_path):
  alone = launcher.start(tmp_path / 'run', '--meeting_timeout_s=2', count=2)
  alone[0].kill()
  (_, _, _), (code, _, messages) = launcher.finish(alone)
  assert code == 2
  assert 'did not all meet at localhost:' in messages


def test_a_run_in_one_process_needs_no_address():
  assert launchers.check_address(None, None, None) is None
  processes.start(None, timeout_s=1)
  assert processes.process_count() == 1
  assert processes.is_main_process()
  assert processes.broadcast_from_main(lambda: 3) == 3
  assert processes.agree_on_signal(15) == 15
  processes.assert_same_on_all('anything', 'x')
  with processes.failing_together():
    processes.barrier()


@pytest.mark.parametrize(
  'flags, words',
  [
    (('node:1', None, None), '--num_processes, --process_id missing'),
    ((None, 2, 0), '--coordinator_address missing'),
    (('node', 2, 0), 'HOST:PORT'),
    (('node:1', 2, 2), '--process_id is 2'),
    (('node:1', 2, -1), '--process_id is -1'),
  ],
)
def test_flags_that_do_not_fit_are_refused(flags, words):
  with pytest.raises(UserError, match=words):
    launchers.check_address(*flags)


@pytest.mark.parametrize(
  'environ, launcher',
  [
    ({}, None),
    # A shell within an allocation of four tasks.
    ({'SLURM_PROCID': '0', 'SLURM_NTASKS': '4'}, None),
    ({'SLURM_PROCID': '0', 'SLURM_STEP_NUM_TASKS': '1'}, None),
    ({'SLURM_PROCID': '0', 'SLURM_STEP_NUM_TASKS': '4'}, 'SLURM'),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, None),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, 'Open MPI'),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, None),
    ({'TPU_WORKER_HOSTNAMES': 't0,t1'}, 'TPU'),
    ({'MEGASCALE_NUM_SLICES': '2'}, 'TPU'),
  ],
)
def test_a_launcher_of_several_processes_is_known(environ, launcher):
  assert launchers.launcher_of(environ) == launcher
