"""Commands that look through folders of photographs."""

from __future__ import annotations

import pathlib

from absl import flags

from cmd_jax.cli.compilation_cache import use_compilation_cache
from cmd_jax.errors import UserError


def curate(values: flags.FlagValues) -> None:
  """`cmd-jax curate`."""
  from cmd_jax.curation import run

  use_compilation_cache(values)
  request = run.Request(
    source=values.weights or values.workdir,
    input=values.input or run.images_of(values.workdir),
    output=pathlib.Path(values.output or run.default_output(values.workdir)),
    **{
      name: values[name].value
      for name in ('select', 'alike_from', 'report_images', 'newest')
    },
  )
  print(run.curate(request))


def index(values: flags.FlagValues, *, action: str) -> None:
  """`cmd-jax index`, of which `action` is done."""
  from cmd_jax.image_index import run

  use_compilation_cache(values)
  if values.weights and values.workdir:
    raise UserError('give one of --workdir, a run, and --weights, a file')
  request = run.Request(
    action=action,
    source=values.weights or values.workdir,
    output=pathlib.Path(values.output or 'search.csv'),
    **{
      name: values[name].value
      for name in (
        'index_dir',
        'input',
        'query',
        'query_class',
        'top_k',
        'newest',
        'view_px',
        'pooling',
      )
    },
  )
  print(run.run(request))
