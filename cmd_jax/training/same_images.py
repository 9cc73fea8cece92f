"""Whether images that are elsewhere now are those of a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from cmd_jax.data.pipeline.load import Data
from cmd_jax.errors import UserError
from cmd_jax.rundir.config_diff import PLACES, Difference, short
from cmd_jax.rundir.workdir import Workdir

# Enough to tell two folders apart that use the same names, and soon decoded.
_SAMPLED = 16


def hash_of_sample(data: Data) -> str:
  """Hash of the pixels of a few training images, evenly spaced.

  `Data.sha256` is of names and labels, which folders of different photographs
  may share (`a/0001.jpg`).

  Args:
    data: the images of a run.
  """
  images = data.pretrain.images
  rows = np.linspace(0, len(images) - 1, min(_SAMPLED, len(images)))
  # At once: a streamed split decodes what is asked for together in threads.
  sample = np.asarray(images[np.unique(rows.astype(int))])
  return hashlib.sha256(sample.tobytes()).hexdigest()


def _is_one_place(difference: Difference) -> bool:
  """Whether two paths name one folder, as with a link or a slash behind."""
  there, here = (
    os.path.realpath(os.path.expanduser(str(path)))
    for path in (difference.there, difference.here)
  )
  return there == here


def check_same_images(
  data: Data, workdir: Workdir, differing: Sequence[Difference]
) -> None:
  """Refuses images of another place unless they are those of the run.

  Args:
    data: the images, listed now.
    workdir: of the run.
    differing: what differs from its config, from `Workdir.check`.

  Raises:
    UserError: other images, or none can tell.
  """
  moved = [x for x in differing if x.field in PLACES]
  if not moved:
    return
  before = workdir.results()
  listed = ', '.join(
    f'{x.field} is {short(x.there)} there and {short(x.here)} here'
    for x in moved
  )
  known = before.get('data_sha256')
  if known is None:
    if all(map(_is_one_place, moved)):
      return
    raise UserError(
      f'{workdir.path} belongs to a run with another config ({listed}), and '
      'its results.json has no data_sha256 that would tell whether the images '
      'are the same: choose another --workdir or give the images where they '
      'were'
    )
  sample = before.get('sample_sha256')
  if known == data.sha256 and sample in (None, hash_of_sample(data)):
    return
  what = 'other names or labels' if known != data.sha256 else 'other pixels'
  raise UserError(
    f'{workdir.path} was trained on other images than {data.name} has now '
    f'({what}; {listed}): give the images of the run or choose another '
    '--workdir'
  )
