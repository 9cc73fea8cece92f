import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.config import builtin, published, vocabulary
from cmd_jax.errors import UserError
from cmd_jax.models import make_encoder, partial
from cmd_jax.training import recipe, timetable
from tests import tiny


def _config(argument='', **fields):
  config = published.published(vocabulary.parse_argument(argument))
  config.parallel.grad_accum_steps = 4
  config.update_from_flattened_dict(fields)
  return config


@pytest.mark.parametrize(
  'argument, fields, words',
  [
    (
      '',
      {'parallel.grad_accum_steps': 5},
      '32 images of each of 2 .* 1, 2, 4,',
    ),
    ('', {'teacher.normalisation': 'sinkhorn'}, 'normalisation=sinkhorn'),
    ('', {'head.use_bn': True}, 'use_bn=True'),
    ('', {'parallel.kernels': 'pallas'}, 'kernels=pallas has none for a cpu'),
    ('encoder=resnet', {}, 'model.name=resnet'),
    ('encoder=efficientnet', {}, 'statistics=synchronised.*use .*=frozen'),
  ],
)
def test_layouts_that_cannot_be_are_refused(argument, fields, words):
  with pytest.raises(UserError, match=words) as caught:
    config = _config(argument, **fields)
    recipe.check_parallel(config, 2, 'cpu')
  assert str(caught.value).startswith('config.parallel.')


@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
def test_kernels_may_be_asked_for(platform):
  config = _config(**{'parallel.kernels': 'pallas'})
  recipe.check_parallel(config, 1, platform)
  named = recipe.make_schedules(config, 10, 100)
  make = recipe.make_method_maker(
    config, named, lambda path: False, platform=platform
  )
  method = make(None, None)
  assert method.loss.__self__.setting.budget().kernels == platform


def test_the_encoder_is_made_for_the_devices_of_the_mesh(monkeypatch):
  monkeypatch.setattr(recipe, 'make_method', lambda **fields: fields)
  config = _config()
  named = recipe.make_schedules(config, 10, 100)
  make = recipe.make_method_maker(
    config, named, lambda path: False, platform='gpu'
  )
  device = types.SimpleNamespace(platform='gpu')
  mesh = types.SimpleNamespace(devices=np.array([device]))
  assert make(None, mesh)['encoder'].device is device
  assert make('data', None)['encoder'].device is None


@pytest.mark.parametrize(
  'platform, dtype, computed, rounds',
  [
    ('cpu', 'bfloat16', 'float32', True),
    ('cpu', 'float32', 'float32', False),
    ('tpu', 'bfloat16', 'bfloat16', False),
    ('gpu', 'bfloat16', 'bfloat16', False),
  ],
)
def test_bfloat16_is_for_the_products_alone_on_a_cpu(
  platform, dtype, computed, rounds
):
  config = _config(**{'model.dtype': dtype})
  named = recipe.make_schedules(config, 10, 100)
  make = recipe.make_method_maker(
    config, named, lambda path: False, platform=platform
  )
  encoder = make(None, None).loss.__self__.setting.encoder
  assert jnp.dtype(encoder.dtype).name == computed
  assert recipe.has_bfloat16_products(config, platform) == rounds
  assert config.model.dtype == dtype


@pytest.mark.parametrize(
  'steps, words',
  [
    (1, 'learning rate is 0 throughout and nothing is learned'),
    (2, 'rises to 1.8e-05 only'),
    (8, 'rises to 0.00012 only'),
  ],
)
def test_a_run_within_its_warm_up_is_told(steps, words):
  config = _config(**{'optim.warmup_epochs': 2.0})
  said = recipe.explain_short_run(config, 4, steps)
  assert words in said and f'all {steps} step(s)' in said
  highest = [
    float(recipe.make_schedules(config, 4, steps)['learning_rate'](i))
    for i in range(steps)
  ]
  assert not max(highest) if steps == 1 else f'{max(highest):.2g}' in said


def test_a_run_beyond_its_warm_up_is_not_remarked_on():
  config = _config(**{'optim.warmup_epochs': 2.0})
  assert recipe.explain_short_run(config, 4, 9) is None
  config = _config(**{'optim.warmup_epochs': 0.0})
  assert recipe.explain_short_run(config, 1, 1) is None


@pytest.mark.parametrize('method', ['cmd', 'cmd_released', 'esvit', 'dino'])
def test_the_published_methods_can_be_computed_part_by_part(method):
  recipe.check_parallel(_config(f'method={method}'), 2, 'cpu')


def test_methods_that_compare_images_are_refused_parts_of_a_batch():
  config = _config('method=particle')
  method = types.SimpleNamespace(is_mean_over_examples=False)
  with pytest.raises(UserError, match='method.name=particle compares all'):
    recipe.check_accumulates(config, method)
  method.is_mean_over_examples = True
  recipe.check_accumulates(config, method)


def test_frozen_statistics_can_be_computed_part_by_part():
  config = _config(
    'encoder=efficientnet', **{'model.batch_statistics': 'frozen'}
  )
  recipe.check_parallel(config, 2, 'cpu')


def test_whole_batches_are_never_refused():
  config = _config('method=particle', **{'parallel.grad_accum_steps': 1})
  recipe.check_parallel(config, 3, 'cpu')
  method = types.SimpleNamespace(is_mean_over_examples=False)
  recipe.check_accumulates(config, method)


