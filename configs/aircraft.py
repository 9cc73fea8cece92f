r"""FGVC-Aircraft (Maji et al. 2013): 100 variants, 6,667 + 3,333 images.

  python main.py --config=configs/aircraft.py --workdir=runs/aircraft
  python main.py --config=configs/aircraft.py:method=dino --workdir=runs/dino

`cmd-jax prepare --manual_dir=FOLDER` makes the data set (docs/datasets.md). The
settings are the published ones but for the encoder (ViT-S/16; the published
Swin-T with window 14 by `:encoder=swin`) and for CMD's weights and the warm-up
of its terms (benchmarks/RESEARCH.md). The published run starts from ImageNet
weights: --config.init.path=FILE. Not yet reproduced.
"""

from cmd_jax.config import builtin

get_config = builtin.aircraft
