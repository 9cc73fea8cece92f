r"""CUB-200-2011 (Wah et al. 2011): 200 bird species, 5,994 + 5,794 images.

  python main.py --config=configs/cub.py --workdir=runs/cub
  python main.py --config=configs/cub.py:method=dino --workdir=runs/cub_dino

`cmd-jax prepare --manual_dir=FOLDER` makes the data set (docs/datasets.md). The
settings are the published ones but for the encoder (ViT-S/16; the published
Swin-T with window 14 by `:encoder=swin`) and for CMD's weights and the warm-up
of its terms (benchmarks/RESEARCH.md). The published run starts from ImageNet
weights: --config.init.path=FILE. Not yet reproduced. 27,900 steps (300 epochs
of 93), 1.8 million images; hours and memory on an accelerator are not measured.
"""

from cmd_jax.config import builtin

get_config = builtin.cub