def test_terms_warm_up_over_the_configured_epochs():
  config = _config(**{'term_warmup_epochs': 1.5})
  warmup = recipe.make_schedules(config, 4, 40)['term_warmup']
  assert [float(warmup(step)) for step in (0, 3, 6, 20)] == [0, 0.5, 1, 1]
  config.term_warmup_epochs = 0.0
  assert 'term_warmup' not in recipe.make_schedules(config, 4, 40)


@pytest.mark.parametrize('epochs, told', [(0, 0), (1, 4), (9, 12)])
def test_no_warm_up_is_told_that_is_longer_than_the_run(epochs, told):
  config = _config(batch_size=8, total_epochs=3, term_warmup_epochs=epochs)
  steps = timetable.make_steps(config, 32, None)
  assert (steps.total, steps.term_warmup) == (12, told)


@pytest.mark.parametrize(
  'changes, forgets',
  [
    ({'init.path': 'x.pth'}, True),
    ({}, False),
    ({'init.path': 'x.pth', 'optim.base_learning_rate': 5e-4}, False),
    ({'init.path': 'x.pth', 'optim.encoder_scale': 0.05}, False),
    # SGD has other learning rates.
    ({'init.path': 'x.pth', 'optim.name': 'sgd'}, False),
  ],
)
def test_a_learning_rate_for_drawn_encoders_is_told(changes, forgets):
  config = builtin.folder('start=scratch').unlock()
  config.update_from_flattened_dict(changes)
  said = recipe.explain_forgetting(config)
  assert (said is not None) == forgets
  if said:
    assert (
      'learning rate of the encoder is 0.01' in said
      and 'start=pretrained' in said
    )


def test_the_recipe_for_going_on_does_not_forget():
  assert recipe.explain_forgetting(builtin.folder('start=pretrained')) is None


@pytest.mark.parametrize(
  'images, epochs, steps', [(32, 25, 100), (33, 25, 100), (400, 10, 500)]
)
def test_small_sets_are_seen_more_often(images, epochs, steps):
  config = _config(batch_size=8, total_epochs=10, min_steps=100)
  assert timetable.count_epochs(config, images) == epochs
  assert timetable.make_steps(config, images, None).total == steps
  said = recipe.warnings_about(
    config, tiny.make_tiny_encoder(), lambda path: False, images // 8, steps
  )
  assert (f'trained on for {epochs} epochs' in ''.join(said)) == (epochs > 10)


@pytest.mark.parametrize('steps, scale', [(40, 0.1), (100, 0.1), (400, 0.025)])
def test_an_encoder_that_is_shown_an_image_more_often_learns_more_slowly(
  steps, scale
):
  config = _config(
    batch_size=8,
    total_epochs=10,
    min_steps=steps,
    **{'optim.encoder_scale': 0.1},
  )
  total = timetable.make_steps(config, 80, None).total
  assert total == max(steps, 100)
  found = recipe.resolve_encoder_scale(config, 10, total)
  assert found == pytest.approx(scale)
  said = recipe.warnings_about(
    config, tiny.make_tiny_encoder(), lambda path: False, 10, total
  )
  is_told = 'the encoder at 0.025 of the heads' in ''.join(said)
  assert is_told == (scale < 0.1)


@pytest.mark.parametrize('method', ['cmd', 'esvit', 'particle', 'dino'])
@pytest.mark.parametrize(
  'tokens, blocks, is_told',
  [('stride16', 5, True), ('stride16', 6, False), ('stride32', 1, False)],
)
def test_terms_of_patches_that_reach_no_block_are_told(
  method, tokens, blocks, is_told
):
  config = _config(
    f'method={method},encoder=efficientnet',
    **{
      'model.tokens': tokens,
      'model.variant': 'lite0',
      'optim.train_last_blocks': blocks,
    },
  )
  encoder = make_encoder(**config.model)
  is_frozen = partial.make_is_frozen(
    encoder, train_last_blocks=blocks, lora_rank=0
  )
  said = recipe.explain_still_tokens(config, encoder, is_frozen)
  assert bool(said) == (is_told and method != 'dino')
  if said:
    assert 'config.model.tokens=stride16' in said and '5 blocks' in said


def test_tokens_change_with_the_blocks_that_are_said_to_make_them():
  encoder = tiny.make_tiny_encoder('efficientnet')
  images = np.random.default_rng(0).normal(size=(1, 32, 32, 3))
  images = images.astype(np.float32)
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)
  variables = tiny.draw_like(shapes)
  gradient = jax.jit(
    jax.grad(
      lambda params: jnp.sum(
        encoder.apply({**variables, 'params': params}, images).tokens ** 2
      )
    )
  )(variables['params'])
  gradient = jax.device_get(gradient)
  moved = {
    name
    for name in encoder.layer_names
    if any(np.any(x != 0) for x in jax.tree.leaves(gradient[name]))
  }
  assert moved == set(encoder.token_layer_names)


@pytest.mark.parametrize('method', ['cmd', 'esvit', 'particle', 'detcon'])
def test_the_recipe_for_going_on_trains_by_patches(method):
  config = builtin.folder(f'method={method},start=pretrained')
  encoder = make_encoder(**config.model)
  is_frozen = partial.make_is_frozen(
    encoder, train_last_blocks=config.optim.train_last_blocks, lora_rank=0
  )
  assert recipe.explain_still_tokens(config, encoder, is_frozen) is None
