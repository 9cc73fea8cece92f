import json

import numpy as np
import pytest

from cmd_jax.config import published, vocabulary
from cmd_jax.config.defaults import complete
from cmd_jax.errors import UserError
from cmd_jax.rundir.config_diff import differences, flatten, table
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training import loop, recipe
from configs import cub, folder, particle_toybirds
from tests.reliability import small_run


def _config(argument='method=cmd', get_config=cub.get_config, **changes):
  config = get_config(argument).to_dict()
  for path, value in changes.items():
    *parents, last = path.split('__')
    node = config
    for parent in parents:
      node = node[parent]
    node[last] = value
  return config


def test_every_field_that_differs_is_listed_with_what_may_change(
  tmp_path, capsys
):
  workdir = Workdir(str(tmp_path))
  workdir.open(_config())
  before = workdir.config_file.read_bytes()
  changed = _config(
    seed=7,
    total_epochs=400,
    optim__clip_norm=1.0,
    parallel__num_devices=4,
    checkpoint__keep=9,
  )
  with pytest.raises(UserError) as caught:
    workdir.open(changed)
  message, printed = str(caught.value), capsys.readouterr().err
  assert 'optim.clip_norm is 3.0 there and 1.0 here' in message
  assert 'seed is 0 there and 7 here' in message
  assert 'keep' not in message
  assert '\n' not in message
  rows = [line.split() for line in printed.splitlines()]
  assert rows[0] == ['field', 'there', 'here', 'may', 'change', 'why']
  assert {row[0]: row[3] for row in rows[1:]} == {
    'optim.clip_norm': 'no',
    'seed': 'no',
    'checkpoint.keep': 'yes',
    'parallel.num_devices': 'yes',
    'total_epochs': 'yes',
  }
  assert all(len(row) > 4 for row in rows[1:])
  assert workdir.config_file.read_bytes() == before


@pytest.mark.parametrize(
  'get_config, changes, why',
  [
    (cub.get_config, dict(total_epochs=3), 'not shorter'),
    (particle_toybirds.get_config, dict(total_epochs=999), 'found anew'),
    (cub.get_config, dict(model__depth=3), 'another network'),
    (cub.get_config, dict(teacher__temperature=0.1), 'targets'),
    (cub.get_config, dict(batch_size=8), 'learning rate'),
  ],
)
def test_what_may_not_change_says_why(get_config, changes, why):
  there = _config(None, get_config)
  (found,) = differences(there, _config(None, get_config, **changes))
  assert not found.may_change
  assert why in found.why
  assert why in table([found])


@pytest.mark.parametrize(
  'argument, get_config',
  [
    ('method=cmd_released', cub.get_config),
    ('method=esvit,encoder=swin', folder.get_config),
    ('method=particle,encoder=resnet', cub.get_config),
    ('method=detcon,parts=grid', cub.get_config),
  ],
)
def test_a_field_that_one_side_lacks_has_its_default(argument, get_config):
  here = _config(argument, get_config)
  there = json.loads(json.dumps(here))
  del there['optim']['skip_non_finite_steps'], there['lora']
  del there['model']['remat'], there['dataset']['test_split']
  assert not differences(there, here)
  assert flatten(complete(there)).keys() == flatten(here).keys()

  here['lora']['rank'] = 4
  (found,) = differences(there, here)
  assert (found.field, found.there, found.here) == ('lora.rank', 0, 4)
  assert not found.may_change
  # And the other way round, a field that is gone.
  there['optim']['lookahead'] = 5
  gone = {x.field: x for x in differences(there, here)}['optim.lookahead']
  assert not gone.may_change
  assert 'no such field' in gone.why


def test_a_config_of_unknown_kind_is_left_as_it_is():
  for config in ({}, {'method': {'name': 'simclr'}, 'seed': 1}):
    assert complete(config) == config
  assert set(complete({'model': {'name': 'vit'}})) == {'model'}
  whole = published.published(vocabulary.Argument()).to_dict()
  assert complete(whole) == whole


@pytest.mark.usefixtures('unscored')
def test_a_run_is_made_longer(tmp_path, photos, capsys):
  workdir = Workdir(str(tmp_path / 'run'))
  shorter, longer = (
    small_run.make_config(photos, total_epochs=epochs) for epochs in (1, 3)
  )
  workdir.open(shorter.to_dict())
  assert '->' not in capsys.readouterr().err
  built = small_run.build(longer)
  # The end of the short run, but for what was learnt.
  end = built.init_state()
  end = end._replace(step=end.step + small_run.STEPS_PER_EPOCH)
  checkpoints = built.open_checkpoints(workdir)
  checkpoints.save(end, {})
  checkpoints.close()

  workdir.open(longer.to_dict())
  results = loop.train(built, workdir)
  printed = capsys.readouterr().err
  assert 'total_epochs 1 -> 3: learning rate, weight decay' in printed
  assert 'resumed after step 2' in printed
  assert results['steps'] == 3 * small_run.STEPS_PER_EPOCH
  assert workdir.read_config()['total_epochs'] == 3
  # The first step on is where the longer run would be, not where it would end.
  named = recipe.make_schedules(longer, small_run.STEPS_PER_EPOCH, 6)
  line = small_run.read_metrics(workdir)[0]
  assert line['step'] == 3
  for name in ('learning_rate', 'weight_decay', 'teacher_momentum'):
    np.testing.assert_allclose(line[name], named[name](2), rtol=1e-5)
  with pytest.raises(UserError, match='total_epochs is 3 there and 1 here'):
    workdir.open(shorter.to_dict())
