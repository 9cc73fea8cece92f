"""`cmd-jax compile`: the step of a config for devices that are not here."""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

from ml_collections import ConfigDict

from cmd_jax.compile_ahead import report, search, targets
from cmd_jax.compile_ahead.compiled import Compiled, compile_for, showing_time
from cmd_jax.compile_ahead.step import lower_step
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.files.atomic import make_place, write_atomically


class Request(NamedTuple):
  """What is asked for.

  Attributes:
    config: of the run.
    topology: see `targets.find_target`.
    find_batch: whether to look for the largest batch that fits.
    num_images: training images; None if it is not known.
    cache: folder of the compilation cache; None or empty for none.
  """

  config: ConfigDict
  topology: str
  find_batch: bool = False
  num_images: int | None = None
  cache: str | None = None


class _Compiler(NamedTuple):
  """Compiles a request's step for batches of several sizes."""

  request: Request
  target: targets.Target
  num_devices: int
  num_images: int | None

  def config_of(self, batch_size: int) -> ConfigDict:
    config = self.request.config.copy_and_resolve_references()
    with config.unlocked():
      config.batch_size = batch_size
    return config

  def compile(self, batch_size: int) -> Compiled:
    mesh = sharding.make_mesh(
      self.num_devices,
      self.target.devices,
      self.request.config.parallel.num_slices,
    )
    what = f'batch {batch_size} for {self.target.name}: '
    with showing_time(f'{what}tracing'):
      lowered = lower_step(self.config_of(batch_size), mesh, self.num_images)
    with showing_time(f'{what}compiling'):
      return compile_for(lowered, self.target, self.request.cache)

  def room(self) -> int:
    """Bytes of a device that the training images leave."""
    images = report.image_bytes(
      self.request.config, self.target, self.num_images
    )
    return self.target.chip.memory - images

  def fits(self, compiled: Compiled) -> bool:
    return bool(compiled.text) and compiled.needed <= self.room()


def _gib(number: int | None) -> str:
  return 'more' if number is None else f'{number / 2**30:.2f} GiB'


def _check_fits(
  compiler: _Compiler, config: ConfigDict, compiled: Compiled
) -> None:
  if compiler.fits(compiled):
    return
  raise UserError(
    f'config.batch_size={config.batch_size} does not fit: a '
    f'{compiler.target.chip.name} has {_gib(compiler.room())} for the step, '
    f'which needs {_gib(compiled.needed)}: try '
    f'{report.what_would_fit(config, compiler.num_devices)}'
  )


def _search(compiler: _Compiler) -> tuple[Compiled, ConfigDict, list]:
  """The largest batch that fits, its step, and what was tried."""
  config, compiled = compiler.request.config, {}
  unit = compiler.num_devices * config.parallel.grad_accum_steps

  def attempt(batch_size: int) -> search.Try:
    found = compiler.compile(batch_size)
    compiled[batch_size] = found
    return search.Try(batch_size, found.needed, compiler.fits(found))

  start = max(config.batch_size // unit, 1) * unit
  tries = search.find_largest(
    attempt, start=start, unit=unit, limit=compiler.room()
  )
  best = search.largest(tries)
  if best is None:
    smallest = min(compiled)
    _check_fits(compiler, compiler.config_of(smallest), compiled[smallest])
  for x in tries:
    said = 'fits' if x.fits else 'does not fit'
    needed = f'{_gib(x.needed)} of {_gib(compiler.room())}'
    print(f'batch {x.batch_size}: {needed}, {said}')
  settled = '' if search.is_settled(tries, unit) else ' at least'
  print(f'largest batch that fits: {best}{settled}\n')
  return compiled[best], compiler.config_of(best), tries


def compile_ahead(request: Request, output: str | None = None) -> str:
  """Compiles a step and says what it costs.

  Args:
    request: what is asked for.
    output: JSON file of the facts to write; None or empty for none.

  Returns:
    The facts, a line each.

  Raises:
    UserError: an unknown topology, a compiler that is not installed, a config
      that cannot be, or a step that does not fit.
  """
  if not request.topology:
    raise UserError(f'--topology is missing: choose {targets.describe_known()}')
  targets.parse_name(request.topology)
  place = pathlib.Path(output) if output else None
  if place:
    make_place(place)
  targets.prepare_process()
  config = request.config
  num_images = request.num_images or report.known_num_images(config)
  target = targets.find_target(request.topology, config.parallel.num_slices)
  wanted = config.parallel.num_devices
  if wanted > len(target.devices):
    raise UserError(
      f'config.parallel.num_devices is {wanted}, but {target.name} has '
      f'{len(target.devices)}: use another --topology, or 0 for all'
    )
  compiler = _Compiler(
    request, target, wanted or len(target.devices), num_images
  )
  tries = None
  if request.find_batch:
    compiled, config, tries = _search(compiler)
  else:
    compiled = compiler.compile(config.batch_size)
    _check_fits(compiler, config, compiled)
  facts = report.gather(
    config, target, compiler.num_devices, compiled, num_images
  )
  if tries is not None:
    facts['tried'] = [x._asdict() for x in tries]
  if place:
    write_atomically(place, json.dumps(facts, indent=2) + '\n')
  return report.as_text(facts)
