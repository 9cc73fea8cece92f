"""What a config field is that an older program did not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs import common, folder, shards


def _defaults_of(config: Mapping[str, Any]) -> dict[str, Any]:
  """The published config of the same method, encoder and kind of images."""
  method, model, parts = (
    config.get(name) or {} for name in ('method', 'model', 'parts')
  )
  name = method.get('name', '')
  if method.get('variant') == 'released':
    name = f'{name}_released'
  if name not in common.METHODS or model.get('name') not in common.ENCODERS:
    return {}
  source = parts.get('source', '')
  argument = common.Argument(
    method=name,
    encoder=model['name'],
    parts=source if source in common.PARTS else '',
  )
  defaults = common.published(argument).to_dict()
  of_images = {'folder': folder, 'shards': shards}.get(
    (config.get('dataset') or {}).get('source')
  )
  if of_images is not None:
    defaults['dataset'] = of_images.get_config().dataset.to_dict()
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

  A default is that of configs/common.py, which leaves what older programs did
  as it was. A config of unknown kind is returned as it is.

  Args:
    config: nested dict, as config.json holds it.
  """
  return _fill(config, _defaults_of(config))
