import pytest

from cmd_jax import errors
from cmd_jax.training import experiment
from configs import toybirds


@pytest.mark.parametrize(
  'field, value, words',
  [
    ('augment.local_px', 20, 'local_px is 20.*patch_px, which is 8'),
    ('augment.global_px', 0, 'global_px is 0'),
    ('eval.view_px', 50, 'view_px is 50'),
    ('model.patch_px', 0, 'patch_px is 0: it must be at least 1'),
    ('model.depth', -1, 'depth is -1: it must be at least 0'),
    ('parallel.num_devices', -2, 'num_devices is -2'),
    ('log.every_steps', 0, 'every_steps is 0: it must be at least 1'),
    ('eval.network', 'both', 'teacher, student'),
    ('eval.protocols', ('knn/21',), 'knn/20'),
    ('parallel.mode', 'xmap', 'jit, pmap'),
    ('init.network', 'both', 'teacher, student'),
    ('init.path', '/no/such.pth', '/no/such.pth'),
    ('optim.train_last_blocks', 9, 'train_last_blocks is 9: choose 0 to 3'),
    ('lora.rank', -3, 'lora.rank is -3'),
    ('model.num_registers', -1, 'num_registers is -1'),
  ],
)
def test_impossible_values_are_explained_before_data_is_read(
  field, value, words
):
  config = toybirds.get_config()
  *parents, last = field.split('.')
  node = config
  for parent in parents:
    node = node[parent]
  with config.ignore_type():
    node[last] = value
  with pytest.raises(errors.UserError, match=words):
    experiment.build(config)


def test_a_folder_config_is_needed_for_folders():
  config = toybirds.get_config()
  config.dataset.source = 'folder'
  with pytest.raises(errors.UserError, match='configs/folder.py'):
    experiment.build(config)
