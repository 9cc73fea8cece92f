import importlib.util
import re

import pytest

from cmd_jax.compile_ahead import gpus, targets
from cmd_jax.devices import chips
from cmd_jax.errors import UserError


@pytest.mark.parametrize(
  ('name', 'parsed'),
  [
    ('v5e:2x4', ('v5e', '2x4')),
    ('v5p:2x2x2', ('v5p', '2x2x2')),
    ('h100', ('h100', '1')),
    ('l4:4', ('l4', '4')),
  ],
)
def test_known_names(name, parsed):
  assert targets.parse_name(name) == parsed


@pytest.mark.parametrize(
  ('name', 'hint'),
  [
    ('v5e:3x5', 'v5e:'),
    ('v5e', 'v5e:'),
    ('v5p:2x4', 'v5p:'),
    ('h1000', 'h100'),
    ('h100:3', 'h100'),
  ],
)
def test_unknown_names_are_told_the_known_ones(name, hint):
  with pytest.raises(UserError) as raised:
    targets.parse_name(name)
  message = str(raised.value)
  assert f'--topology={name} is not known (did you mean {hint}' in message
  assert 'v6e:1x1|2x2|2x4' in message and 'a100, l4' in message
  assert '\n' not in message


@pytest.mark.parametrize(
  ('name', 'extra'), [('v5e:2x4', 'tpu'), ('h200', 'cuda')]
)
def test_a_missing_compiler_names_its_extra(monkeypatch, name, extra):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=rf"pip install 'cmd_jax\[{extra}\]'"):
    targets.find_target(name)


def _parse(lines):
  """What is in a message of protocol buffers' text format."""
  fields = {}
  for line in lines:
    if line.endswith('{'):
      fields[line.split()[0]] = _parse(lines)
    elif line == '}':
      return fields
    else:
      name, value = re.fullmatch(r'(\w+): (".*"|[\w.]+)', line).groups()
      fields[name] = value.strip('"')
  return fields


@pytest.mark.parametrize('name', gpus.GPUS)
def test_gpus_are_described_as_the_compiler_reads_them(name):
  gpu = gpus.GPUS[name]
  text = gpus.target_config(gpu)
  assert text.count('{') == text.count('}') == 3
  config = _parse(iter(x.strip() for x in text.splitlines()))
  assert config['platform_name'] == 'CUDA'
  info = config['gpu_device_info']
  capability = info['cuda_compute_capability']
  assert (int(capability['major']), int(capability['minor'])) == gpu.capability
  assert int(info['core_count']) == gpu.cores
  chip = chips.CHIPS[config['device_description_str']]
  assert chip.name == name
  assert chip.memory == int(chips.GPU_SHARE * int(info['device_memory_size']))
  rate = int(info['memory_bandwidth'])
  assert chip.bandwidth == pytest.approx(rate, rel=0.01)


def test_every_kind_of_topology_has_a_chip():
  names = {chip.name for chip in chips.CHIPS.values()}
  assert names == {*targets.TPUS, *gpus.GPUS}
