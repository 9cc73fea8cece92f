import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.data.channels import IMAGENET
from cmd_jax.devices import sharding
from cmd_jax.rundir.checkpoint import Checkpoints
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training import part_rounds, scoring
from cmd_jax.training.experiment import Evaluation
from cmd_jax.training.state import TrainState, state_shardings


def _state():
  rng = np.random.default_rng(0)
  kernel = jnp.array(rng.normal(size=(16, 24)), jnp.float32)
  return TrainState(
    step=jnp.int32(3),
    params={'kernel': kernel},
    teacher_params={'kernel': 2 * kernel},
    opt_state=({'mu': 3 * kernel}, jnp.int32(3)),
    method_state={'image_centre': jnp.arange(128.0)},
  )


def _shardings(state, num_devices, fsdp):
  mesh = sharding.make_mesh(num_devices)
  return state_shardings(state, mesh, fsdp=fsdp, min_size=64)


def test_networks_and_moments_are_spread_and_centres_are_not():
  shardings = _shardings(_state(), 8, True)
  spread = {
    name: [not x.is_fully_replicated for x in jax.tree.leaves(part)]
    for name, part in shardings._asdict().items()
  }
  assert spread == dict(
    step=[False],
    params=[True],
    teacher_params=[True],
    opt_state=[True, False],
    method_state=[False],
  )
  whole = _shardings(_state(), 8, False)
  assert all(x.is_fully_replicated for x in jax.tree.leaves(whole))


@pytest.mark.parametrize(
  'saved, restored', [((8, 1), (4, 0)), ((1, 0), (8, 1))]
)
def test_a_checkpoint_is_restored_in_either_layout(tmp_path, saved, restored):
  state = _state()
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(jax.device_put(state, _shardings(state, *saved)), {})
  like = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    state,
    _shardings(state, *restored),
  )
  found, _ = checkpoints.restore(like)
  checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, found, state)
  for x, want in zip(jax.tree.leaves(found), jax.tree.leaves(like)):
    assert x.sharding.is_equivalent_to(want.sharding, x.ndim)


def test_a_spread_network_is_gathered_to_be_scored_and_to_find_parts(tmp_path):
  state = _state()
  spread = jax.device_put(state, _shardings(state, 8, True))
  experiment = types.SimpleNamespace(
    mesh=sharding.make_mesh(8),
    encoder='none',
    data=types.SimpleNamespace(sha256='none', statistics=IMAGENET),
    evaluation=Evaluation(
      evaluators=(),
      network='teacher',
      mil=None,
      settings=dict(view_px=16, crop_fraction=0.0, batch_size=8),
    ),
    method=types.SimpleNamespace(
      encoder_variables=lambda params, stats: {'params': params}
    ),
  )
  network = scoring.network_of(experiment, spread, Workdir(str(tmp_path)))
  kernel = network.variables['params']['kernel']
  assert kernel.is_fully_replicated
  np.testing.assert_array_equal(kernel, state.teacher_params['kernel'])
  variables = part_rounds.encoder_variables(experiment, spread)
  np.testing.assert_array_equal(
    variables['params']['kernel'], state.teacher_params['kernel']
  )
