"""Writes tests/convert/data with PyTorch; run by hand, not by the tests."""

import argparse
import collections
import pathlib

import numpy as np
import torch

_DATA = pathlib.Path(__file__).parent / 'data'


def _dtypes():
  """The numbers 0 to 5 in every dtype."""
  return {
    name: torch.arange(6).to(getattr(torch, name)).reshape(2, 3)
    for name in (
      *('float64', 'float32', 'float16', 'bfloat16'),
      *('int64', 'int32', 'int16', 'int8', 'uint8', 'bool'),
      *('complex64', 'complex128'),
    )
  }


def _views():
  """Tensors that share the storage of 0 to 23 or are unlike the others."""
  numbers = torch.arange(24.0)
  return {
    'whole': numbers,
    'transposed': numbers.reshape(4, 6).T,
    'slice': numbers[5:9],
    'strided': numbers.reshape(4, 6)[1::2, 2::3],
    'permuted': numbers.reshape(2, 3, 4).permute(2, 0, 1),
    'scalar': numbers[7],
    'long': torch.tensor(3),
    'empty': torch.empty(0, 5),
    'parameter': torch.nn.Parameter(torch.ones(2)),
  }


def _checkpoint():
  """As DINO saves it: two networks, optimizer, arguments."""
  torch.manual_seed(0)

  def network(value):
    encoder = torch.nn.Sequential(
      collections.OrderedDict(norm=torch.nn.LayerNorm(3))
    )
    model = torch.nn.Module()
    model.add_module('backbone', encoder)
    model.add_module('head', torch.nn.Linear(3, 2))
    torch.nn.init.constant_(encoder.norm.weight, value)
    return model

  student, teacher = network(1.0), network(2.0)
  optimizer = torch.optim.AdamW(student.parameters())
  student.head(student.backbone(torch.ones(1, 3))).sum().backward()
  optimizer.step()
  torch.nn.init.constant_(student.backbone.norm.weight, 1.0)
  return {
    'student': {f'module.{k}': v for k, v in student.state_dict().items()},
    'teacher': teacher.state_dict(),
    'optimizer': optimizer.state_dict(),
    'epoch': 7,
    'args': argparse.Namespace(arch='vit_tiny', lr=5e-4, sizes=(96, 224)),
    'dino_loss': collections.OrderedDict(center=torch.zeros(1, 2)),
    'best': np.float64(0.5),
    'names': {1, 2},
    'device': torch.device('cpu'),
    'factory': collections.defaultdict(list, a=[1]),
  }


def main():
  """Writes the files in both formats."""
  _DATA.mkdir(exist_ok=True)
  values = {'dtypes': _dtypes(), 'views': _views(), 'dino': _checkpoint()}
  for name, value in values.items():
    torch.save(value, _DATA / f'{name}.pth')
    torch.save(
      value,
      _DATA / f'{name}_legacy.pth',
      _use_new_zipfile_serialization=False,
    )
  unsigned = {
    name: torch.arange(3).to(getattr(torch, name))
    for name in ('uint16', 'uint32', 'uint64')
  }
  torch.save(unsigned, _DATA / 'unsigned.pth')
  torch.jit.save(
    torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)),
    _DATA / 'script.pth',
  )
  torch.save(torch.nn.Linear(2, 1), _DATA / 'model.pth')


if __name__ == '__main__':
  main()
