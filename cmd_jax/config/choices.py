"""The fields that a choice brings: of a method, an encoder, a source of parts.

Each sub-dict holds the keyword arguments of the function that is named above
it.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cmd_jax.config import vocabulary


def _missing(word: str, function: str) -> ValueError:
  """The error of a word of the vocabulary without fields of its own."""
  return ValueError(f'{word} has no fields in {function} of {__name__}')


def _part_method_fields(name: str, encoder: str) -> ConfigDict:
  """cmd_jax.methods.particle.make_particle, as published for each encoder."""
  if encoder == 'resnet':
    hidden_dim, num_samples, initialisation = 4096, 10, ('torch', 'torch')
  else:
    hidden_dim, num_samples, initialisation = 2048, 6, ('normal', 'kaiming')
  weights = dict(parts=1.0)
  if name == 'particle' and encoder != 'resnet':
    weights['image'] = 1.0
  projector, predictor = initialisation
  return ConfigDict(
    dict(
      name=name,
      weights=weights,
      num_samples=num_samples,
      projector=dict(
        hidden_dim=hidden_dim, output_dim=256, initialisation=projector
      ),
      predictor=dict(hidden_dim=hidden_dim, initialisation=predictor),
      temperature=0.1,
      local_negatives=True,
      # The released sampler's empty parts are no positives here.
      match_empty_parts=False,
    )
  )


def part_fields(source: str) -> ConfigDict:
  """cmd_jax.parts.plan.make_plan; `settings` are the source's arguments."""
  settings = dict(
    hypercolumn=dict(num_parts=15, grid_px=64, num_layers=4),
    cosegmentation=dict(
      num_parts=9,
      stride_px=8,
      # Empty for all; the released code takes 0, 2, 4, 5 of a ViT-S's six.
      saliency_heads=(),
      log_bin=False,
      # 0 is found by the elbow, up to max_clusters.
      num_clusters=0,
      max_clusters=14,
      elbow=0.975,
      saliency=0.065,
      votes=0.75,
      num_sampled=20_000,
    ),
    grid=dict(num_cells=4),
    felzenszwalb=dict(
      scale=1000.0, sigma=0.8, min_size_fraction=0.01, max_parts=16
    ),
    annotated=dict(),
  )
  if source not in settings:
    raise _missing(f'parts={source}', 'part_fields')
  return ConfigDict(
    dict(
      source=source,
      settings=settings[source],
      # Parts are found, then trained on, this often.
      rounds=1,
      # A folder of masks for the first round; empty finds them.
      path='',
      # A CSV file of keypoints that the parts found are compared with
      # (parts/hit), with the columns file, part_id, x, y, visible.
      keypoints='',
      view_px=224,
      batch_size=16,
    )
  )


def usual_parts(argument: vocabulary.Argument) -> str:
  """Where parts come from: an encoder's features if it has what it takes."""
  if argument.parts:
    return argument.parts
  of_encoder = {
    'resnet': 'hypercolumn',
    'efficientnet': 'hypercolumn',
    'vit': 'cosegmentation',
  }
  if argument.method == 'detcon':
    return 'grid'
  return of_encoder.get(argument.encoder, 'grid')


def method_fields(name: str, encoder: str = 'vit') -> ConfigDict:
  """cmd_jax.methods.make_method: the terms of the loss and their weights."""
  if name in vocabulary.METHODS_OF_PARTS:
    return _part_method_fields(name, encoder)
  if name == 'simclr':
    return ConfigDict(
      dict(
        name='simclr',
        temperature=0.1,
        projector=dict(hidden_dim=2048, output_dim=128, initialisation='torch'),
      )
    )
  if name == 'finetune':
    return ConfigDict(
      dict(name='finetune', label_smoothing=0.1, mixup=0.0, class_balance=0.0)
    )
  if name == 'distil':
    fields = dict(
      name='distil',
      weights=dict(image=1.0, tokens=1.0),
      # cmd_jax.training.frozen_teacher.load_teacher
      teacher=dict(path='efficientnet_lite0', network='teacher', view_px=0),
      loss='cosine',
      temperature=0.07,
      queue_size=4096,
      projector=dict(hidden_dim=0, initialisation='torch'),
    )
    return ConfigDict(fields)
  if name == 'dino':
    return ConfigDict(dict(name='dino', weights=dict(image=1.0)))
  if name == 'esvit':
    return ConfigDict(dict(name='esvit', weights=dict(image=0.5, region=0.5)))
  if name == 'cmd_released':
    return ConfigDict(
      dict(
        name='cmd',
        variant='released',
        weights=dict(image=0.5, region=0.5, student_bag=1.0, teacher_bag=1.0),
      )
    )
  if name != 'cmd':
    raise _missing(f'method={name}', 'method_fields')
  return ConfigDict(
    dict(
      name='cmd',
      variant='paper',
      # Chosen by benchmarks/compare.py: benchmarks/RESEARCH.md.
      weights=dict(image=1.0, region=0.5, student_bag=0.1, teacher_bag=3.0),
      mil=dict(hidden_dim=128),
      pooling='gated_attention',
      kl_direction='image_to_bag',
      attend_regions=True,
      shared_prototypes=False,
    )
  )


def model_fields(name: str) -> ConfigDict:
  """cmd_jax.models.make_encoder: ViT-S/16, Swin-T/14, ResNet-50, Lite0.

  Zeros and empty tuples leave the variant's own. `remat` is what the gradient
  computes again to need less memory: 'none', 'dots' (all but linear layers) or
  'full' (whole blocks).
  """
  if name == 'resnet':
    return ConfigDict(
      dict(
        name='resnet',
        variant='50',
        width_ratio=1.0,
        channels=3,
        dtype='bfloat16',
        remat='none',
      )
    )
  if name == 'efficientnet':
    return ConfigDict(
      dict(
        name='efficientnet',
        variant='lite0',
        width_ratio=1.0,
        # 'stride16' or 'stride32'; 'synchronised' or 'frozen'.
        tokens='stride16',
        batch_statistics='synchronised',
        # 'tensorflow' for the published weights, or 'imagenet'.
        input_normalisation='tensorflow',
        drop_path_rate=0.2,
        dtype='bfloat16',
        remat='none',
      )
    )
  if name == 'swin':
    return ConfigDict(
      dict(
        name='swin',
        variant='T',
        width=0,
        depths=(),
        num_heads=(),
        image_px=224,
        patch_px=4,
        window=14,
        mlp_ratio=4.0,
        norm_epsilon=1e-6,
        drop_path_rate=0.1,
        dtype='bfloat16',
        remat='none',
      )
    )
  if name != 'vit':
    raise _missing(f'encoder={name}', 'model_fields')
  return ConfigDict(
    dict(
      name='vit',
      variant='S',
      width=0,
      depth=0,
      num_heads=0,
      image_px=224,
      patch_px=16,
      mlp_ratio=4.0,
      ffn='mlp',
      positions='learned',
      interpolation='dino',
      num_registers=0,
      layer_scale=0.0,
      norm_epsilon=1e-6,
      drop_path_rate=0.1,
      pool='cls',
      # False and 'tanh' for some weights of others (docs/weights.md).
      class_token=True,
      gelu='exact',
      channels=3,
      dtype='bfloat16',
      remat='none',
    )
  )
