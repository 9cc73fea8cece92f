"""What each field of a config is, and what it may be."""

from __future__ import annotations

from typing import NamedTuple


class Field(NamedTuple):
  """What a field may be.

  Attributes:
    kind: int, float, bool, str or tuple (of whatever its factory takes).
    help: what it is, in a sentence.
    least: smallest number.
    most: largest number.
    above: what a number must exceed.
    choices: what it may be; None for anything.
  """

  kind: type
  help: str
  least: float | None = None
  most: float | None = None
  above: float | None = None
  choices: tuple[str, ...] | None = None


def _count(text: str, least: int = 0) -> Field:
  return Field(int, text, least=least)


def _fraction(text: str) -> Field:
  return Field(float, text, least=0, most=1)


def _positive(text: str) -> Field:
  return Field(float, text, above=0)


def _not_negative(text: str) -> Field:
  return Field(float, text, least=0)


def _choice(text: str, *choices: str) -> Field:
  return Field(str, text, choices=choices)


def _text(text: str) -> Field:
  return Field(str, text)


def _switch(text: str) -> Field:
  return Field(bool, text)


def _several(text: str) -> Field:
  return Field(tuple, text)


_MLP = {
  'hidden_dim': _count(
    'Hidden dimension; 0 for a linear layer, which distil alone has.'
  ),
  'output_dim': _count('Dimension of the result.', 1),
  'initialisation': _choice(
    'How linear layers start.', 'torch', 'normal', 'kaiming'
  ),
}

