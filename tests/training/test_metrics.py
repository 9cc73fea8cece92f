import json
import struct

import pytest
from tensorboardX.proto import event_pb2

from cmd_jax.training import metrics


def _line(step):
  return json.dumps({'step': step, 'loss': step / 4}) + '\n'


@pytest.mark.parametrize(
  'tail', ['{"step": 5, "lo', '5', '{"loss": 1}', '\x00\x00', '\n', '']
)
def test_lines_after_the_step_and_cut_lines_are_dropped(tmp_path, tail):
  file = tmp_path / 'metrics.jsonl'
  file.write_text(''.join(map(_line, (1, 2, 3, 4))) + tail)
  metrics.drop_lines_after(file, 3)
  assert file.read_text() == ''.join(map(_line, (1, 2, 3)))


def test_a_line_that_a_crash_left_without_text_is_dropped(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  file.write_bytes(_line(1).encode() + b'\xff\xfe{"step"')
  metrics.drop_lines_after(file, 3)
  assert file.read_text() == _line(1)


def test_dropping_from_no_file_makes_none(tmp_path):
  metrics.drop_lines_after(tmp_path / 'metrics.jsonl', 3)
  assert not list(tmp_path.iterdir())


def _records(file):
  """Payloads of a TFRecord file: length, its CRC, payload, its CRC."""
  data = file.read_bytes()
  start = 0
  while start < len(data):
    (length,) = struct.unpack_from('<Q', data, start)
    yield data[start + 12 : start + 12 + length]
    start += 12 + length + 4


def _scalars(directory):
  """[(step, name, value)] of all event files, purged steps left out."""
  found = []
  for file in sorted(directory.glob('events.*')):
    for record in _records(file):
      event = event_pb2.Event.FromString(record)
      if event.session_log.status == event_pb2.SessionLog.START:
        found = [scalar for scalar in found if scalar[0] < event.step]
      found += [
        (event.step, value.tag, value.simple_value)
        for value in event.summary.value
      ]
  return found


def _write(tmp_path, *, after, steps):
  writer = metrics.MetricWriter(
    tmp_path / 'metrics.jsonl', tmp_path / 'tensorboard', step=after
  )
  for step in steps:
    writer.write(step, {'loss': step / 4, 'loss/image': float(after)})
  writer.close()


def test_scalars_reach_both_files(tmp_path):
  _write(tmp_path, after=0, steps=(1, 2))
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {'step': 1, 'loss': 0.25, 'loss/image': 0.0},
    {'step': 2, 'loss': 0.5, 'loss/image': 0.0},
  ]
  assert _scalars(tmp_path / 'tensorboard') == [
    (1, 'loss', 0.25),
    (1, 'loss/image', 0.0),
    (2, 'loss', 0.5),
    (2, 'loss/image', 0.0),
  ]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
  writer = metrics.MetricWriter(
    tmp_path / 'metrics.jsonl', tmp_path / 'tensorboard', step=0
  )
  writer.write(1, {'loss': 0.25})
  assert (tmp_path / 'metrics.jsonl').read_text() == _line(1)
  writer.close()


def test_a_resumed_run_logs_every_step_once(tmp_path, monkeypatch):
  _write(tmp_path, after=0, steps=(1, 2, 3, 4))
  # Event files are named by the second and the resumed run's must come last.
  import time

  now = time.time()
  monkeypatch.setattr(time, 'time', lambda: now + 60)
  _write(tmp_path, after=2, steps=(3, 4, 5))
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  seen = [(x['step'], x['loss/image']) for x in map(json.loads, lines)]
  assert seen == [(1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0), (5, 2.0)]
  events = _scalars(tmp_path / 'tensorboard')
  assert [(s, v) for s, name, v in events if name == 'loss/image'] == seen


def test_progress_measures_without_the_compiling_step(monkeypatch, capsys):
  clock = iter([0.0, 100.0, 102.0, 104.0])
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: next(clock))
  progress = metrics.Progress(step=0, total_steps=3, batch_size=8)
  assert progress.images_per_second() is None
  progress.update(1.0)
  assert progress.images_per_second() is None
  progress.update(1.0)
  assert progress.images_per_second() == pytest.approx(8 / 2)
  progress.update(1.0)
  assert progress.images_per_second() == pytest.approx(16 / 4)
  progress.note('a line')
  progress.close()
  assert 'a line' in capsys.readouterr().err
