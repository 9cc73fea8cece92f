import types

import jax
import numpy as np
import psutil
import pytest
from jax.experimental import multihost_utils

from cmd_jax.data.pipeline import residency
from cmd_jax.errors import UserError

GIB = 2**30


def _choose(
  monkeypatch, wanted='auto', *, host_gib=64, device_gib=None, **set_
):
  monkeypatch.setattr(
    psutil,
    'virtual_memory',
    lambda: types.SimpleNamespace(available=host_gib * GIB),
  )
  device = types.SimpleNamespace(
    platform='gpu' if device_gib else 'cpu',
    process_index=0,
    memory_stats=lambda: {'bytes_limit': (device_gib or 0) * GIB},
  )
  devices = np.array([device] * set_.pop('num_devices', 1))
  mesh = types.SimpleNamespace(devices=devices)
  # 16,384 canvases of 256 pixels a side are 3 GiB, their masks another.
  fields = dict(
    num_pretrain=16384, num_test=0, canvas_px=256, with_parts=False, mesh=mesh
  )
  return residency.choose_placement(wanted, **fields | set_)


@pytest.mark.parametrize(
  'memory, route',
  [
    (dict(host_gib=13), 'device'),
    (dict(host_gib=11), 'stream'),
    (dict(host_gib=15, num_test=16384), 'stream'),
    (dict(host_gib=13, with_parts=True), 'stream'),
    # Every CPU device has its own copy.
    (dict(host_gib=20, num_devices=8), 'stream'),
    (dict(device_gib=8), 'device'),
    (dict(device_gib=7), 'stream'),
    (dict(device_gib=8, num_devices=8), 'device'),
    (dict(device_gib=80, host_gib=5), 'stream'),
  ],
)
def test_the_route_follows_from_size_and_memory(monkeypatch, memory, route):
  chosen = _choose(monkeypatch, **memory)
  assert chosen.route == route
  assert chosen.reason.startswith(f'placement {route}: ')
  assert '\n' not in chosen.reason
  assert ('on each device' in chosen.reason) == ('device_gib' in memory)


def test_hosts_take_one_route(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  others = np.array([True, False])
  monkeypatch.setattr(
    multihost_utils, 'process_allgather', lambda fits: fits & others
  )
  assert _choose(monkeypatch, device_gib=80).route == 'stream'
  others[1] = True
  assert _choose(monkeypatch, device_gib=80).route == 'device'


def test_a_run_that_goes_on_keeps_its_route(monkeypatch):
  chosen = _choose(monkeypatch, host_gib=64, route_before='stream')
  assert chosen.route == 'stream'
  assert chosen.reason.endswith(', as when the run began')
  chosen = _choose(monkeypatch, 'device', route_before='stream')
  assert chosen.route == 'device'
  assert chosen.reason.endswith(', as config.placement says')


def test_the_config_has_the_last_word(monkeypatch):
  assert _choose(monkeypatch, 'stream').route == 'stream'
  chosen = _choose(monkeypatch, 'device', host_gib=1)
  assert chosen.route == 'device'
  assert '6.0 GiB of 1.0 GiB free host memory' in chosen.reason
  assert 'as config.placement says' in chosen.reason
  with pytest.raises(UserError, match="'disk': choose one of auto, device"):
    _choose(monkeypatch, 'disk')
