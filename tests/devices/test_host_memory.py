import subprocess
import sys

import pytest


@pytest.mark.skipif(
  sys.platform != 'linux', reason='reads /proc, and asks glibc'
)
def test_what_is_freed_is_given_back():
  program = """
import ctypes
from cmd_jax.devices import host_memory
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
