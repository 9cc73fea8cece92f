r"""Your own photographs: any folder, with or without classes.

  python main.py --config=configs/folder.py --workdir=runs/mine \
    --config.dataset.path=/my/photographs

The folder may be flat (no scores then), have class subfolders at any depth, or
a labels.csv with the columns file, class_name, label, split.
"""

from configs import common, small


def get_config(argument=None):
  """The config; `argument` is what follows the colon of --config."""
  words = common.parse_argument(argument)
  config = common.published(words)
  small.use_small_recipe(config)
  config.total_epochs = 40
  config.canvas_px = 96
  config.dataset = dict(
    source='folder',
    path='',
    labels_file='labels.csv',
    test_fraction=0.2,
    # Where the listing of a large folder is kept; empty for ~/.cache.
    index_file='',
    pretrain_split='pretrain',
    test_split='test',
  )
  config.augment.update(global_px=64, local_px=32)
  if 'image_px' in config.model:
    config.model.image_px = 64
  config.eval.update(view_px=96, crop_fraction=0.0, batch_size=128)
  if words.quicktest:
    small.shrink_to_quicktest(config)
  return config.lock()
