"""What the benchmarks count, compute and keep; nothing is timed here."""

import json
import math

import pytest

from benchmarks import __main__ as listing
from benchmarks import ceilings, gpu, interconnects, record, scaling, step
from cmd_jax.compile_ahead import hlo
from cmd_jax.compile_ahead.collectives import read_collectives
from cmd_jax.compile_ahead.flops import count_flops
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError

# As large where it is counted, and as small elsewhere, as compiles quickly.
_SMALL = (
  'model.width=64',
  'model.depth=1',
  'model.num_heads=2',
  'model.image_px=32',
  'model.patch_px=8',
  'model.dtype=float32',
  'augment.global_px=32',
  'augment.local_px=16',
  'augment.num_local=1',
  'canvas_px=32',
  'head.hidden_dim=256',
)


def test_flops_and_gradients_of_the_step_are_those_of_its_program():
  config = step.make_config(
    method='cmd', batch_size=8, num_prototypes=1024, overrides=_SMALL
  )
  built = step.make_step(config, sharding.make_mesh(8), mode='pmap')
  program = hlo.read_program(built.lower().compile().as_text())
  counted = sum(count_flops(config).values())
  # Crops, the attention over patches and the losses' own come on top: what the
  # teacher expects of the prototypes, and its share of their gradient.
  assert counted <= hlo.work(program).dot_flops <= 1.4 * counted
  traffic = scaling.read_traffic(
    read_collectives(program), built.state_like.params, per_device=1
  )
  assert traffic.exchange_bytes == 0
  # Centres and metrics beside the gradients.
  rest = traffic.sum_bytes - traffic.gradient_bytes
  assert 2 * 4 * 1024 <= rest <= 2 * 4 * 1024 + 4 * 400
  assert traffic.block_bytes * config.model.depth < traffic.encoder_bytes


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('model.colour=2', "no field 'model.colour'"),
    ('modle.depth=2', "no field 'modle.depth'"),
    ('model.depth=deep', 'model.depth is 0'),
    ('model.depth=1.5', 'model.depth is 0'),
  ],
)
def test_a_wrong_override_is_explained(override, message):
  with pytest.raises(UserError, match=message):
    step.make_config(
      method='cmd', batch_size=8, num_prototypes=8, overrides=[override]
    )


def test_the_roofline_takes_the_lower_roof():
  common = dict(seconds=2.0, matmul_ceiling=100e9, bandwidth_ceiling=10e9)
  low = ceilings.roofline(flops=100e9, num_bytes=20e9, **common)
  assert low['attainable_gflops'] == pytest.approx(50)
  assert low['share_of_attainable'] == pytest.approx(1)
  high = ceilings.roofline(flops=100e9, num_bytes=1e9, **common)
  assert high['attainable_gflops'] == pytest.approx(100)
  assert high['share_of_attainable'] == pytest.approx(0.5)


def _chip(name):
  return next(x for x in interconnects.CHIPS if x.name == name)


def test_bandwidths_of_slices():
  (full,) = interconnects.levels(_chip('TPU v5e'), 256)
  # 400 GB/s both ways of four ports, two directions of two closed rings.
  assert full.bytes_per_second == 200e9
  (lines,) = interconnects.levels(_chip('TPU v5e'), 32)
  assert lines.bytes_per_second == 100e9
  pod, network = interconnects.levels(_chip('TPU v5e'), 1024)
  assert (pod.size, network.size) == (256, 4)
  assert network.bytes_per_second == pytest.approx(3.125e9)
  (cube,) = interconnects.levels(_chip('TPU v4'), 128)
  assert cube.bytes_per_second == 270e9
  (mesh,) = interconnects.levels(_chip('TPU v4'), 32)
  assert mesh.bytes_per_second == 135e9
  for chip in interconnects.CHIPS:
    for size in interconnects.SIZES:
      found = interconnects.levels(chip, size)
      assert math.prod(level.size for level in found) == size


