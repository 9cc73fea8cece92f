"""Every built-in config, whole, and what each word changes in it.

Where a change is meant, `python tests/config/test_golden.py` writes them anew;
the difference belongs into the review.
"""

import json
import pathlib

import pytest

from cmd_jax.config import builtin, fields, vocabulary

_GOLDEN = pathlib.Path(__file__).with_name('golden.json')
_AGAIN = 'if it is meant: python tests/config/test_golden.py'
_WORDS = [
  'quicktest',
  *(f'method={name}' for name in vocabulary.METHODS),
  *(f'method={name},quicktest' for name in vocabulary.METHODS),
  *(f'encoder={name}' for name in vocabulary.ENCODERS),
  *(f'encoder={name},quicktest' for name in vocabulary.ENCODERS),
  *(f'start={name}' for name in vocabulary.STARTS),
  'start=pretrained,quicktest',
  'start=pretrained,encoder=vit',
  *(f'method=particle,encoder={name}' for name in vocabulary.ENCODERS),
  *(f'method=particle,parts={name}' for name in vocabulary.PARTS),
]


def _resolve(name, words=''):
  """Fields by dotted path, as JSON gives them back."""
  config = builtin.BUILTIN[name](words).to_dict()
  return json.loads(json.dumps(dict(fields.leaves(config))))


def _changes(base, other):
  """What is other or new, and None for what is gone."""
  gone = dict.fromkeys(base.keys() - other.keys())
  new = {k: v for k, v in other.items() if k not in base or base[k] != v}
  return gone | new


def _dump(name):
  base = _resolve(name)
  changes = {words: _changes(base, _resolve(name, words)) for words in _WORDS}
  return {'fields': base, 'words': changes}


@pytest.mark.parametrize('name', builtin.BUILTIN)
def test_configs_are_what_they_were(name):
  golden = json.loads(_GOLDEN.read_text())
  assert golden.keys() == builtin.BUILTIN.keys()
  dumped = _dump(name)
  assert dumped['fields'] == golden[name]['fields'], _AGAIN
  assert dumped['words'].keys() == golden[name]['words'].keys(), _AGAIN
  for words, changes in dumped['words'].items():
    assert changes == golden[name]['words'][words], f'{words}: {_AGAIN}'


if __name__ == '__main__':
  dumps = {name: _dump(name) for name in builtin.BUILTIN}
  _GOLDEN.write_text(json.dumps(dumps, indent=1, sort_keys=True) + '\n')
