r"""Drawn birds whose species differ in small parts: the embedded set.

python main.py --config=configs/toybirds.py --workdir=runs/toybirds
python main.py --config=configs/toybirds.py:quicktest --workdir=runs/q
"""

from cmd_jax.config import builtin

get_config = builtin.toybirds
