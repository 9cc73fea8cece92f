"""Several processes train as one does, stop together and resume as others."""

import signal

import numpy as np
import pytest

from .launcher import read_metrics, read_results, wait_for_step

# Sums in another order drift apart step by step, gradients first.
_RELATIVE = {'loss': 1e-5, 'teacher_entropy': 1e-5, 'grad_norm': 3e-4}


def _assert_same_losses(workdir, other, *, compared=12):
  found, expected = (
    {line['step']: line for line in read_metrics(x)} for x in (workdir, other)
  )
  assert list(found) == list(expected) == list(range(1, 13))
  for step in range(1, compared + 1):
    line = expected[step]
    for name, relative in _RELATIVE.items():
      # The entropy of a sharp teacher is near 0, its error is not relative.
      np.testing.assert_allclose(
        found[step][name],
        line[name],
        rtol=relative,
        atol=5e-6,
        err_msg=f'{name}, {step}',
      )


def _masks(workdir, name):
  (path,) = (workdir / 'parts' / name).glob('masks-*.npz')
  with np.load(path) as file:
    return file['masks']


def _assert_same_scores(workdir, other):
  found, expected = read_results(workdir), read_results(other)
  assert found['init'] == expected['init']
  assert found['data_sha256'] == expected['data_sha256']
  assert found['steps'] == expected['steps']
  for name, value in expected['final'].items():
    # One image more or less: the features differ in the last digit.
    assert found['final'][name] == pytest.approx(value, abs=1 / 48), name


def test_two_stop_together_and_one_goes_on_as_if_it_had_been_alone(
  launcher, alone, tmp_path
):
  workdir = tmp_path / 'run'
  processes = launcher.start(
    workdir, '--config.placement=stream', count=2, num_devices=2
  )
  wait_for_step(workdir, 3, processes)
  # One of them alone, and not the one that writes.
  processes[1].send_signal(signal.SIGTERM)
  ended = launcher.finish(processes)
  assert [code for code, *_ in ended] == [128 + signal.SIGTERM] * 2, ended
  (_, output, messages), (_, other_output, other_messages) = ended
  stopped = read_metrics(workdir)[-1]['step']
  assert 3 <= stopped < 12
  assert f'stopped by SIGTERM after step {stopped};' in messages
  assert 'knn' not in other_output
  # The first one alone announces and reports.
  assert 'loss' in messages
  assert 'loss' not in other_messages
  assert '4 x cpu' in messages

  messages = launcher.run_here(workdir)
  assert f'resumed after step {stopped}\n' in messages
  _assert_same_losses(workdir, alone)
  _assert_same_scores(workdir, alone)


@pytest.mark.slow
def test_one_stops_and_two_go_on_then_four(launcher, alone, tmp_path):
  workdir, stopped = tmp_path / 'run', 0
  for count in (1, 2):
    processes = launcher.start(workdir, count=count)
    wait_for_step(workdir, stopped + 1, processes)
    processes[0].send_signal(signal.SIGINT)
    for code, _, messages in launcher.finish(processes):
      assert code == 128 + signal.SIGINT, messages
    stopped = read_metrics(workdir)[-1]['step']
  outputs = launcher.run(workdir, count=4)
  assert 'resumed after step' in outputs[0][1]
  assert not any('knn' in output for output, _ in outputs[1:])
  _assert_same_losses(workdir, alone)
  _assert_same_scores(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
  'arguments',
  [
    ('--config=configs/toybirds.py:method=cmd,quicktest',),
    ('--config=configs/toybirds.py:method=esvit,encoder=swin,quicktest',),
    ('--config.parallel.state=fsdp',),
    (
      '--config.parallel.grad_accum_steps=2',
      '--config.teacher.normalisation=centring',
      '--config.head.use_bn=False',
    ),
  ],
)
def test_four_train_as_one(launcher, tmp_path, arguments):
  workdir, other = tmp_path / 'four', tmp_path / 'one'
  launcher.run(workdir, *arguments, count=4)
  launcher.run(other, *arguments)
  _assert_same_losses(workdir, other)
  _assert_same_scores(workdir, other)


def _kappa(one, other):
  """Cohen's kappa of two masks: 1 if they agree, 0 if only by chance."""
  agreement = (one == other).mean()
  p, q = one.mean(), other.mean()
  by_chance = p * q + (1 - p) * (1 - q)
  return (agreement - by_chance) / (1 - by_chance)


@pytest.mark.slow
def test_two_find_parts_as_one(launcher, tmp_path):
  arguments = (
    '--config=configs/particle_toybirds.py:quicktest',
    '--config.parts.view_px=32',
    '--config.parts.rounds=2',
  )
  workdir, other = tmp_path / 'two', tmp_path / 'one'
  launcher.run(workdir, *arguments, count=2)
  launcher.run(other, *arguments)
  _assert_same_losses(workdir, other, compared=6)
  for name in ('round_1', 'round_2'):
    assert (workdir / 'parts' / f'{name}.png').exists()
  first, second = (
    [_masks(x, name) for x in (workdir, other)]
    for name in ('round_1', 'round_2')
  )
  np.testing.assert_array_equal(*first)
  # Features that differ in the last digit may lead k-means elsewhere, and with
  # it the vote on what is foreground: much more alike than by chance (0), but
  # not the same.
  foreground, of_one = (masks > 0 for masks in second)
  assert 0.2 < of_one.mean() < 0.95
  assert _kappa(foreground, of_one) > 0.5
