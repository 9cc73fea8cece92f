r"""CUB-200-2011 (Wah et al. 2011): 200 bird species, 5,994 + 5,794 images.

  python main.py --config=configs/cub.py --workdir=runs/cub
  python main.py --config=configs/cub.py:method=dino --workdir=runs/cub_dino

Needs the TFDS builder `cub_200_2011`. The settings are the published ones but
for the encoder, a ViT-S/16 from scratch. Not yet reproduced.
"""

from configs import common


def get_config(argument=None):
  """The config; `argument` is what follows the colon of --config."""
  method, quicktest = common.parse_argument(argument)
  config = common.published(method)
  config.dataset.update(name='cub_200_2011')
  if quicktest:
    common.shrink_to_quicktest(config)
  return config.lock()
