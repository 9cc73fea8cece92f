r"""Your own photographs: any folder, with or without classes.

  python main.py --config=configs/folder.py --workdir=runs/mine \
    --config.dataset.path=/my/photographs

The folder may be flat (no scores then), have class subfolders at any depth,
folders train, valid and test above them, or a labels.csv with the columns file,
class_name, label, split. The encoder starts from ImageNet's weights where
cmd_jax[pretrained] is installed, `:start=scratch` from nothing.
"""

from cmd_jax.config import builtin

get_config = builtin.folder