# Groups in the order in which they are shown. A field whose last name is `*`
# stands for all of its parent's.
FIELDS: dict[str, Field] = {
  'seed': Field(int, 'Of the initial parameters and of all that is drawn.'),
  'batch_size': _count('Images of a step, on all devices together.', 1),
  'total_epochs': _count('Epochs of the run.', 1),
  'min_steps': _count(
    'Steps of the run at least, for which small sets have more epochs.'
  ),
  'num_neighbours': _count(
    'Nearest training images by the weights that the run starts from, of which '
    'one gives the second global view and half of the local ones; 0 for the '
    'image itself.'
  ),
  'canvas_px': _count('Side of the squares to which images are squashed.', 1),
  'decode_px': _count(
    'Pixels that the shorter side keeps where JPEG files are decoded smaller, '
    "which is faster; 0 is the canvas's side."
  ),
  'grey16_white': Field(
    int,
    'What is white in grey files of 16 bits: 4095 for cameras of 12 bits. '
    'Files with larger values are skipped.',
    least=1,
    most=65535,
  ),
  'placement': _choice(
    "Where the images are: in the devices' memory, or decoded ahead of the "
    'step; auto chooses by their size.',
    'auto',
    'device',
    'stream',
  ),
  'student_temperature': _positive('tau_s.'),
  'term_warmup_epochs': _not_negative(
    "Epochs over which the weights of all terms but the image's rise from 0; 0 "
    'gives them in full at once, as published.'
  ),
  'dataset.source': _choice(
    'What is read: a TFDS data set, a folder, tar shards.',
    'tfds',
    'folder',
    'shards',
  ),
  'dataset.name': _text('Name of the TFDS data set.'),
  'dataset.builder_config': _text(
    "One of the TFDS builder's configs; empty for its own."
  ),
  'dataset.data_dir': _text('Where TFDS keeps data; empty for its own place.'),
  'dataset.path': _text('The folder of photographs.'),
  'dataset.labels_file': _text('CSV file of labels in the folder.'),
  'dataset.test_fraction': _fraction(
    'Share of the labelled images held out where the folder has no split of '
    'its own. Each is drawn by its name alone, so that added images move no '
    'others: of a small class it may be more or fewer.'
  ),
  'dataset.index_file': _text(
    'Where the listing of a large folder is kept; empty for ~/.cache.'
  ),
  'dataset.train': _text('Pattern of the shards to train on.'),
  'dataset.test': _text('Pattern of the shards to score on; empty for none.'),
  'dataset.pretrain_split': _text('Split that is trained on.'),
  'dataset.test_split': _text('Split that is scored on.'),
  'dataset.validation_split': _text(
    'Split whose labels are asked for while it trains (eval.every_epochs), '
    'and that calibrates a classifier; empty, or without images, holds out '
    'labels of training images, or of a classifier these images.'
  ),
  'augment.global_px': _count('Side of the global views in pixels.', 1),
  'augment.local_px': _count('Side of the local views in pixels.', 1),
  'augment.num_local': _count('Local views of an image.'),
  'augment.global_scale': _several('Area of a global crop, from and to.'),
  'augment.local_scale': _several('Area of a local crop, from and to.'),
  'augment.flip_prob': _fraction('Probability of a horizontal flip.'),
  'augment.jitter_prob': _fraction('Probability of colour jitter.'),
  'augment.brightness': _not_negative('Reach of the brightness jitter.'),
  'augment.contrast': _not_negative('Reach of the contrast jitter.'),
  'augment.saturation': _not_negative('Reach of the saturation jitter.'),
  'augment.hue': Field(float, 'Reach of the hue jitter.', least=0, most=0.5),
  'augment.gray_prob': _fraction('Probability of a grey image.'),
  'augment.blur_probs': _several(
    'Probability of blur in both global views and in the local ones.'
  ),
  'augment.blur_sigma': _several('Standard deviation of the blur in pixels.'),
  'augment.solarize_prob': _fraction(
    'Probability of solarisation, in the second global view.'
  ),
  'model.name': _choice(
    'The encoder.', 'vit', 'swin', 'resnet', 'efficientnet'
  ),
  'model.variant': _text('Its size, e.g. Ti, S, B, L of a ViT.'),
  'model.width': _count("Width; 0 for the variant's own."),
  'model.depth': _count("Blocks of a ViT; 0 for the variant's own."),
  'model.depths': _several("Blocks of each stage; empty for the variant's."),
  # A number of a ViT, numbers of a Swin.
  'model.num_heads': Field(
    object, "Attention heads; 0 or empty for the variant's own."
  ),
  'model.image_px': _count('Side for which positions are made, in pixels.', 1),
  'model.patch_px': _count('Side of a patch in pixels.', 1),
  'model.window': _count('Side of an attention window in patches.', 1),
  'model.width_ratio': _positive('Factor of the widths of convolutions.'),
  'model.tokens': _choice(
    'Which map of an EfficientNet the tokens are, by their step in pixels.',
    'stride16',
    'stride32',
  ),
  'model.batch_statistics': _choice(
    'Of an EfficientNet: of the whole batch, or those it starts with.',
    'synchronised',
    'frozen',
  ),
  'model.input_normalisation': _choice(
    'What an EfficientNet expects; the published weights, tensorflow.',
    'tensorflow',
    'imagenet',
  ),
  'model.mlp_ratio': _positive('Hidden over outer dimension of the MLPs.'),
  'model.ffn': _choice('Feed-forward network.', 'mlp', 'swiglu'),
  'model.positions': _choice('Positions.', 'learned', 'rotary'),
  'model.interpolation': _choice(
    'How learned positions meet another grid: as DINO did first, as DINO does '
    'now and DINOv2, or as DINOv2 with registers and timm.',
    'dino',
    'dinov2',
    'antialias',
  ),
  'model.num_registers': _count('Register tokens.'),
  'model.layer_scale': _not_negative('Initial layer scale; 0 for none.'),
  'model.norm_epsilon': _positive('Epsilon of the normalisations.'),
  'model.drop_path_rate': Field(
    float, 'Stochastic depth of the last block.', least=0, most=0.99
  ),
  'model.pool': _choice('Image embedding of a ViT.', 'cls', 'mean'),
  'model.class_token': _switch('Whether a ViT has a class token.'),
  'model.channels': Field(
    int,
    'Channels of the images that a ViT or ResNet takes; other than 3 are kept '
    'in 16 bits: docs/datasets.md.',
    least=1,
    most=64,
  ),
  'model.gelu': _choice(
    "Of a ViT's MLPs; tanh approximates it, as in Google's weights.",
    'exact',
    'tanh',
  ),
  'model.dtype': _choice(
    'Of the computation. Training on CPUs bfloat16 is that of factors of '
    'matrix products alone, as all else is faster in float32.',
    'float32',
    'bfloat16',
  ),
  'model.remat': _choice(
    'What the gradient computes again to need less memory: all but linear '
    'layers, the hidden ones of MLPs as well, or whole blocks.',
    'none',
    'dots',
    'narrow',
    'full',
  ),
  'init.path': _text(
    'What to start from: a file of weights, a name, an hf:// address, or the '
    'work directory of a run; empty draws them.'
  ),
  'init.network': _choice('Which network of the file.', 'teacher', 'student'),
  'lora.rank': _count(
    "Rank of the encoder's adapters, which is frozen then; 0 for none."
  ),
  'lora.alpha': _positive('Scale of the adapters, over their rank.'),
  'head.num_prototypes': _count('K.', 1),
  'head.hidden_dim': _count('Hidden dimension.', 1),
  'head.bottleneck_dim': _count('Dimension before the prototypes.', 1),
  'head.num_layers': _count('Linear layers before the prototypes.', 1),
  'head.norm_last_layer': _switch('Fixes the length of the prototypes.'),
  'head.use_bn': _switch('Normalises hidden layers by the batch.'),
  'method.name': _choice(
    'The method; its fields come with --config=NAME:method=METHOD.',
    'cmd',
    'esvit',
    'dino',
    'particle',
    'detcon',
    'simclr',
    'distil',
    'finetune',
  ),
  'method.variant': _choice(
    "CMD's: the paper's equations, or what the released program computes.",
    'paper',
    'released',
  ),
  'method.weights.*': _not_negative('Weight of a term of the loss.'),
  'method.mil.hidden_dim': _count('Hidden dimension of the attention.', 1),
  'method.pooling': _choice(
    "How a bag's patches are pooled: by attention that learns, by the length "
    'of their features (strength; those of a ViT are all alike), or evenly.',
    'gated_attention',
    'attention',
    'strength',
    'mean',
    'max',
  ),
  'method.kl_direction': _choice(
    'Direction of the cross-level divergence.', 'image_to_bag', 'bag_to_image'
  ),
  'method.attend_regions': _switch('Weights the region term by attention.'),
  'method.shared_prototypes': _switch('Both heads end in the same ones.'),
  'method.teacher.path': _text(
    'What is distilled: a file of weights, a run, or the name of published '
    'weights.'
  ),
  'method.teacher.network': _choice(
    'Which network of the file or run.', 'teacher', 'student'
  ),
  'method.teacher.view_px': _count(
    'Side to which views are resized for the teacher; 0 for their own.'
  ),
  'method.loss': _choice(
    "How features are compared: by their cosine, or, kl, by what the teacher's "
    'own are similar to.',
    'cosine',
    'kl',
  ),
  'method.queue_size': _count(
    'Embeddings by the teacher that loss=kl compares images with.', 1
  ),
  'method.label_smoothing': _fraction(
    'Share of a target that goes to all classes evenly.'
  ),
  'method.mixup': _not_negative(
    'Alpha of the shares in which two images are mixed; 0 mixes none.'
  ),
  'method.class_balance': _fraction(
    'How far rare classes count as much as common ones: 0 not at all, 1 alike.'
  ),
  'method.num_samples': _count('Parts drawn from each view.'),
  'method.temperature': _positive('tau of a contrast or of loss=kl.'),
  'method.local_negatives': _switch(
    'Other parts of the same image are negatives.'
  ),
  'method.match_empty_parts': _switch(
    'Parts without a token can be positives, as released.'
  ),
  **{f'method.projector.{name}': field for name, field in _MLP.items()},
  **{
    f'method.predictor.{name}': field
    for name, field in _MLP.items()
    if name != 'output_dim'
  },
  'parts.source': _choice(
    'Where parts come from.',
    'hypercolumn',
    'cosegmentation',
    'grid',
    'felzenszwalb',
    'annotated',
  ),
  'parts.settings.*': Field(object, "Of the source: its factory's arguments."),
  'parts.rounds': _count('How often parts are found, then trained on.', 1),
  'parts.path': _text('Folder of masks for the first round; empty finds them.'),
  'parts.keypoints': _text(
    'CSV file of keypoints (file, part_id, x, y, visible) that found parts are '
    'compared with.'
  ),
  'parts.view_px': _count('Side of the images in which parts are found.', 1),
  'parts.batch_size': _count('Images whose features are made at a time.', 1),
  'teacher.momentum_schedule': _choice(
    "Of the teacher's momentum; ramped follows at once at first.",
    'cosine',
    'ramped',
  ),
  'teacher.base_momentum': _fraction('Momentum at the start.'),
  'teacher.final_momentum': _fraction('Momentum at the end.'),
  'teacher.warmup_temperature': _positive('tau_t at the start.'),
  'teacher.temperature': _positive('tau_t after the warm-up.'),
  'teacher.warmup_temperature_epochs': _not_negative(
    'Epochs over which tau_t rises.'
  ),
  'teacher.normalisation': _choice(
    "Of the teacher's logits.", 'centring', 'sinkhorn'
  ),
  'teacher.centre_momentum': _fraction('Momentum of the centres.'),
  'optim.name': _choice('The optimiser.', 'adamw', 'sgd'),
  'optim.base_learning_rate': _not_negative(
    'Peak, for a batch of 256; it scales with the batch.'
  ),
  'optim.final_learning_rate': _not_negative('At the end; it does not scale.'),
  'optim.warmup_epochs': _not_negative('Epochs over which the rate rises.'),
  'optim.base_weight_decay': _not_negative('Weight decay at the start.'),
  'optim.final_weight_decay': _not_negative('Weight decay at the end.'),
  'optim.clip_norm': _not_negative(
    "Largest norm of a parameter's gradient; 0 clips nothing."
  ),
  'optim.freeze_last_layer_epochs': _not_negative(
    'Epochs in which the prototypes stand still.'
  ),
  'optim.decay_vectors': _switch('Biases and norms decay as well.'),
  'optim.freeze_encoder_epochs': _not_negative(
    'Epochs at the start in which the heads alone are trained.'
  ),
  'optim.encoder_scale': Field(
    float,
    "The encoder's learning rate as a fraction of the heads'; less in "
    'proportion where min_steps makes more epochs.',
    above=0,
    most=1,
  ),
  'optim.layer_decay': Field(
    float,
    'Factor of the learning rate from a block of the encoder to the one before '
    'it.',
    above=0,
    most=1,
  ),
  'optim.train_last_blocks': Field(
    int, 'Blocks trained, from the end; -1 trains all.', least=-1
  ),
  'optim.skip_non_finite_steps': _count(
    'Steps of the run that may be left out because loss, gradient or new '
    'parameters are not finite; the next one ends the run.'
  ),
  'parallel.mode': _choice('How the step is compiled.', 'jit', 'pmap'),
  'parallel.num_devices': _count('Devices that share a batch; 0 for all.'),
  'parallel.num_slices': _count(
    'TPU slices that the devices are in, or other groups between which the '
    'network is slower; the state is spread within a slice alone.',
    1,
  ),
  'parallel.state': _choice(
    'Whether each device keeps parameters, teacher and moments whole; auto '
    "chooses by the devices' memory.",
    'auto',
    'replicated',
    'fsdp',
  ),
  'parallel.grad_accum_steps': _count(
    'Parts of a batch seen one after the other before a step is taken, which '
    'needs less memory.',
    1,
  ),
  'parallel.steps_per_dispatch': _count(
    'Steps taken in one call, without the host in between.', 1
  ),
  'parallel.kernels': _choice(
    'Whether the loss over prototypes is of Pallas kernels: auto on TPUs, '
    'pallas on GPUs too. They serve numbers of prototypes and bottlenecks '
    'that are multiples of 128 (on GPUs bottlenecks of 128 or 256), and no '
    'bag by its maximum.',
    'auto',
    'pallas',
    'xla',
  ),
  'stream.num_workers': _count('Processes that decode; 0 decodes in threads.'),
  'stream.ahead': _count('Batches decoded ahead.'),
  'log.every_steps': _count(
    'Steps from one line of metrics to the next; fewer where a run would have '
    'less than twenty lines.',
    1,
  ),
  'log.trackers': _text(
    'Experiment trackers, separated by commas: wandb, mlflow, trackio; each '
    'needs the extra of its name.'
  ),
  'log.project': _text('Project of the trackers, or experiment of MLflow.'),
  'log.profile_steps': _text(
    'First and last step that the profiler traces, as 10:15; empty for none.'
  ),
  'checkpoint.every_steps': _count('Steps between checkpoints.', 1),
  'checkpoint.keep': _count('Checkpoints kept.', 1),
  'checkpoint.keep_best': _choice(
    'Score by which the best checkpoint is kept besides, and used; needs '
    'eval.every_epochs. Empty for none; auto for rank1 where there are labels.',
    '',
    'auto',
    'knn',
    'rank1',
    'rankme',
    'top1',
  ),
  'checkpoint.patience': _count(
    'Evaluations without a better checkpoint.keep_best after which the run '
    'ends; 0 for never.'
  ),
  'eval.protocols': _several('What is scored: docs/evaluation.md.'),
  'eval.network': _choice('Which network is scored.', 'teacher', 'student'),
  'eval.every_epochs': _not_negative(
    'Epochs from one score to the next while it trains; 0 for none.'
  ),
  'eval.view_px': _count('Side of the scored view in pixels.', 1),
  'eval.crop_fraction': _fraction(
    'Side of the central crop over the shorter side; 0 shows the whole image.'
  ),
  'eval.batch_size': _count('Images encoded at a time.', 1),
  'eval.search.view_px': _count(
    'Side of the views that are searched by; 0 for eval.view_px.'
  ),
  'eval.search.pooling': _choice(
    'How the vectors that are searched by are pooled.',
    'encoder',
    'gem',
    'strength',
  ),
  'eval.parts_hit.part_ids': _several(
    'For parts/hit: the parts that tell categories apart.'
  ),
  'eval.parts_hit.keypoints': _text(
    'For parts/hit: CSV file (file, part_id, x, y, visible).'
  ),
  'eval.segmentation.view_px': _count('Side of the images in pixels.', 1),
  'eval.segmentation.facet': _choice(
    'What is decoded: tokens, or the keys of a ViT.', 'token', 'key'
  ),
  'eval.segmentation.decoder': _text('Variant of the decoder.'),
  'eval.segmentation.channels': _several('Widths of the decoder.'),
  'eval.segmentation.labelled_images': _count('Images with masks; 0 for all.'),
  'eval.segmentation.num_steps': _count('Steps of the decoder.', 1),
  'eval.segmentation.batch_size': _count('Images of its steps.', 1),
  'eval.segmentation.learning_rate': _positive('Its learning rate.'),
  'eval.segmentation.num_checkpoints': _count(
    'Checkpoints among which the best on test is reported, as published.', 1
  ),
}
