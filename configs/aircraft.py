r"""FGVC-Aircraft (Maji et al. 2013): 100 variants, 6,667 + 3,333 images.

  python main.py --config=configs/aircraft.py --workdir=runs/aircraft
  python main.py --config=configs/aircraft.py:method=dino --workdir=runs/dino

Needs the TFDS builder `fgvc_aircraft`. The settings are the published ones but
for the encoder, a ViT-S/16 from scratch. Not yet reproduced.
"""

from configs import common


def get_config(argument=None):
  """The config; `argument` is what follows the colon of --config."""
  method, quicktest = common.parse_argument(argument)
  config = common.published(method)
  config.dataset.update(name='fgvc_aircraft', pretrain_split='trainval')
  if quicktest:
    common.shrink_to_quicktest(config)
  return config.lock()
