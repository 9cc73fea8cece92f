"""What is read from programs for pods, and the page made of it."""

import argparse
import json
import os

import jax
import pytest

from benchmarks import interconnects, pods, pods_page, record
from cmd_jax.compile_ahead import targets
from cmd_jax.compile_ahead.compiled import Compiled
from cmd_jax.devices.chips import Chip
from cmd_jax.errors import UserError

_V5E = next(x for x in interconnects.CHIPS if x.name == 'TPU v5e')
_TINY = pods.Program(
  'v5e:2x2', 'Mu', 'fsdp', 'none', 1, 64, words='quicktest,method=dino'
)


def _target(memory=2**34):
  chip = Chip('v5e', memory, 1e12, 1e11)
  return targets.Target('v5e:2x2', tuple(jax.devices()[:4]), chip, {})


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  """A tiny step compiled for four devices of this machine."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(targets, 'find_target', lambda *args: _target())
    return pods.compile_program(_TINY, str(tmp_path_factory.mktemp('cache')))


def _record(found, program=_TINY):
  return {
    'commit': 'abc',
    'compiler': '1.2',
    'versions': {'jax': jax.__version__},
    'program': program._asdict(),
    'found': json.loads(json.dumps(found)),
  }


def test_a_step_is_compiled_and_what_it_sends_is_weighed(found):
  assert found['outcome'] == 'fits'
  assert found['batch_size'] == found['num_devices'] == 4
  assert found['needed_bytes'] < 2**30
  kinds = {x['kind']: x for x in found['collectives']}
  assert kinds['all-reduce']['bytes'] > 0
  for kind in kinds.values():
    assert 0 < kind['seconds_exposed'] <= kind['seconds']
    assert kind['overlapped'] <= kind['times']
  assert len(found['largest']) <= 12
  assert found['time'] is None


def test_tables_of_what_was_and_was_not_compiled(found, monkeypatch):
  monkeypatch.setattr(pods_page, 'hand_tables', lambda records: {})
  time = {
    'seconds': 0.09,
    'seconds_by_part': {'encoder': 0.05, 'loss': 0.01},
    'kernels': {'count': 2, 'seconds': 0.03},
  }
  sent = [
    {
      'kind': 'all-reduce',
      'times': 2.0,
      'bytes': 3e8,
      'overlapped': 1.0,
      'overlapped_bytes': 2e8,
      'seconds': 0.02,
      'seconds_exposed': 0.01,
    }
  ]
  known = _record(found | {'time': time, 'collectives': sent})
  failed = _record(
    {'outcome': 'not compiled', 'why': 'given up after 5 s'},
    _TINY._replace(overlap=True),
  )
  large = _record({'outcome': 'does not fit', 'needed_bytes': 2**35})
  tables = pods_page.make_tables([known, failed, large])
  name = 'Mu, FSDP, v5e:2x2'
  memory = tables['memory'].splitlines()
  assert len(memory) == 5 and memory[2].startswith(f'| {name} ')
  assert 'sums overlapped' in memory[3]
  assert 'not compiled: given up after 5 s' in memory[3]
  assert '| 32 ' in memory[4] and 'does not fit' in memory[4]
  (row,) = pods_page.step_rows([known, failed, large])
  assert row['efficiency, %'] == '90.0'
  assert row['if all were waited for'] == '81.8'
  assert row['images/s'] == pytest.approx(4 / 0.1)
  assert '| all-reduce | 2     | 300' in tables['collectives']
  assert 'commit abc' in tables['origin']


def test_a_page_can_be_made_when_nothing_was_compiled():
  tables = pods_page.make_tables([_record({'outcome': 'not compiled'})])
  assert tables['step'] == 'No such program was compiled.'
  assert tables['limits of other chips'] == tables['step']


def test_what_was_not_tried_is_said_and_is_no_record(tmp_path, monkeypatch):
  page = tmp_path / 'page.md'
  arguments = [
    f'--results={tmp_path}',
    '--topologies=v5e:2x2',
    '--variants=S',
    '--states=fsdp',
    '--no-compile',
    f'--output={page}',
  ]
  monkeypatch.setattr('sys.argv', ['pods', *arguments])
  pods.main()
  assert '| not compiled: not tried |' in page.read_text()
  assert not (tmp_path / 'pods.json').exists()
  monkeypatch.setattr('sys.argv', ['pods', '--topologies=h100'])
  with pytest.raises(UserError, match='is of no TPU: choose one of v5e'):
    pods.main()


def test_other_chips_are_given_the_bytes_of_the_largest_plain_program():
  def kept(num_bytes, **changes):
    program = _TINY._replace(variant='S', state='replicated', **changes)
    sent = {'kind': 'all-reduce', 'times': 1.0, 'bytes': num_bytes}
    return _record({'memory_bytes': {}, 'collectives': [sent]}, program)

  tables = pods_page.hand_tables(
    [
      kept(1.0),
      kept(3e8, topology='v5e:2x4'),
      kept(1.0, topology='v5e:2x4', overlap=True),
    ]
  )
  v5e = next(
    x.split('|')
    for x in tables['limits of other chips'].splitlines()
    if x.startswith('| TPU v5e')
  )
  # Twice 255 of 256 parts over 200 GB/s, and 32 hops.
  assert float(v5e[3]) == pytest.approx(2 * 255 / 256 * 1.5 + 0.032, rel=0.01)
  assert float(v5e[-2]) == 0
  efficiency = tables['efficiency of other chips']
  assert efficiency.startswith('ViT-S/16, 1 images a chip:')
  assert '1024 chips' in efficiency
  assert 'at 20% of peak' in tables['efficiency by utilisation']


def test_bytes_take_as_long_as_the_links_need():
  seconds = interconnects.collective_seconds
  full = (16, 16)
  # Two closed rings: four links of 50 GB/s; twice 255 of 256 parts.
  reduced = seconds('all-reduce', 1e9, 256, _V5E, full)
  assert reduced == pytest.approx(2 * 255 / 256 / 200 + 32e-6)
  gathered = seconds('all-gather', 1e9, None, _V5E, full)
  assert gathered == seconds('reduce-scatter', 1e9, 256, _V5E, full)
  assert gathered == pytest.approx(reduced / 2)
  # A group of 16 is a ring of one axis.
  ring = seconds('all-reduce', 1e9, 16, _V5E, full)
  assert ring == pytest.approx(2 * 15 / 16 / 100 + 16e-6)
  passed = seconds('collective-permute', 1e9, None, _V5E, full)
  assert passed == pytest.approx(1 / 50 + 1e-6)
  assert seconds('all-to-all', 1e9, None, _V5E, full) > 1 / 200
  # 6.4 Tb/s between pods, shared by 256 chips.
  assert seconds('send', 1e6, None, _V5E, full) == pytest.approx(330e-6)


def test_what_is_computed_meanwhile_hides_what_is_sent():
  def sent(between):
    return {
      'kind': 'all-reduce',
      'bytes': 1e9,
      'times': 2.0,
      'group': 256,
      'seconds_between': between,
    }

  alone = interconnects.collective_seconds(
    'all-reduce', 1e9, 256, _V5E, (16, 16)
  )
  (found,) = pods.add_waiting(
    [sent(None), sent(0.25 * alone), sent(2 * alone)], _V5E, (16, 16)
  )
  assert (found['times'], found['overlapped']) == (6, 4)
  assert found['seconds'] == pytest.approx(6 * alone)
  assert found['seconds_exposed'] == pytest.approx(2 * (1 + 0.75) * alone)


def test_a_step_that_does_not_fit_is_no_mistake():
  found = pods.gather(_TINY, _target(), Compiled(0, 0, '', 2**35))
  assert found == {'outcome': 'does not fit', 'needed_bytes': 2**35}


def test_what_has_a_record_is_not_compiled_again(monkeypatch):
  monkeypatch.setattr(pods, 'compiler_version', lambda: '1.2')
  known = _record({'outcome': 'fits'})
  failed = _record({'outcome': 'not compiled', 'why': 'killed'})
  assert pods.find_record([known, failed], _TINY) is known
  assert pods.find_record([failed], _TINY) is None
  assert pods.find_record([known], _TINY._replace(state='auto')) is None
  assert pods.find_record([known | {'compiler': '1.1'}], _TINY) is None
  # Without the compiler what it said can still be put on the page.
  monkeypatch.setattr(pods, 'compiler_version', lambda: '')
  assert pods.find_record([known], _TINY) is known


def test_the_plan_has_every_combination_and_overlaps_the_last_sums():
  options = argparse.Namespace(
    topologies='v5e:2x4,v5e:16x16',
    variants='S,L',
    states='replicated,fsdp',
    slices='1',
    overlap=True,
    per_chip=32,
    num_prototypes=65536,
  )
  plan = pods.plan(options)
  assert len(set(plan)) == len(plan) == 10
  assert [str(x) for x in plan[-2:]] == [
    'ViT-S, replicated, sums overlapped, v5e:16x16',
    'ViT-L, replicated, sums overlapped, v5e:16x16',
  ]
  assert {x.remat for x in plan if x.variant == 'L'} == {'full'}
  config = pods.make_config(plan[-1])
  assert config.batch_size == 32 * 256
  assert config.model.remat == 'full'


def _end_at_once(connection, program, cache):
  os._exit(3)


def _say_nothing(connection, program, cache):
  connection.poll(60)


def _say(connection, program, cache):
  connection.send({'outcome': program.topology, 'cache': cache})


@pytest.mark.parametrize(
  ('target', 'limit_s', 'said'),
  [
    (_end_at_once, 60, 'its process ended with exit code 3'),
    (_say_nothing, 0.01, 'given up after 0 s'),
    (_say, 60, None),
  ],
)
def test_a_compiler_that_ends_or_hangs_is_told(target, limit_s, said):
  found = pods.compile_apart(_TINY, 'kept', limit_s, target)
  if said:
    assert found == {'outcome': 'not compiled', 'why': said}
  else:
    assert found == {'outcome': 'v5e:2x2', 'cache': 'kept'}


def test_tables_are_put_in_their_places_and_the_text_stays(tmp_path):
  page = tmp_path / 'page.md'
  pods_page.write_page(page, {'memory': '| a |'})
  assert '## Memory\n<!-- made by benchmarks.pods: memory -->' in (
    page.read_text()
  )
  page.write_text(page.read_text() + '\nText \\1 below.\n')
  pods_page.write_page(page, {'memory': '| b\\1 |'})
  text = page.read_text()
  assert '| b\\1 |' in text and '| a |' not in text
  assert text.endswith('\nText \\1 below.\n')
  page.write_text(text.replace('<!-- end of memory -->', ''))
  with pytest.raises(UserError, match='add it below'):
    pods_page.write_page(page, {'memory': ''})


def test_the_page_has_a_place_for_every_table():
  text = (record.REPOSITORY / 'docs' / 'scaling_on_paper.md').read_text()
  for name in (
    'origin',
    'memory',
    'time by part',
    'collectives',
    'step',
    'efficiency of other chips',
    'limits of other chips',
    'efficiency by utilisation',
  ):
    assert f'<!-- made by benchmarks.pods: {name} -->' in text
    assert f'<!-- end of {name} -->' in text
