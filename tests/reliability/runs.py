"""What the tests of killed and starved runs share."""

import warnings

import numpy as np
import orbax.checkpoint as ocp

from cmd_jax.rundir.checkpoint import saved_steps
from tests.distributed.launcher import Launcher, read_metrics

__all__ = ['Launcher', 'last_arrays', 'logged_step', 'newest_step']


def logged_step(workdir):
  """The last step whose line is complete; 0 before there is one."""
  lines = read_metrics(workdir)
  return lines[-1]['step'] if lines else 0


def newest_step(workdir):
  """The newest step that was saved; 0 before there is one."""
  return next(iter(saved_steps(workdir / 'checkpoints')), 0)


def last_arrays(workdir):
  """Every array of the newest checkpoint by path, read without cmd_jax."""
  path = workdir / 'checkpoints' / str(newest_step(workdir)) / 'state'
  with warnings.catch_warnings():
    # Orbax advises to name shardings, which do not matter here.
    warnings.simplefilter('ignore')
    tree = ocp.PyTreeCheckpointer().restore(path.absolute())
  flat = ocp.tree.to_flat_dict(tree, keep_empty_nodes=False)
  return {'/'.join(map(str, key)): np.asarray(x) for key, x in flat.items()}
