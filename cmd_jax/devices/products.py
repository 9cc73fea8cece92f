"""Matrix products of CPUs: bfloat16 factors, float32 sums.

A CPU with bfloat16 instructions multiplies such factors in a third to four
fifths of the time of float32 ones, but only if the sums are handed out in
float32, and all that is no product is slower in bfloat16
(benchmarks/README.md). So a function is written and differentiated in float32,
and the factors are rounded in the program that comes of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

# Of a product with fewer, rounding takes longer than it gains.
_LEAST_MULTIPLICATIONS = 10**6


def _is_large(product: core.JaxprEqn) -> bool:
  """Whether it is a product of float32 factors that is worth rounding."""
  left, right = (x.aval for x in product.invars)
  if {left.dtype, right.dtype} != {jnp.dtype('float32')}:
    return False
  (contracted, _), (batch, _) = product.params['dimension_numbers']
  shared = math.prod(left.shape[i] for i in (*contracted, *batch))
  return left.size * right.size >= _LEAST_MULTIPLICATIONS * shared


def _rounded(product: core.JaxprEqn) -> list[core.JaxprEqn]:
  """The equations of a product of rounded factors, in place of its own."""
  params = {**product.params, 'preferred_element_type': jnp.dtype('float32')}

  def multiply(left, right):
    factors = (x.astype(jnp.bfloat16) for x in (left, right))
    return product.primitive.bind(*factors, **params)

  made = jax.make_jaxpr(multiply)(
    *(jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in product.invars)
  ).jaxpr
  names = dict(
    zip(
      (*made.invars, *made.outvars),
      (*product.invars, *product.outvars),
      strict=True,
    )
  )

  def renamed(variables):
    return [names.get(x, x) for x in variables]

  return [
    equation.replace(
      invars=renamed(equation.invars),
      outvars=renamed(equation.outvars),
      source_info=product.source_info,
    )
    for equation in made.eqns
  ]


class _Rewriter:
  """Rewrites programs, one that is called in many places only once.

  Attributes:
    done: the program and what has become of it, by its identity; the program
      is kept so that no other can have its identity.
  """

  def __init__(self):
    self.done: dict[int, tuple[Any, Any]] = {}

  def rewrite(self, value: Any) -> Any:
    """The value itself if nothing of it changes.

    Args:
      value: a program, or a parameter of an equation, which may hold some.
    """
    if isinstance(value, tuple | list):
      new = [self.rewrite(x) for x in value]
      same = all(x is y for x, y in zip(new, value, strict=True))
      # Named tuples hold no programs.
      return value if same else type(value)(new)
    if not isinstance(value, core.ClosedJaxpr | core.Jaxpr):
      return value
    if id(value) not in self.done:
      self.done[id(value)] = value, self._rewrite_program(value)
    return self.done[id(value)][1]

  def _rewrite_program(self, program):
    if isinstance(program, core.ClosedJaxpr):
      inner = self.rewrite(program.jaxpr)
      return program if inner is program.jaxpr else program.replace(jaxpr=inner)
    equations = []
    for equation in program.eqns:
      if equation.primitive.name == 'dot_general' and _is_large(equation):
        equations += _rounded(equation)
        continue
      params = {k: self.rewrite(x) for k, x in equation.params.items()}
      same = all(params[k] is x for k, x in equation.params.items())
      equations.append(equation if same else equation.replace(params=params))
    same = len(equations) == len(program.eqns) and all(
      x is y for x, y in zip(equations, program.eqns, strict=True)
    )
    return program if same else program.replace(eqns=equations)


def with_bfloat16_products(function: Callable) -> Callable:
  """A function whose large float32 products have factors rounded to bfloat16.

  Sums, results and all else stay in float32. Products inside of loops and of
  functions that are called are meant too. To be applied to what is
  differentiated already: rounding has no gradient worth following.

  Args:
    function: of trees of arrays, by position, to a tree of arrays.
  """

  def rounded(*args):
    leaves, tree = jax.tree.flatten(args)
    program, result = jax.make_jaxpr(
      lambda *leaves: function(*jax.tree.unflatten(tree, leaves)),
      return_shape=True,
    )(*leaves)
    new = core.jaxpr_as_fun(_Rewriter().rewrite(program))(*leaves)
    return jax.tree.unflatten(jax.tree.structure(result), new)

  return rounded
