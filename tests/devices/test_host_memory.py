import os
import subprocess
import sys

import pytest

from cmd_jax.devices import host_memory

_PROGRAM = """
import os, sys
from cmd_jax import host_memory
if sys.argv[1] == 'can':
  host_memory._can_be_asked_for = lambda: True
print('starts', os.getpid(), flush=True)
host_memory.restart_with_huge_pages()
print(sys.argv[1:], os.environ.get('GLIBC_TUNABLES'))
"""


def _run(tmp_path, *arguments, tunables=None):
  program = tmp_path / 'program.py'
  program.write_text(_PROGRAM)
  environment = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
  if tunables is not None:
    environment['GLIBC_TUNABLES'] = tunables
  output = subprocess.run(
    [sys.executable, program, *arguments],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  return output.splitlines()


def test_restarts_once_with_the_same_arguments(tmp_path):
  first, again, says = _run(tmp_path, 'can', 'a b', '--c=1')
  assert first == again
  assert says == "['can', 'a b', '--c=1'] glibc.malloc.hugetlb=1"


def test_other_tunables_are_kept(tmp_path):
  *_, says = _run(tmp_path, 'can', tunables='glibc.malloc.tcache_count=3')
  assert says.endswith('glibc.malloc.tcache_count=3:glibc.malloc.hugetlb=1')


def test_what_the_user_says_holds(tmp_path):
  assert len(_run(tmp_path, 'can', tunables='glibc.malloc.hugetlb=0')) == 2


@pytest.mark.parametrize(
  'version, kernel, expected',
  [
    ('glibc 2.36', 'always [madvise] never', True),
    ('glibc 2.31', 'always [madvise] never', False),
    ('glibc 2.36', '[always] madvise never', False),
    ('glibc 2.36', 'always madvise [never]', False),
    (None, 'always [madvise] never', False),
  ],
)
def test_asks_where_it_helps(monkeypatch, tmp_path, version, kernel, expected):
  (tmp_path / 'enabled').write_text(kernel)
  monkeypatch.setattr(host_memory, '_KERNEL', tmp_path / 'enabled')
  monkeypatch.setattr(os, 'confstr', lambda name: version)
  assert host_memory._can_be_asked_for() == expected


def test_no_such_kernel(monkeypatch, tmp_path):
  monkeypatch.setattr(host_memory, '_KERNEL', tmp_path / 'none')
  assert not host_memory._can_be_asked_for()


@pytest.mark.skipif(
  sys.platform != 'linux', reason='reads /proc, and asks glibc'
)
def test_what_is_freed_is_given_back():
  program = """
import ctypes
from cmd_jax import host_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def resident():
  line = next(x for x in open('/proc/self/status') if x.startswith('VmRSS'))
  return int(line.split()[1])
blocks = [libc.malloc(2**16) for _ in range(1000)]
for block in blocks:
  ctypes.memset(block, 1, 2**16)
for block in blocks[:-1]:
  libc.free(block)
before = resident()
host_memory.give_back_freed()
print(before - resident())
"""
  output = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  ).stdout
  assert int(output) > 50_000
