"""Compiles a step for devices that are not here, once for each program."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import pathlib
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import jax

from cmd_jax.compile_ahead.targets import Target
from cmd_jax.errors import UserError
from cmd_jax.files.atomic import write_atomically

# Seconds between signs of life, on a terminal and in a file.
_EVERY_S = {True: 1.0, False: 30.0}
# "Used 20.5G of 15.75G hbm", "total memory required for ... (37.29G)".
_NEEDED = re.compile(
  r'Used ([\d.]+)([KMGT]) of|required for [^(]*\(([\d.]+)([KMGT])'
)
# A location that is the name of an operation, and where it is from; functions
# that called for it have locations, too, and change nothing.
_NAME = re.compile(r'loc\("(jit\([^"]*)"\(')
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class Compiled(NamedTuple):
  """What the compiler says of a step, of one device.

  Attributes:
    arguments: bytes of state and batch.
    temporaries: bytes that are needed besides.
    text: the optimised program; empty if the compiler gave up, since it does
      not fit.
    needed: bytes of all together; None if the compiler does not say.
  """

  arguments: int
  temporaries: int
  text: str
  needed: int | None


@contextlib.contextmanager
def showing_time(what: str) -> Iterator[None]:
  """Shows on stderr what is done, and for how long."""
  done, start = threading.Event(), time.monotonic()
  is_terminal = sys.stderr.isatty()
  # A terminal has one line for all of it, a log one for each sign of life.
  before, after = ('\r', '') if is_terminal else ('', '\n')

  def show(last=''):
    seconds = time.monotonic() - start
    line = f'{before}{what} {seconds:.0f} s{last}{after}'
    print(line, end='', file=sys.stderr, flush=True)

  def watch():
    show()
    while not done.wait(_EVERY_S[is_terminal]):
      show()

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
    show('\n' if is_terminal else ', ended')


def bytes_needed(message: str) -> int | None:
  """What a TPU's compiler says was needed when it ran out of memory."""
  found = _NEEDED.search(message)
  if not found:
    return None
  number, unit = (x for x in found.groups() if x)
  return round(float(number) * _UNITS[unit])


def _compile(lowered: jax.stages.Lowered, target: Target) -> Compiled:
  try:
    with warnings.catch_warnings():
      # Of a cache that JAX's own variables may ask for.
      warnings.filterwarnings('ignore', 'Error reading persistent compilation')
      compiled = lowered.compile(compiler_options=dict(target.compiler_options))
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      line = str(error).strip().splitlines()[0]
      raise UserError(
        f'--topology={target.name}: its compiler refuses the step ({line}): '
        'try another config, or report it with the config'
      ) from error
    return Compiled(0, 0, '', bytes_needed(str(error)))
  memory = compiled.memory_analysis()
  needed = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  return Compiled(
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes,
    compiled.as_text(),
    needed,
  )


def _place(
  lowered: jax.stages.Lowered, target: Target, cache: str
) -> pathlib.Path:
  """Where the answer for a program is kept."""
  version = target.devices[0].client.platform_version
  # With the names of the operations, or old ones would come with new scopes,
  # but not with lines of files, which change nothing.
  names = sorted(set(_NAME.findall(lowered.as_text(debug_info=True))))
  options = sorted(f'{k}={v}' for k, v in target.compiler_options.items())
  parts = [target.name, jax.__version__, version, lowered.as_text()]
  key = '\n'.join([*parts, *names, *options])
  name = hashlib.sha256(key.encode()).hexdigest()
  return pathlib.Path(cache) / 'ahead' / f'{name}.json.gz'


def compile_for(
  lowered: jax.stages.Lowered, target: Target, cache: str | None
) -> Compiled:
  """Compiles a step, or finds what the compiler has said of it before.

  JAX's persistent cache is of no use: it writes programs for devices that are
  not here, and cannot read them.

  Args:
    lowered: from `step.lower_step`.
    target: whose devices it is lowered for.
    cache: folder of the compilation cache; None or empty keeps nothing.

  Raises:
    UserError: the compiler refuses the step, for other reasons than memory.
  """
  if not cache:
    return _compile(lowered, target)
  place = _place(lowered, target, cache)
  with contextlib.suppress(OSError, EOFError, ValueError, TypeError):
    return Compiled(**json.loads(gzip.decompress(place.read_bytes())))
  compiled = _compile(lowered, target)
  content = json.dumps(compiled._asdict()).encode()
  # A cache that cannot be written costs the next call its time, no more.
  with contextlib.suppress(OSError):
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, gzip.compress(content))
  return compiled
