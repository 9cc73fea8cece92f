"""The words after the colon of `--config=NAME:WORDS`."""

from __future__ import annotations

from typing import NamedTuple

METHODS = (
  'cmd',
  'cmd_released',
  'esvit',
  'dino',
  'particle',
  'detcon',
  'simclr',
  'distil',
  'finetune',
)
# Those that learn labels.
METHODS_OF_LABELS = ('finetune',)
# Those that contrast parts.
METHODS_OF_PARTS = ('particle', 'detcon')
# Those to which two images are never the same thing.
METHODS_OF_SINGLE_IMAGES = (*METHODS_OF_PARTS, *METHODS_OF_LABELS, 'distil')
ENCODERS = ('vit', 'swin', 'resnet', 'efficientnet')
STARTS = ('pretrained', 'scratch')
PARTS = ('hypercolumn', 'cosegmentation', 'grid', 'felzenszwalb', 'annotated')


class Argument(NamedTuple):
  """What follows the colon of `--config=FILE:method=dino,quicktest`.

  Attributes:
    method: one of `METHODS`.
    encoder: one of `ENCODERS`.
    parts: one of `PARTS`; empty for the method's and the encoder's own.
    start: one of `STARTS`; empty for the config's own.
    quicktest: whether the quick test is wanted.
  """

  method: str = 'cmd'
  encoder: str = 'vit'
  parts: str = ''
  start: str = ''
  quicktest: bool = False


USUAL = Argument()


def parse_argument(argument: str | None, usual: Argument = USUAL) -> Argument:
  """Reads what follows the colon of --config.

  Args:
    argument: words separated by commas.
    usual: what holds where no word says otherwise.

  Raises:
    ValueError: an unknown word or choice, with the valid ones, or parts for a
      method without.
  """
  choices = {
    'quicktest': ('quicktest', True),
    **{f'method={name}': ('method', name) for name in METHODS},
    **{f'encoder={name}': ('encoder', name) for name in ENCODERS},
    **{f'parts={name}': ('parts', name) for name in PARTS},
    **{f'start={name}': ('start', name) for name in STARTS},
  }
  fields = {}
  for word in filter(None, (argument or '').split(',')):
    if word not in choices:
      raise ValueError(
        f'unknown config argument {word!r}: choose from {", ".join(choices)}'
      )
    field, value = choices[word]
    fields[field] = value
  found = usual._replace(**fields)
  if found.parts and found.method not in METHODS_OF_PARTS:
    raise ValueError(
      f'parts={found.parts} is for the methods of parts, and the method is '
      f'{found.method}: leave it out, or use method='
      + ' or method='.join(METHODS_OF_PARTS)
    )
  return found
