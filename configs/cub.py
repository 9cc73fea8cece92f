r"""CUB-200-2011 (Wah et al. 2011): 200 bird species, 5,994 + 5,794 images.

  python main.py --config=configs/cub.py --workdir=runs/cub
  python main.py --config=configs/cub.py:method=dino --workdir=runs/cub_dino

`--mode=prepare --manual_dir=FOLDER` makes the data set (docs/datasets.md). The
settings are the published ones but for the encoder (ViT-S/16; the published
Swin-T with window 14 by `:encoder=swin`) and for CMD's weights and the warm-up
of its terms (benchmarks/RESEARCH.md). The published run starts from ImageNet
weights: --config.init.path=FILE. Not yet reproduced.
"""

from configs import common, small


def get_config(argument=None):
  """The config; `argument` is what follows the colon of --config."""
  words = common.parse_argument(argument)
  config = common.published(words)
  config.dataset.update(name='cub_200_2011')
  if words.quicktest:
    small.shrink_to_quicktest(config)
  return config.lock()
