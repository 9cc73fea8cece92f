"""What a config field is that an older program did not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cmd_jax.config import builtin, published, vocabulary


def _defaults_of(config: Mapping[str, Any]) -> dict[str, Any]:
  """The published config of the same method, encoder and kind of images."""
  method, model, parts = (
    config.get(name) or {} for name in ('method', 'model', 'parts')
  )
  name = method.get('name', '')
  if method.get('variant') == 'released':
    name = f'{name}_released'
  encoder = model.get('name')
  if name not in vocabulary.METHODS or encoder not in vocabulary.ENCODERS:
    return {}
  source = parts.get('source', '')
  argument = vocabulary.Argument(
    method=name,
    encoder=encoder,
    parts=source if source in vocabulary.PARTS else '',
  )
  defaults = published.published(argument).to_dict()
  of_images = {'folder': builtin.folder, 'shards': builtin.shards}.get(
    (config.get('dataset') or {}).get('source')
  )
  if of_images is not None:
    defaults['dataset'] = of_images().dataset.to_dict()
  return defaults


def _fill(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict:
  filled = dict(config)
  for key, value in defaults.items():
    if key not in filled:
      filled[key] = value
    elif isinstance(value, Mapping) and isinstance(filled[key], Mapping):
      filled[key] = _fill(filled[key], value)
  return filled


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
  """Adds the fields that a config lacks, with this program's defaults.

  A default is that of `published.published`, which leaves what older programs
  did as it was. A config of unknown kind is returned as it is.

  Args:
    config: nested dict, as config.json holds it.
  """
  return _fill(config, _defaults_of(config))
