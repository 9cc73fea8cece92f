"""Self-supervised pre-training that tells look-alikes apart.

Shape letters, used in every docstring of the package:

  B  examples of a batch (of all devices under jit, of one under pmap)
  V  views of an example; S, T the student's and the teacher's views
  N  tokens (patches) of a view
  P  parts
  K  prototypes
  D  features of an embedding
  H, W  pixels; R the side of a canvas in pixels
"""

from __future__ import annotations

from typing import Any

__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
  # Imported late: the version and the errors do not need JAX.
  if name == 'load':
    from cmd_jax.loading import load

    return load
  if name == 'train':
    from cmd_jax.training.run import train

    return train
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
