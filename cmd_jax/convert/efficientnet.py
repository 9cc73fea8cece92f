"""EfficientNet-Lite in the naming of efficientnet_lite_pytorch.

That is the package whose class the published files belong to (convert/
pretrained.py). Depthwise kernels are (channels, 1, k, k) there. The classifier,
`_fc`, is no part of an encoder, and `num_batches_tracked` is no entry, see
convert/resnet.py.
"""

from __future__ import annotations

from cmd_jax.convert.entries import CONV, POINTWISE, Entry, Layout, batch_norm
from cmd_jax.models.efficientnet import EXPANSIONS, EfficientNet


def _conv(path: str, name: str, layout: Layout) -> Entry:
  keys = ('params', *path.split('/'))
  return Entry((*keys, 'kernel'), f'{name}.weight', layout)


def _block_entries(index: int, expansion: int) -> list[Entry]:
  block, name = f'block_{index}', f'_blocks.{index}'
  table = []
  if expansion > 1:
    conv = _conv(f'{block}/expand_conv', f'{name}._expand_conv', POINTWISE)
    table += [conv, *batch_norm(f'{block}/expand_bn', f'{name}._bn0')]
  return [
    *table,
    _conv(f'{block}/depthwise_conv', f'{name}._depthwise_conv', CONV),
    *batch_norm(f'{block}/depthwise_bn', f'{name}._bn1'),
    _conv(f'{block}/project_conv', f'{name}._project_conv', POINTWISE),
    *batch_norm(f'{block}/project_bn', f'{name}._bn2'),
  ]


def entries(encoder: EfficientNet) -> list[Entry]:
  """The table of an encoder, running statistics included."""
  table = [
    _conv('conv_stem', '_conv_stem', CONV),
    *batch_norm('bn_stem', '_bn0'),
  ]
  index = 0
  for size, expansion in zip(encoder.stage_sizes, EXPANSIONS, strict=True):
    for _ in range(size):
      table += _block_entries(index, expansion)
      index += 1
  return [
    *table,
    _conv('conv_head', '_conv_head', POINTWISE),
    *batch_norm('bn_head', '_bn1'),
  ]