def test_an_all_reduce_over_two_levels():
  inner = interconnects.Level(8, 100.0, 3, 0.25)
  outer = interconnects.Level(4, 10.0, 2, 0.5)
  one = interconnects.all_reduce_seconds(800.0, [inner])
  assert one == pytest.approx(2 * 7 / 8 * 800 / 100 + 3 * 0.25)
  # An eighth of the bytes is left to each.
  both = interconnects.all_reduce_seconds(800.0, [inner, outer], count=2)
  passed = 2 * 7 / 8 * 800 / 100 + 2 * 3 / 4 * 100 / 10
  assert both == pytest.approx(passed + 2 * (3 * 0.25 + 2 * 0.5))


def test_predictions_wait_for_what_is_not_hidden():
  config = step.make_config(method='cmd', batch_size=8, num_prototypes=65536)
  traffic = scaling.Traffic(3e8, 0.0, 2, 0.0, 0, 2.6e8, 0.9e8, 7e6)
  chip = _chip('TPU v5p')

  def predict(traffic, per_chip=64):
    return scaling.predict(traffic, config, chip, 256, per_chip=per_chip)

  found = predict(traffic)
  assert found.efficiency(False) < found.efficiency(True) < 1
  assert predict(traffic, 1).efficiency(True) < found.efficiency(True)
  # An exchange grows with the batch and cannot be hidden.
  wide = predict(traffic._replace(exchange_bytes=1e8))
  assert wide.exposed - found.exposed == pytest.approx(wide.exchange)
  assert wide.exchange == pytest.approx(64 * 1e8 / 600e9)
  assert scaling.backward_flops(config) < sum(count_flops(config).values())


def test_tables_turn_when_they_are_wide():
  narrow = record.table([{'a': 'x', 'b': 1234.5, 'c': [1]}, {'a': 'y'}])
  assert narrow.splitlines() == [
    '| a | b     |',
    '| - | ----- |',
    '| x | 1,234 |',
    '| y |       |',
  ]
  wide = record.table([{f'n{i}': float(i) for i in range(9)}] * 2)
  assert wide.splitlines()[0] == '| n0 | 0 | 0 |'
  assert len(wide.splitlines()) == 10


def test_records_are_added_and_nothing_is_lost(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(
    'sys.argv', ['x', '--results=/secret/place', '--photographs=/my/birds/']
  )
  parser = record.make_parser('Some benchmark.')
  run = record.begin('some', parser, [f'--results={tmp_path}'])
  record.finish(run, [{'what': 'this', 'rate': 2.0}], note='first')
  record.finish(run, [{'what': 'that', 'rate': 3.0}])
  first, second = json.loads((tmp_path / 'some.json').read_text())
  assert (first['note'], second['rows'][0]['rate']) == ('first', 3.0)
  assert first['command'] == 'python -m benchmarks.some --photographs=birds'
  assert set(record.PACKAGES) < set(first['versions'])
  assert first['machine']['devices'] == '8 x cpu'
  assert len(first['load_average']) == 2
  assert '| this | 2    |' in capsys.readouterr().out
  (tmp_path / 'some.json').write_text('{"half": ')
  with pytest.raises(UserError, match='is not JSON'):
    record.finish(run, [])
  assert (tmp_path / 'some.json').read_text() == '{"half": '


def test_results_kept_are_records():
  files = sorted(record.RESULTS.glob('*.json'))
  assert files
  for file in files:
    for kept in record.read(file):
      assert {'date', 'command', 'machine', 'versions', 'rows'} <= set(kept)
      assert record.table(kept['rows'])


def test_the_list_names_every_benchmark(capsys):
  found = listing.list_benchmarks()
  assert {'train_step', 'augmentation', 'input', 'kmeans'} < set(found)
  assert {'evaluators', 'scaling', 'gpu'} < set(found)
  assert all(line.endswith('.') for line in found.values())
  listing.main()
  assert 'python -m benchmarks.NAME' in capsys.readouterr().out


def test_without_a_gpu_the_gpu_benchmark_says_so(monkeypatch):
  monkeypatch.setattr(gpu, 'ASK', "print('cpu cpu')")
  with pytest.raises(UserError, match='no GPU but cpu'):
    gpu.find_gpu()


def test_a_job_that_fails_is_a_row(tmp_path):
  (row,) = gpu.run_job('train_step', ['--batch_size=x'], tmp_path, 60)
  assert 'invalid int value' in row['failed']
