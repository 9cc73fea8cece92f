r"""Stanford Cars (Krause et al. 2013): 196 models, 8,144 + 8,041 images.

  python main.py --config=configs/cars.py --workdir=runs/cars
  python main.py --config=configs/cars.py:method=dino --workdir=runs/cars_dino

`cmd-jax prepare --manual_dir=FOLDER` makes the data set (docs/datasets.md). The
settings are the published ones but for the encoder (ViT-S/16; the published
Swin-T with window 14 by `:encoder=swin`) and for CMD's weights and the warm-up
of its terms (benchmarks/RESEARCH.md). The published run starts from ImageNet
weights: --config.init.path=FILE. Not yet reproduced.
"""

from cmd_jax.config import builtin

get_config = builtin.cars
