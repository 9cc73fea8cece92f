"""What differs between the config of a run and that of its resumption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from cmd_jax.config.defaults import complete

# Fields that may differ: they change what is recorded and where it runs, not
# what is computed.
FREE_FIELDS = (
  'checkpoint.',
  'eval.',
  'log.',
  'model.remat',
  'parallel.',
  'placement',
  'stream.',
  'dataset.data_dir',
  'dataset.index_file',
  'dataset.validation_split',
  'parts.keypoints',
  'optim.skip_non_finite_steps',
)

# Where the images are: another place is as good if the same ones are there,
# which is known when they are listed.
PLACES = ('dataset.path', 'dataset.train', 'dataset.test')

EPOCHS = 'total_epochs'

_WHY_NOT = {
  'augment.': 'the views would be others',
  'batch_size': 'batches, epochs and learning rate follow it',
  'canvas_px': 'the images would be others',
  'dataset.': 'the images would be others',
  'decode_px': 'the images would be others',
  'grey16_white': 'the images would be others',
  'head.': 'the parameters are of another network',
  'init.': 'the run has started already',
  'lora.': 'the parameters are of another network',
  'method.': 'the loss would be another',
  'model.': 'the parameters are of another network',
  'optim.': 'schedules and moments are of the other optimiser',
  'parts.': 'the parts would be others',
  'seed': 'weights, batches and views follow it',
  'student_temperature': 'the loss would be another',
  'teacher.': "the teacher's targets would be others",
}

# In place of the value of a field that is not there.
_NONE = 'missing'


class Difference(NamedTuple):
  """A field that is not the same.

  Attributes:
    field: its name, with dots.
    there: its value in the work directory; 'missing' for none.
    here: its value now; likewise.
    may_change: whether the run can be resumed all the same.
    why: why not, or what follows.
  """

  field: str
  there: Any
  here: Any
  may_change: bool
  why: str


def flatten(tree: Mapping, prefix: str = '') -> dict[str, Any]:
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f'{prefix}{key}.'))
    else:
      flat[prefix + key] = value
  return flat


def _judge_epochs(there: Any, here: Any, rounds: int) -> tuple[bool, str]:
  if here < there:
    return False, 'a run can be made longer, not shorter'
  if rounds > 1:
    return False, 'parts are found anew at shares of the run'
  return True, (
    'learning rate, weight decay and teacher momentum go on along the longer '
    'schedules'
  )


def _judge(
  field: str, there: Mapping[str, Any], here: Mapping[str, Any]
) -> tuple[bool, str]:
  """Whether a field may differ, and why not, or what follows."""
  if field.startswith(FREE_FIELDS):
    return True, 'changes nothing that is computed'
  if field not in here:
    return False, 'this program has no such field'
  if field in PLACES and field in there:
    return True, 'the images there are compared with those of the run'
  if field == EPOCHS and field in there:
    rounds = here.get('parts.rounds', 1)
    return _judge_epochs(there[field], here[field], rounds)
  for prefix, why in _WHY_NOT.items():
    if field.startswith(prefix):
      return False, why
  return False, 'it may change what is computed'


def differences(there: Mapping, here: Mapping) -> list[Difference]:
  """Compares two configs.

  A field that only one of them has is compared with this program's default for
  it, so that runs of an older program can be resumed.

  Args:
    there: nested dict, of the run.
    here: nested dict that JSON can represent, of the command.
  """
  # Through JSON, so that tuples compare equal to the lists they become.
  there, here = (
    flatten(complete(json.loads(json.dumps(x)))) for x in (there, here)
  )
  return [
    Difference(
      field,
      there.get(field, _NONE),
      here.get(field, _NONE),
      *_judge(field, there, here),
    )
    for field in sorted(there.keys() | here.keys())
    if field not in there or field not in here or there[field] != here[field]
  ]


def short(value: Any) -> str:
  """A value of a `Difference` in at most 40 characters."""
  text = _NONE if value == _NONE else repr(value)
  return text if len(text) <= 40 else f'{text[:37]}...'


def table(found: list[Difference]) -> str:
  """The differences for people, a line each; those in the way come first."""
  rows = [('field', 'there', 'here', 'may change', 'why')]
  for x in sorted(found, key=lambda x: x.may_change):
    yes = 'yes' if x.may_change else 'no'
    rows.append((x.field, short(x.there), short(x.here), yes, x.why))
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  return '\n'.join(
    '  '.join([*(cell.ljust(n) for cell, n in zip(row, widths)), row[4]])
    for row in rows
  )
