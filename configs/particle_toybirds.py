"""PARTICLE on the drawn birds: discover parts, contrast them, and again.

python main.py --config=configs/particle_toybirds.py --workdir=runs/p
python main.py --config=configs/particle_toybirds.py:quicktest --workdir=runs/q
python main.py --config=configs/particle_toybirds.py:method=detcon --workdir=d

Parts that all images share are found in the keys of a ViT; `:encoder=resnet`
clusters each image's hypercolumn instead.
"""

from configs import common, small


def get_config(argument=None):
  """The config; `argument` is what follows the colon of --config."""
  usual = common.Argument(method='particle')
  words = common.parse_argument(argument, usual)
  config = common.published(words)
  small.use_small_recipe(config)
  config.total_epochs = 20
  config.canvas_px = 64
  config.dataset.update(name='toybirds', builder_config='64px')
  if 'parts' in config:
    config.parts.rounds = 2
  config.eval.update(
    protocols=('knn/20', 'linear/logreg', 'seg/pascub5'),
    view_px=40,
    crop_fraction=0.0,
    batch_size=256,
  )
  if words.quicktest:
    small.shrink_to_quicktest(config)
    config.dataset.builder_config = '32px'
  return config.lock()
