"""What a report shows: everything that the page is made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from cmd_jax.data.sources.base import UNLABELLED
from cmd_jax.errors import UserError
from cmd_jax.evaluators import (
  Features,
  FrozenNetwork,
  explain_protocols,
  knn,
  why_not_scored,
)
from cmd_jax.evaluators.nearest import find_nearest
from cmd_jax.evaluators.whitening import apart_in
from cmd_jax.report import (
  confusions,
  embedding_map,
  history,
  meaning,
  photos,
)
from cmd_jax.report.curated import read_curated
from cmd_jax.rundir.config_diff import flatten
from cmd_jax.rundir.workdir import Workdir, read_json
from cmd_jax.training import part_rounds, scoring
from cmd_jax.training.classification import (
  ENTRY,
  classifier_of,
  summary_of,
)
from cmd_jax.training.experiment import Experiment

_NUM_NEIGHBOURS = 20
_MAX_PAIRS = 12
# What names the test images, at the beginning of a sentence.
_KNN = 'The weighted vote of the 20 nearest training images (knn/20)'
_CLASSIFIER = 'The fine-tuned classifier'
# Classes side by side in the matrix of confusions.
_MAX_CLASSES = 12


def _numbers(array: np.ndarray, dtype: str) -> str:
  """Little-endian bytes, as a typed array reads them."""
  return photos.encode_base64(np.ascontiguousarray(array, dtype).tobytes())


_ENCODERS = {
  'vit': 'vision transformer (ViT)',
  'swin': 'Swin transformer',
  'resnet': 'residual network (ResNet)',
  'efficientnet': 'EfficientNet',
}


def _describe_encoder(name: str, variant: str) -> str:
  """The encoder in words, such as 'vision transformer (ViT), size S'."""
  if not name:
    return ''
  words = _ENCODERS.get(name, name)
  if variant == 'Mu':
    return f'{words}, size Mu: the smallest'
  return f'{words}, size {variant}' if variant else words


def _as_searched(
  experiment: Experiment,
  network: FrozenNetwork,
  splits: Sequence[photos.Split],
) -> list[Features]:
  """Features of the photographs shown, as cmd-jax search tells them apart.

  Its views and its pooling may be others than those of the scores, and
  directions in which neighbours among the training images differ count less.
  """
  views = experiment.evaluation.settings['search']
  train = network.embeddings(experiment.splits.train, **views)
  told_apart = apart_in(train.vectors)
  shown = []
  for split in splits:
    features = train
    if split.name == 'test':
      features = network.embeddings(experiment.splits.test, **views)
    features = features.take(split.rows)
    shown.append(features._replace(vectors=told_apart(features.vectors)))
  return shown


def _describe_neighbours(
  splits: Sequence[photos.Split], shown: Sequence[Features]
) -> dict[str, Any]:
  """The nearest training photographs shown of every photograph shown.

  Args:
    splits: the photographs shown.
    shown: their features, as they are told apart.
  """
  gallery = shown[0]
  queries = np.concatenate([features.vectors for features in shown])
  own = np.full(len(queries), -1)
  has_gallery = splits[0].name == 'training'
  if has_gallery:
    own[: len(gallery.vectors)] = np.arange(len(gallery.vectors))
  nearest = find_nearest(
    queries,
    gallery.vectors if has_gallery else gallery.vectors[:0],
    _NUM_NEIGHBOURS,
    own=own,
  )
  return {
    'count': nearest.rows.shape[1],
    'index': _numbers(nearest.rows, '<u4'),
    'similarity': _numbers(nearest.similarities, '<f4'),
  }


def _describe_confusion(
  test: Features, predicted: np.ndarray, shown_rows: np.ndarray, offset: int
) -> dict[str, Any]:
  """The classes confused most, with photographs of them.

  Args:
    test: features of all test images.
    predicted: their predicted labels.
    shown_rows: test images shown.
    offset: place on the page of the first of these.
  """
  counts = confusions.count_confusions(
    test.labels, predicted, len(test.class_names)
  )
  pairs = confusions.most_confused(counts, _MAX_PAIRS)
  labels, votes = test.labels[shown_rows], predicted[shown_rows]

  def examples(true: int, voted: int) -> list[int]:
    found = np.flatnonzero((labels == true) & (votes == voted))
    return (found[:6] + offset).tolist()

  classes = list(dict.fromkeys(c for pair in pairs for c in pair[:2]))
  classes = classes[:_MAX_CLASSES]
  return {
    'total': int(counts.sum()),
    'right': int(np.trace(counts)),
    'pairs': [
      {
        'first': pair.first,
        'second': pair.second,
        'counts': [pair.first_as_second, pair.second_as_first],
        'totals': counts[[pair.first, pair.second]].sum(1).tolist(),
        'examples': [
          examples(pair.first, pair.second),
          examples(pair.second, pair.first),
        ],
      }
      for pair in pairs
    ],
    'classes': classes,
    'matrix': counts[np.ix_(classes, classes)].tolist(),
    'totals': counts[classes].sum(1).tolist(),
  }


def _describe_parts(
  experiment: Experiment,
  workdir: Workdir,
  splits: Sequence[photos.Split],
  notes: list[str],
) -> dict[str, Any] | None:
  """The newest part masks of the training photographs shown."""
  found = sorted(
    workdir.parts.glob('*/manifest.json'), key=lambda p: p.stat().st_mtime
  )
  if experiment.parts is None or not found or splits[0].name != 'training':
    return None
  name = found[-1].parent.name
  try:
    sha256 = read_json(found[-1]).get('encoder_sha256', '')
    masks = part_rounds.load_part_masks(experiment, workdir, name, sha256)
  except UserError as error:
    notes.append(f'The parts are not shown: {error}.')
    return None
  background = experiment.parts.has_background
  return {
    'name': name,
    'masks': [
      photos.encode_base64(photos.make_mask(masks[row], background))
      for row in splits[0].rows
    ],
  }


def _describe_photos(
  splits: Sequence[photos.Split],
  shown: Sequence[Features],
  predicted: np.ndarray | None,
  layout: embedding_map.Map,
  drawn: photos.Drawn,
) -> dict[str, Any]:
  """All that the page knows of each photograph, a column each."""
  labels = np.concatenate([features.labels for features in shown])
  votes = np.full(len(labels), UNLABELLED)
  if predicted is not None and splits[-1].name == 'test':
    rows = splits[-1].rows
    votes[len(votes) - len(rows) :] = predicted[rows]
  return {
    'names': [name for features in shown for name in features.file_names],
    'is_test': [int(s.name == 'test') for s in splits for _ in s.rows],
    'labels': labels.tolist(),
    'predicted': votes.tolist(),
    'sizes': drawn.sizes.tolist(),
    'thumbnails': drawn.thumbnails,
    'attention': {
      'grid': drawn.attention.shape[1],
      'heat': _numbers(drawn.attention, 'u1'),
    },
    'neighbours': _describe_neighbours(splits, shown),
    'map': {
      'method': layout.method,
      'points': _numbers(np.rint(65535 * layout.points), '<u2'),
    },
  }


def _describe_run(
  experiment: Experiment, workdir: Workdir, network: FrozenNetwork, step: int
) -> dict[str, Any]:
  """Where the numbers come from: the run, its config, its machine."""
  results = workdir.results()
  parameters = sum(x.size for x in jax.tree.leaves(network.variables['params']))
  config = {}
  if workdir.config_file.exists():
    config = flatten(workdir.read_config())
  counts = {'training images': len(experiment.data.pretrain.file_names)}
  if experiment.data.test is not None:
    counts['test images'] = len(experiment.data.test.file_names)
  return {
    'dataset': experiment.data.name,
    'method': experiment.method_name,
    'network': experiment.evaluation.network,
    'encoder': _describe_encoder(
      str(config.get('model.name', '')), str(config.get('model.variant', ''))
    ),
    'parameters': int(parameters),
    'step': step,
    'total_steps': experiment.steps.total,
    'best': results.get('best') if step == results.get('scored_step') else None,
    'counts': counts,
    'seconds': results.get('seconds'),
    'images_per_second': results.get('images_per_second'),
    'init_from': results.get('init_from'),
    'data_sha256': experiment.data.sha256,
    'hardware': results.get('hardware'),
    'versions': results.get('versions') or {},
    'config': {key: json.dumps(config[key]) for key in sorted(config)},
  }


def _notes(
  experiment: Experiment,
  workdir: Workdir,
  step: int,
  splits: Sequence[photos.Split],
) -> list[str]:
  """What a reader of the page must know."""
  notes = []
  reason = why_not_scored(experiment.splits)
  if reason:
    notes.append(
      f'{reason[0].upper()}{reason[1:]}. Scores and confusions need labels: '
      'add class folders or a labels.csv.'
    )
  given = [experiment.data.pretrain, experiment.data.test]
  total = sum(len(split.file_names) for split in given if split is not None)
  count = sum(len(split.rows) for split in splits)
  if count < total:
    notes.append(
      f'{count} of {total} photographs are shown, chosen by chance, and '
      'neighbours are looked for among these; --report_images=N shows more. '
      'Confusions are counted on all test images.'
    )
  results = workdir.results()
  scored = results.get('scored_step', results.get('steps'))
  if 'final' in results and scored != step:
    notes.append(
      f'The scores are those of step {scored}; the photographs are seen by '
      f'the network of step {step}. cmd-jax evaluate scores anew.'
    )
  return notes


def collect(
  experiment: Experiment,
  workdir: Workdir,
  *,
  max_images: int,
  newest: bool = False,
) -> dict[str, Any]:
  """Computes what the page shows, as JSON can represent it.

  Args:
    experiment: the run's.
    workdir: of the run, with a checkpoint.
    max_images: photographs at most; a sample where there are more.
    newest: whether the newest checkpoint is shown, not the best.

  Raises:
    UserError: no checkpoint, or one that does not fit.
  """
  network, used = scoring.read_trained(experiment, workdir, newest=newest)
  scoring.check_same_start(experiment, workdir)
  pretrain, test = (
    None if split is None else network.embeddings(split)
    for split in experiment.splits
  )
  splits = photos.sample(
    experiment.data.pretrain, experiment.data.test, max_images
  )
  shown = _as_searched(experiment, network, splits)
  classifier = classifier_of(experiment, used.classifier)
  predicted = None
  if test is not None and classifier is not None:
    predicted = classifier.logits(test.vectors).argmax(1).astype(np.int32)
  elif test is not None:
    predicted = knn.predict(pretrain, test)
  layout = embedding_map.make_map(np.concatenate([f.vectors for f in shown]))
  drawn = photos.draw(splits, network.attend, batch_size=network.batch_size)
  notes = _notes(experiment, workdir, used.step, splits)
  if ENTRY in workdir.results():
    notes += summary_of(workdir.results()[ENTRY]).splitlines()
  if layout.note:
    notes.append(f'The map shows principal components: {layout.note}.')
  curves = history.read_curves(workdir.metrics_file)
  curves['about'] = meaning.describe_curves(
    curves['series'],
    num_prototypes=experiment.num_prototypes,
    term_warmup=experiment.steps.term_warmup,
  )
  is_scored = why_not_scored(experiment.splits) is None
  test_rows = splits[-1].rows if splits[-1].name == 'test' else np.zeros(0, int)
  return {
    'run': _describe_run(experiment, workdir, network, used.step),
    'results': history.table(workdir.results()),
    'protocols': explain_protocols(
      row['name'] for row in history.table(workdir.results())
    ),
    'verdict': meaning.judge(workdir, workdir.results()),
    'curves': curves,
    'classes': list(experiment.data.pretrain.class_names),
    'attention_name': network.attention_name,
    'crop_fraction': experiment.evaluation.settings.get('crop_fraction') or 0,
    'photos': _describe_photos(splits, shown, predicted, layout, drawn),
    'confusion': _describe_confusion(
      test, predicted, test_rows, len(drawn.thumbnails) - len(test_rows)
    )
    | {'judge': _KNN if classifier is None else _CLASSIFIER}
    if is_scored
    else None,
    'curated': read_curated(workdir),
    'parts': _describe_parts(experiment, workdir, splits, notes),
    'notes': notes,
  }
