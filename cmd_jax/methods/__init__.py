"""Self-supervised methods as data and pure functions."""

from __future__ import annotations

import inspect

from cmd_jax.errors import UserError
from cmd_jax.methods.base import Method, Setting


def make_method(name: str, **fields) -> Method:
  """Builds a method by name.

  Args:
    name: a key of the dictionary below.
    **fields: those of `Setting`, and the arguments of that method's factory.

  Raises:
    UserError: unknown name, or one whose fields the config lacks.
  """
  from cmd_jax.methods import (
    cmd,
    dino,
    distil,
    esvit,
    finetune,
    particle,
    simclr,
  )

  methods = {
    'cmd': cmd.make_cmd,
    'esvit': esvit.make_esvit,
    'dino': dino.make_dino,
    'particle': particle.make_particle,
    # The same with other masks.
    'detcon': particle.make_particle,
    'simclr': simclr.make_simclr,
    'distil': distil.make_distil,
    'finetune': finetune.make_finetune,
  }
  if name not in methods:
    raise UserError(
      f'config.method.name is {name!r}: choose one of {", ".join(methods)}'
    )
  setting = {k: v for k, v in fields.items() if k in Setting._fields}
  own = {k: v for k, v in fields.items() if k not in Setting._fields}
  missing = [
    parameter.name
    for parameter in inspect.signature(methods[name]).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY
    and parameter.default is parameter.empty
    and parameter.name not in own
  ]
  if missing:
    raise UserError(
      f'config.method has no {", ".join(missing)}, which {name} needs: use '
      f'--config=FILE:method={name}'
    )
  return methods[name](Setting(**setting), **own)
