r"""Drawn birds whose species differ in small parts: the embedded set.

python main.py --config=configs/toybirds.py --workdir=runs/toybirds
python main.py --config=configs/toybirds.py:quicktest --workdir=runs/q
"""

from configs import common


def get_config(argument=None):
  """The config; `argument` is what follows the colon of --config."""
  method, quicktest = common.parse_argument(argument)
  config = common.published(method)
  config.batch_size = 64
  config.total_epochs = 20
  config.canvas_px = 64
  config.dataset.update(name='toybirds', builder_config='64px')
  config.augment.update(global_px=48, local_px=24, num_local=4)
  config.model.update(
    variant='Mu', image_px=48, patch_px=8, dtype='float32', drop_path_rate=0.0
  )
  config.head.update(num_prototypes=512, hidden_dim=256, bottleneck_dim=64)
  config.optim.update(base_learning_rate=4e-3, warmup_epochs=2.0)
  config.teacher.update(base_momentum=0.98, warmup_temperature_epochs=5)
  config.eval.update(view_px=64, crop_fraction=0.0, batch_size=256)
  config.checkpoint.every_steps = 200
  if quicktest:
    common.shrink_to_quicktest(config)
    config.dataset.builder_config = '32px'
  return config.lock()
