"""PARTICLE on the drawn birds: discover parts, contrast them, and again.

python main.py --config=configs/particle_toybirds.py --workdir=runs/p
python main.py --config=configs/particle_toybirds.py:quicktest --workdir=runs/q
python main.py --config=configs/particle_toybirds.py:method=detcon --workdir=d

Parts that all images share are found in the keys of a ViT; `:encoder=resnet`
clusters each image's hypercolumn instead.
"""

from cmd_jax.config import builtin

get_config = builtin.particle_toybirds
