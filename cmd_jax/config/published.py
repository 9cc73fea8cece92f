"""What all configs share: the fields, the methods and their settings.

A sub-dict with a name above it holds the keyword arguments of that function;
cmd_jax/training/experiment.py and recipe.py read the others. Durations end in
`_steps` or `_epochs`, sizes in `_px`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cmd_jax.config import choices, vocabulary


def published(argument: vocabulary.Argument) -> ConfigDict:
  """The published settings at 224 px; not locked."""
  fields = dict(
    seed=0,
    batch_size=64,
    total_epochs=300,
    # Small sets are seen more often, in whole epochs, until so many steps.
    min_steps=0,
    # Of every image; one gives half of its views: cmd_jax.training.neighbours.
    num_neighbours=0,
    canvas_px=256,
    # JPEG files may be decoded at 1/2, 1/4 or 1/8, which is faster, as long as
    # the shorter side keeps so many pixels; 0 is the canvas's side.
    decode_px=0,
    # What is white in grey files of 16 bits: 4095 for cameras of 12 bits.
    grey16_white=65535,
    # tfds_source, folder_source or shards_source; `source` tells which.
    dataset=dict(
      source='tfds',
      name='',
      builder_config='',
      data_dir='',
      pretrain_split='train',
      test_split='test',
      # Its labels are asked for while it trains; empty holds out labels of
      # training images.
      validation_split='',
    ),
    # cmd_jax.data.augment.multi_crop.make_augment
    augment=dict(
      global_px=224,
      local_px=96,
      num_local=8,
      global_scale=(0.4, 1.0),
      local_scale=(0.05, 0.4),
      flip_prob=0.5,
      jitter_prob=0.8,
      brightness=0.4,
      contrast=0.4,
      saturation=0.2,
      hue=0.1,
      gray_prob=0.2,
      blur_probs=(1.0, 0.1, 0.5),
      blur_sigma=(0.1, 2.0),
      solarize_prob=0.2,
    ),
    # cmd_jax.models.make_encoder
    model=choices.model_fields(argument.encoder),
    # cmd_jax.convert.load.load_encoder: a file of weights to start from, or the
    # name of published ones, and which of its networks if it has two.
    init=dict(path='', network='teacher'),
    # Adapters of the encoder, which is itself frozen then; rank 0 for none.
    lora=dict(rank=0, alpha=16.0),
    # cmd_jax.models.heads.PrototypeHead
    head=dict(
      num_prototypes=65536,
      hidden_dim=2048,
      bottleneck_dim=256,
      num_layers=3,
      norm_last_layer=False,
      use_bn=False,
    ),
    method=choices.method_fields(argument.method, argument.encoder),
    # Epochs over which the weights of all terms but the image's rise from 0; 0
    # gives them their full weight at once, as published. CMD's own weights need
    # it (benchmarks/RESEARCH.md): as long as the teacher's temperature rises.
    term_warmup_epochs=30.0 if argument.method == 'cmd' else 0.0,
    student_temperature=0.1,
    teacher=dict(
      # 'ramped' follows at once at first and then with final_momentum.
      momentum_schedule='cosine',
      base_momentum=0.996,
      final_momentum=1.0,
      warmup_temperature=0.04,
      temperature=0.07,
      warmup_temperature_epochs=30,
      normalisation='centring',
      centre_momentum=0.9,
    ),
    # The learning rate is for a batch of 256 and scales with the batch.
    optim=dict(
      name='adamw',
      base_learning_rate=5e-4,
      final_learning_rate=1e-6,
      warmup_epochs=10.0,
      base_weight_decay=0.04,
      final_weight_decay=0.4,
      clip_norm=3.0,
      freeze_last_layer_epochs=1.0,
      # For an encoder that knows something already: epochs in which the heads
      # alone learn, its learning rate over the heads', and the factor of it
      # from one of its blocks to the one before it.
      freeze_encoder_epochs=0.0,
      encoder_scale=1.0,
      layer_decay=1.0,
      # Whether biases and norms decay as well.
      decay_vectors=False,
      # Blocks trained, from the end; -1 trains the whole encoder.
      train_last_blocks=-1,
      # Steps of the whole run that may be left out because their loss, gradient
      # or new parameters are not finite; the next one ends the run.
      skip_non_finite_steps=0,
    ),
    parallel=dict(
      mode='jit',
      # 0 are all.
      num_devices=0,
      # Slices over which they are spread evenly; a state is spread within a
      # slice alone.
      num_slices=1,
      # 'replicated' keeps parameters, teacher and moments whole on each device,
      # 'fsdp' a share of them, 'auto' chooses by the devices' memory.
      state='auto',
      # Parts of a batch seen one after the other before a step is taken, which
      # needs less memory; the step is that of the whole batch.
      grad_accum_steps=1,
      # Steps taken without the host in between, for small models whose images
      # are on the devices: cmd_jax.training.step.multi_step.
      steps_per_dispatch=1,
      # 'pallas' wants kernels for the loss over prototypes, of a TPU or a GPU,
      # 'xla' none; 'auto' has them on a TPU. Those of a GPU have been compiled
      # and checked, but not yet measured.
      kernels='auto',
    ),
    # Where the images are: 'device' holds all of them in the devices' memory,
    # 'stream' decodes them ahead of the step, 'auto' chooses by their size.
    placement='auto',
    # data.pipeline.stream.streamed_batches; 0 workers decode in threads.
    stream=dict(num_workers=0, ahead=2),
    # A short run logs at least twenty times.
    # trackers names wandb, mlflow and trackio, separated by commas;
    # profile_steps, such as '10:15', is what --profile_steps sets.
    log=dict(every_steps=50, trackers='', project='cmd_jax', profile_steps=''),
    # keep_best names a score of cmd_jax.evaluators.validation; patience is
    # after how many evaluations without a better one the run ends, 0 for never.
    checkpoint=dict(every_steps=500, keep=3, keep_best='', patience=0),
    eval=dict(
      protocols=('knn/20', 'linear/logreg', 'retrieval/test-vs-train'),
      network='teacher',
      # Epochs from one score to the next while it trains; 0 for none.
      every_epochs=0.0,
      view_px=224,
      crop_fraction=0.875,
      batch_size=64,
      # How images are compared by `search`, `index` and the other commands on
      # folders, and by the protocol retrieval/search: views of this side, 0 for
      # view_px, and one of cmd_jax.models.pooling.
      search=dict(view_px=0, pooling='encoder'),
      # For parts/hit: the part ids that tell categories apart, and a CSV file
      # of keypoints with the columns file, part_id, x, y, visible.
      parts_hit=dict(part_ids=(), keypoints=''),
      # cmd_jax.evaluators.part_segmentation, for the protocol seg/pascub5; 0
      # labelled images are all.
      segmentation=dict(
        view_px=224,
        # 'token', or 'key' of a ViT: cmd_jax.models.feature_maps.
        facet='token',
        decoder='fcn',
        channels=(256, 128, 64),
        labelled_images=0,
        num_steps=500,
        batch_size=8,
        learning_rate=3e-3,
        num_checkpoints=10,
      ),
    ),
  )
  if argument.method in vocabulary.METHODS_OF_PARTS:
    fields['parts'] = choices.part_fields(choices.usual_parts(argument))
  config = ConfigDict(fields)
  if argument.method in vocabulary.METHODS_OF_PARTS:
    _use_part_recipe(config)
  return config


# Where the published settings of PARTICLE are not DINO's, by encoder.
_PART_RECIPE = dict(
  resnet=dict(
    batch_size=320,
    total_epochs=600,
    augment=dict(num_local=0),
    optim=dict(
      name='sgd',
      base_learning_rate=0.005 * 256 / 320,
      final_learning_rate=0.0,
      base_weight_decay=1.5e-6,
      final_weight_decay=1.5e-6,
      clip_norm=0.0,
      freeze_last_layer_epochs=0.0,
      decay_vectors=True,
    ),
    teacher=dict(momentum_schedule='ramped', final_momentum=0.996),
  ),
  vit=dict(
    total_epochs=100,
    augment=dict(num_local=0),
    model=dict(patch_px=8),
    optim=dict(
      base_learning_rate=1e-7,
      final_learning_rate=1e-8,
      base_weight_decay=0.4,
      decay_vectors=True,
    ),
    teacher=dict(warmup_temperature_epochs=20),
  ),
)


def _use_part_recipe(config: ConfigDict) -> None:
  """The published settings of PARTICLE, the ViT's where there are none."""
  recipe = _PART_RECIPE.get(config.model.name)
  if recipe is None:
    recipe = {k: v for k, v in _PART_RECIPE['vit'].items() if k != 'model'}
  config.update(recipe)
