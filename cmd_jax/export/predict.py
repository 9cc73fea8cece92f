"""What a fine-tuned classifier says of images, as a CSV file."""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cmd_jax.api import Encoder
from cmd_jax.errors import UserError
from cmd_jax.evaluators.classifier import Classifier
from cmd_jax.files import disk_errors
from cmd_jax.files.atomic import write_atomically

# What the column `name` has below the threshold.
UNKNOWN = 'not among the classes'
# Classes of an image in the file, beside the most probable one.
_MOST_LISTED = 5


class Predictions(NamedTuple):
  """What a classifier says of N images.

  Attributes:
    probabilities: [N, C] calibrated probabilities.
    taken: [N] the most probable class.
    is_known: [N] whether its probability reaches the threshold.
  """

  probabilities: np.ndarray
  taken: np.ndarray
  is_known: np.ndarray


def check_output(path: pathlib.Path) -> None:
  """Raises UserError unless a path is that of a CSV file."""
  if path.suffix != '.csv':
    raise UserError(f'--output={path} does not end in .csv: name it so')


def check_classifier(encoder: Encoder) -> Classifier:
  """The classifier of an encoder.

  Raises:
    UserError: it has none that is calibrated.
  """
  if encoder.classifier is None:
    method = encoder.training.get('method')
    raise UserError(
      f'{encoder.source}, a run of method={method}, has no calibrated '
      'classifier: cmd-jax finetune trains one in a work directory of its own; '
      'of one that was stopped the same command finishes it, and cmd-jax '
      'evaluate calibrates another checkpoint'
    )
  return encoder.classifier


def predict(classifier: Classifier, vectors: np.ndarray) -> Predictions:
  """What a classifier says of [N, D] embeddings."""
  probabilities = classifier.probabilities(vectors)
  return Predictions(
    probabilities,
    probabilities.argmax(1),
    probabilities.max(1) >= classifier.threshold,
  )


def save_predictions(
  path: pathlib.Path,
  classifier: Classifier,
  file_names: Sequence[str],
  predictions: Predictions,
) -> None:
  """Writes a line for each image.

  The columns are `file`; `name`, the most probable class or `UNKNOWN`;
  `probability`, that of the most probable class; and `class_1`,
  `probability_1` and so on, the most probable classes in order, five at most.

  Args:
    path: of the CSV file; an existing one is replaced as a whole.
    classifier: whose classes they are.
    file_names: [N] names of the images.
    predictions: of these images.

  Raises:
    UserError: a file that cannot be written.
  """
  names = classifier.class_names
  listed = min(_MOST_LISTED, len(names))
  text = io.StringIO(newline='')
  writer = csv.writer(text)
  columns = (
    (f'class_{rank}', f'probability_{rank}') for rank in range(1, listed + 1)
  )
  writer.writerow(('file', 'name', 'probability', *sum(columns, ())))
  for file_name, probabilities, is_known in zip(
    file_names, predictions.probabilities, predictions.is_known, strict=True
  ):
    order = np.argsort(-probabilities, kind='stable')[:listed]
    row = [
      file_name,
      names[order[0]] if is_known else UNKNOWN,
      f'{probabilities[order[0]]:.6f}',
    ]
    for label in order:
      row += [names[label], f'{probabilities[label]:.6f}']
    writer.writerow(row)
  content = text.getvalue().encode('utf-8', 'surrogateescape')
  with disk_errors.writing(path):
    write_atomically(path, content)
