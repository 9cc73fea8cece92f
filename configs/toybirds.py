r"""Drawn birds whose species differ in small parts: the embedded set.

python main.py --config=configs/toybirds.py --workdir=runs/toybirds
python main.py --config=configs/toybirds.py:quicktest --workdir=runs/q
"""

from configs import common, small


def get_config(argument=None):
  """The config; `argument` is what follows the colon of --config."""
  words = common.parse_argument(argument)
  config = common.published(words)
  small.use_small_recipe(config)
  config.total_epochs = 20
  config.canvas_px = 64
  config.dataset.update(name='toybirds', builder_config='64px')
  config.eval.update(view_px=40, crop_fraction=0.0, batch_size=256)
  # Crown, beak, wing bars, tail band and breast spots tell species apart.
  config.eval.parts_hit.part_ids = (3, 4, 6, 8, 9)
  if words.quicktest:
    small.shrink_to_quicktest(config)
    config.dataset.builder_config = '32px'
  return config.lock()
