"""What a method that learns labels is given of a data set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cmd_jax.data.sources.base import Example, Source
from cmd_jax.errors import UserError

# Share of the labelled images of a class that are held out of training where
# there is no validation split.
_HELD_OUT = 0.2
# Names of classes in a message.
_SHOWN = 3


class Labelled(NamedTuple):
  """The labelled images of a data set.

  Attributes:
    train: the images trained on, all labelled.
    validation: the images that choose the checkpoint and calibrate.
  """

  train: Source
  validation: Source


def _load_row(
  load: Callable[[int], Example], rows: np.ndarray, index: int
) -> Example:
  return load(int(rows[index]))


def take(source: Source, rows: np.ndarray) -> Source:
  """The examples of a source with the given numbers."""
  return source._replace(
    file_names=tuple(source.file_names[row] for row in rows),
    labels=np.asarray(source.labels)[rows],
    # Not a lambda: worker processes get it pickled.
    load=functools.partial(_load_row, source.load, rows),
  )


def first_of_each_class(labels: np.ndarray) -> np.ndarray:
  """The images whose labels are held out where there is no validation split.

  Args:
    labels: [N] in the order in which images are taken, -1 where unknown.

  Returns:
    [N] bool: of every class with two images or more, about the first fifth and
    at least one.
  """
  is_first = np.zeros(len(labels), bool)
  for label in np.unique(labels[labels >= 0]):
    members = np.flatnonzero(labels == label)
    if len(members) > 1:
      is_first[members[: max(1, round(_HELD_OUT * len(members)))]] = True
  return is_first


def hold_out(labels: np.ndarray) -> np.ndarray:
  """Chooses the images that are not trained on.

  Args:
    labels: [N] of the labelled images.

  Returns:
    [N] bool, see `first_of_each_class`; the same ones for the same labels.
  """
  order = np.random.default_rng(0).permutation(len(labels))
  held_out = np.zeros(len(labels), bool)
  held_out[order] = first_of_each_class(labels[order])
  return held_out


def _named(source: Source, labels: np.ndarray) -> str:
  names = [source.class_names[label] for label in labels[:_SHOWN]]
  more = f' and {len(labels) - _SHOWN} more' if len(labels) > _SHOWN else ''
  return ', '.join(names) + more


def _check_known(train: Source, other: Source, what: str) -> None:
  """Refuses labels that the classifier can't learn."""
  labels = np.asarray(other.labels)
  unknown = np.setdiff1d(labels[labels >= 0], train.labels)
  if len(unknown):
    raise UserError(
      f'{other.name} has {len(unknown)} {what} class(es) without a labelled '
      f'training image ({_named(other, unknown)}): label training images of '
      'them, or take them out of that split'
    )


def _check_trainable(train: Source) -> None:
  count = len(np.unique(train.labels))
  if count < 2:
    found = 'no labelled training images' if not count else 'a single class'
    raise UserError(
      f'{train.name} has {found}, and a classifier needs two classes or more: '
      'add class folders or a labels.csv'
    )


def split_labelled(
  train: Source, validation: Source | None, test: Source
) -> Labelled:
  """Takes the labelled images, and some of them out of training.

  Args:
    train: of the training split, labelled or not.
    validation: of the validation split; None, or one without labels, holds
      training images out.
    test: of the test split, whose labels are only looked at for classes that
      cannot be learned.

  Returns:
    What is trained on and what validates.

  Raises:
    UserError: fewer than two classes, no class with two images to validate by,
      or classes that are not trained on.
  """
  train = take(train, np.flatnonzero(np.asarray(train.labels) >= 0))
  _check_trainable(train)
  _check_known(train, test, 'test')
  if validation is not None and np.any(np.asarray(validation.labels) >= 0):
    _check_known(train, validation, 'validation')
    rows = np.flatnonzero(np.asarray(validation.labels) >= 0)
    return Labelled(train, take(validation, rows))
  asks = hold_out(train.labels)
  if not asks.any():
    raise UserError(
      f'{train.name} has one labelled training image of each class, so that '
      'none can be held out to validate by: label more, or give a validation '
      'split'
    )
  labels, counts = np.unique(train.labels, return_counts=True)
  alone = labels[counts == 1]
  notes = train.notes
  if len(alone):
    notes = (
      *notes,
      f'{len(alone)} class(es) have one labelled training image, which is '
      f'trained on and validates nothing: {_named(train, alone)}',
    )
  held_out = take(train, np.flatnonzero(asks))
  return Labelled(
    take(train, np.flatnonzero(~asks))._replace(notes=notes),
    held_out._replace(name=f'{train.name}, held out'),
  )
