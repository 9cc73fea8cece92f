"""The neighbours of the training images, found by what a run starts from.

They are those that `cmd-jax search` finds.

A view of a neighbour in place of a second view of the image itself (Dwibedi et
al. 2021, who take it from a queue; here they are known before the first step)
keeps a kind together that would otherwise be told apart image by image.
"""

from __future__ import annotations

import functools
import io
import json
import sys

import numpy as np

from cmd_jax.devices import processes, stopping
from cmd_jax.errors import UserError
from cmd_jax.evaluators.nearest import find_nearest
from cmd_jax.evaluators.whitening import apart_in
from cmd_jax.files import disk_errors, safe_read
from cmd_jax.files.atomic import write_atomically
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.experiment import Experiment
from cmd_jax.training.scoring import network_of
from cmd_jax.training.state import TrainState

# Rows told to the other processes at once, as text.
_ROWS_AT_ONCE = 2**15


def with_neighbours(experiment: Experiment, workdir: Workdir) -> Experiment:
  """The experiment whose batches have a neighbour of each image with them.

  All processes must call it; the first one searches, among all training
  images, by the encoder that the run starts from. What is found is kept in
  neighbours.npz, so that a run that goes on has the same.

  Args:
    experiment: the run's.
    workdir: of the run.

  Returns:
    The same experiment where config.num_neighbours is 0.

  Raises:
    UserError: fewer images than neighbours, or the initial weights are gone and
      with them the file.
  """
  count, data = experiment.num_neighbours, experiment.data
  if not count:
    return experiment
  num_images = len(data.pretrain.file_names)
  if num_images <= count:
    raise UserError(
      f'config.num_neighbours is {count}, and {data.name} has {num_images} '
      f'training images: set it to at most {num_images - 1}'
    )
  with stopping.during('the search for neighbours'):
    alone, state = experiment.on_this_process(experiment.init_state())
    rows = None

    def find() -> None:
      nonlocal rows
      rows = _find(alone, state, workdir)

    processes.broadcast_from_main(find)
    told = [
      processes.broadcast_from_main(
        lambda start=start: rows[start : start + _ROWS_AT_ONCE].tolist()
      )
      for start in range(0, num_images, _ROWS_AT_ONCE)
    ]
  neighbours = np.concatenate([np.array(block, np.int32) for block in told])
  make_batches = functools.partial(data.make_batches, neighbours=neighbours)
  return experiment._replace(data=data._replace(make_batches=make_batches))


def _find(
  experiment: Experiment, state: TrainState, workdir: Workdir
) -> np.ndarray:
  """The rows [N, k] of the neighbours, the nearest first; read or found."""
  count, images = experiment.num_neighbours, experiment.data.pretrain
  # Not how is searched: that may change while a run goes on, whose neighbours
  # must stay.
  key = {'num_neighbours': count, 'data_sha256': experiment.data.sha256}
  network = network_of(experiment, state, workdir)
  if not experiment.start_is_lost:
    key['encoder_sha256'] = network.hash
  path = workdir.neighbour_rows
  if (rows := _read(workdir, key)) is not None:
    return rows
  if experiment.start_is_lost:
    raise UserError(
      f'{experiment.imported.path} is not there any more, and neither is '
      f'{path}, which tells the neighbours by it: restore one of them'
    )
  # More of those that search finds are of the image's own kind.
  as_searched = experiment.evaluation.settings['search']
  vectors = network.embeddings(images, **as_searched).vectors
  vectors = apart_in(vectors)(vectors)
  rows = find_nearest(vectors, vectors, count, own=np.arange(len(vectors))).rows
  buffer = io.BytesIO()
  np.savez(buffer, key=np.array(json.dumps(key)), rows=rows)
  with disk_errors.writing(path, 'make room, or choose another --workdir'):
    write_atomically(path, buffer.getvalue())
  print(
    f'a neighbour gives half of the views: one of {count} by the initial '
    f'encoder, for each of {len(rows)} training images',
    file=sys.stderr,
  )
  return rows


def _read(workdir: Workdir, key: dict) -> np.ndarray | None:
  """What was found earlier by the same key; None where that is nothing."""
  path = workdir.neighbour_rows
  try:
    with path.open('rb') as file:
      arrays = safe_read.read_npz(file)
    found = json.loads(str(arrays['key']))
    rows = arrays['rows']
  except FileNotFoundError:
    return None
  except (KeyError, OSError, ValueError) as error:
    print(
      f'{path} cannot be used ({error}): finding the neighbours again',
      file=sys.stderr,
    )
    return None
  is_same = all(found.get(name) == value for name, value in key.items())
  return rows if is_same else None
