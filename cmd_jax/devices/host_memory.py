"""How the process asks its system for memory, and gives it back.

A step's temporaries are allocated anew for every step, and Linux hands memory
out page by page as it is first touched: at 4 KiB a page that takes longer than
what is then done with it (benchmarks/README.md). glibc asks for pages of 2 MiB
if a process is told so before it starts.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import sys

_TUNABLE = 'glibc.malloc.hugetlb'
_KERNEL = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')


def _can_be_asked_for() -> bool:
  """Whether kernel and C library give huge pages to those who ask."""
  try:
    library = os.confstr('CS_GNU_LIBC_VERSION').split()
    version = tuple(int(x) for x in library[1].split('.')[:2])
    return version >= (2, 35) and '[madvise]' in _KERNEL.read_text()
  except (AttributeError, IndexError, OSError, ValueError):
    return False


def restart_with_huge_pages() -> None:
  """Replaces this process by one that asks for huge pages, where that helps.

  The process keeps its number, arguments and files. Nothing happens if the
  environment variable GLIBC_TUNABLES says already whether to ask. To be called
  before anything is done.
  """
  tunables = os.environ.get('GLIBC_TUNABLES', '')
  if _TUNABLE in tunables or not _can_be_asked_for():
    return
  tunables = ':'.join(filter(None, [tunables, f'{_TUNABLE}=1']))
  environment = {**os.environ, 'GLIBC_TUNABLES': tunables}
  os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def give_back_freed() -> None:
  """Returns memory that is free to the system, where the C library can.

  Compiling a step frees hundreds of MB that glibc would keep.
  """
  try:
    ctypes.CDLL(None).malloc_trim(0)
  except (AttributeError, OSError):
    return
