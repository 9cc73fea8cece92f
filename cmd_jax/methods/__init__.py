"""Self-supervised methods as data and pure functions."""

from __future__ import annotations

import inspect

from cmd_jax.errors import UserError
from cmd_jax.methods.base import Method


def make_method(name: str, **kwargs) -> Method:
  """Builds a method by name.

  Args:
    name: a key of the dictionary below.
    **kwargs: arguments of that method's factory.

  Raises:
    UserError: unknown name, or one whose fields the config lacks.
  """
  from cmd_jax.methods import cmd, dino, esvit, particle

  methods = {
    'cmd': cmd.make_cmd,
    'esvit': esvit.make_esvit,
    'dino': dino.make_dino,
    'particle': particle.make_particle,
    # The same with other masks.
    'detcon': particle.make_particle,
  }
  if name not in methods:
    raise UserError(
      f'config.method.name is {name!r}: choose one of {", ".join(methods)}'
    )
  missing = [
    parameter.name
    for parameter in inspect.signature(methods[name]).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY
    and parameter.default is parameter.empty
    and parameter.name not in kwargs
  ]
  if missing:
    raise UserError(
      f'config.method has no {", ".join(missing)}, which {name} needs: use '
      f'--config=FILE:method={name}'
    )
  return methods[name](**kwargs)
