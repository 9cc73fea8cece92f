import contextlib
import json

import jax
import pytest

from cmd_jax.cli import program
from cmd_jax.compile_ahead import compiled, estimate, report, run, targets
from cmd_jax.config import builtin
from cmd_jax.devices.chips import Chip
from cmd_jax.errors import UserError

_WORDS = '--config=toybirds:quicktest,method=dino'


def _use_devices_here(monkeypatch, memory=2**34):
  chip = Chip('here', memory, 1e12, 1e11)
  target = targets.Target('v5e:2x2', tuple(jax.devices()[:2]), chip, {})
  monkeypatch.setattr(targets, 'find_target', lambda *args: target)


@pytest.fixture(scope='module')
def facts(tmp_path_factory):
  """A step compiled for two devices of this machine, as by the program."""
  folder = tmp_path_factory.mktemp('ahead')
  with pytest.MonkeyPatch.context() as monkeypatch:
    _use_devices_here(monkeypatch)
    status = program.run(
      [
        'compile',
        _WORDS,
        '--topology=v5e:2x2',
        '--num_images=100',
        f'--output={folder}/facts.json',
        f'--compilation_cache={folder}',
      ]
    )
  assert status == 0
  (kept,) = (folder / 'ahead').iterdir()
  return json.loads((folder / 'facts.json').read_text()) | {'kept': kept}


def test_facts_of_a_step(facts):
  config = builtin.toybirds('quicktest,method=dino')
  assert facts['batch_size'] == config.batch_size
  assert facts['images_per_device'] * 2 == config.batch_size
  memory = facts['memory_bytes']
  assert facts['fits']
  assert memory['arguments'] + memory['temporaries'] < memory['program'] * 1.01
  assert memory['images'] == 100 * config.canvas_px**2 * 3
  sums = facts['collectives']['all-reduce']
  assert sums['times'] >= 1
  assert sums['bytes'] > 4 * config.head.num_prototypes
  assert facts['time'] is None
  text = report.as_text(facts)
  assert 'of 16.00 GiB: fits' in text and 'this compiler makes none' in text


def test_what_is_kept_is_read_and_every_part_is_in_it(facts, monkeypatch):
  place = facts['kept']
  monkeypatch.setattr(compiled, '_place', lambda *args: place)
  monkeypatch.delattr(compiled, '_compile')
  found = compiled.compile_for(None, None, 'cache')
  assert found.arguments == facts['memory_bytes']['arguments']
  for part in estimate.PARTS:
    assert f'{part}/' in found.text or f'({part})' in found.text, part


def test_what_is_kept_is_that_of_any_caller(monkeypatch):
  def double(x):
    with jax.named_scope('encoder'):
      return x * 2

  def lower():
    return jax.jit(double).lower(1.0)

  def another_caller():
    return lower()

  target = targets.Target('v5e:2x2', tuple(jax.devices()[:1]), None, {})
  one = compiled._place(lower(), target, 'cache')
  assert compiled._place(another_caller(), target, 'cache') == one
  other = target._replace(compiler_options={'xla_any': True})
  assert compiled._place(lower(), other, 'cache') != one
  monkeypatch.setattr(jax, 'named_scope', contextlib.nullcontext)
  jax.clear_caches()
  assert compiled._place(lower(), target, 'cache') != one


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--topology=v5e:2x5', r'--topology=v5e:2x5 is not known'),
    ('--find_batch', r'--topology is missing: choose v5e:'),
  ],
)
def test_mistakes_are_one_line(argument, message, capsys):
  assert program.run(['compile', _WORDS, argument]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line


def _compiler(monkeypatch, needs, **changes):
  """A request whose compiler needs so many bytes for a batch."""
  _use_devices_here(monkeypatch, memory=1000)
  config = builtin.toybirds('quicktest').unlock()
  config.update(changes)

  def answer(self, batch_size):
    needed = needs(batch_size)
    return compiled.Compiled(0, 0, 'text' if needed <= 1000 else '', needed)

  monkeypatch.setattr(run._Compiler, 'compile', answer)
  monkeypatch.setattr(
    report, 'gather', lambda config, *args: {'batch': config.batch_size}
  )
  monkeypatch.setattr(report, 'as_text', str)
  return config


def test_a_batch_that_does_not_fit_is_told_what_would(monkeypatch):
  config = _compiler(monkeypatch, lambda size: 300 * size, batch_size=8)
  with pytest.raises(UserError) as raised:
    run.compile_ahead(run.Request(config, 'v5e:2x2'))
  message = str(raised.value)
  for what in (
    'config.batch_size=8 does not fit',
    '--config.model.remat=full',
    '--config.parallel.state=fsdp',
    '--config.parallel.grad_accum_steps=2',
    '--config.batch_size=4, or --find_batch',
  ):
    assert what in message


def test_the_largest_batch_is_found(monkeypatch, capsys):
  config = _compiler(monkeypatch, lambda size: 100 + 70 * size, batch_size=32)
  request = run.Request(config, 'v5e:2x2', find_batch=True)
  assert "'batch': 12" in run.compile_ahead(request)
  assert 'largest batch that fits: 12\n' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('message', 'gib'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
      'for HLO temporaries (37.25G) exceeds available HBM (15.75G).',
      37.25,
    ),
    ('Ran out of memory in hbm. Used 20.50G of 15.75G hbm. Exceeded', 20.5),
    ('Ran out of memory', None),
  ],
)
def test_what_was_needed_is_read(message, gib):
  assert compiled.bytes_needed(message) == (gib and gib * 2**30)
