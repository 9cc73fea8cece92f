"""Residual networks in the naming of torchvision, which is timm's.

`num_batches_tracked` of torch's batch normalisations is no entry: nothing here
counts batches, and with a fixed momentum nothing there reads the count.
Exporters add it as 0.
"""

from __future__ import annotations

from cmd_jax.convert.entries import CONV, Entry, batch_norm
from cmd_jax.models.resnet import ResNet


def _conv(path: str, name: str) -> Entry:
  keys = ('params', *path.split('/'))
  return Entry((*keys, 'kernel'), f'{name}.weight', CONV)


def entries(encoder: ResNet) -> list[Entry]:
  """The table of an encoder, running statistics included."""
  table = [_conv('conv1', 'conv1'), *batch_norm('bn1', 'bn1')]
  for stage, size in enumerate(encoder.stage_sizes, 1):
    for index in range(size):
      block, name = f'layer{stage}_{index}', f'layer{stage}.{index}'
      for conv in range(1, 4 if encoder.bottleneck else 3):
        table.append(_conv(f'{block}/conv{conv}', f'{name}.conv{conv}'))
        table += batch_norm(f'{block}/bn{conv}', f'{name}.bn{conv}')
      if index == 0 and encoder.has_downsample(stage):
        downsample = f'{name}.downsample'
        table.append(_conv(f'{block}/downsample_conv', f'{downsample}.0'))
        table += batch_norm(f'{block}/downsample_bn', f'{downsample}.1')
  return table
