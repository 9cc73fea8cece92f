r"""Your own photographs in tar shards, as WebDataset has them.

  python main.py --config=configs/shards.py --workdir=runs/mine \
    --config.dataset.train='gs://bucket/train-{000..146}.tar' \
    --config.dataset.test='gs://bucket/test-*.tar'

A sample is `name.jpg` with its label in `name.cls`, `name.txt` or `name.json`;
without labels the encoder is trained, not scored. A pattern may be a path or
any URL that fsspec opens (`pip install 'cmd_jax[gcs]'` for gs://). The encoder
starts as in configs/folder.py.
"""

from cmd_jax.config import builtin

get_config = builtin.shards
