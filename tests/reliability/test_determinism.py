import shutil

import numpy as np
import pytest

from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training import loop
from tests.reliability import small_run

_STEPS = list(range(1, 7))


@pytest.fixture(scope='module')
def run(tmp_path_factory, photos):
  """A whole run."""
  with pytest.MonkeyPatch.context() as patch:
    small_run.leave_out_scores(patch)
    return _run(tmp_path_factory.mktemp('run'), small_run.make_config(photos))


def _run(path, config):
  workdir = Workdir(str(path))
  workdir.open(config.to_dict())
  loop.train(small_run.build(config), workdir)
  return workdir


@pytest.mark.usefixtures('unscored')
def test_the_same_command_twice_gives_the_same_bytes(run, tmp_path, photos):
  again = _run(tmp_path / 'again', small_run.make_config(photos))
  for step in (2, 6):
    one, two = (small_run.read_state(x, step) for x in (run, again))
    assert len(one) > 50
    for array, other in zip(one, two, strict=True):
      assert array.tobytes() == other.tobytes()
  one, two = (small_run.read_metrics(x) for x in (run, again))
  assert [line['step'] for line in one] == _STEPS
  assert one == two


@pytest.mark.usefixtures('unscored')
def test_a_run_restored_onto_two_devices_has_the_same_losses(
  run, tmp_path, photos, capsys
):
  moved = tmp_path / 'moved'
  shutil.copytree(run.path, moved)
  for step in (4, 6):
    shutil.rmtree(moved / 'checkpoints' / str(step))
  config = small_run.make_config(photos, parallel__num_devices=2)
  moved = _run(moved, config)
  assert 'resumed after step 2' in capsys.readouterr().err
  one, two = (small_run.read_metrics(x) for x in (run, moved))
  assert [line['step'] for line in two] == _STEPS
  losses = [[line['loss'] for line in lines[2:]] for lines in (one, two)]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  assert len(set(losses[0])) == len(losses[0])
