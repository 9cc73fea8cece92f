"""Does training teach the encoder anything? Minutes, therefore slow."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

_REPO = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_half_of_the_demo_teaches_the_species(tmp_path):
  environment = {
    key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'
  }
  subprocess.run(
    [
      sys.executable,
      'main.py',
      '--config=configs/toybirds.py',
      f'--workdir={tmp_path}/run',
      '--config.dataset.test_split=validation',
      '--config.total_epochs=10',
    ],
    cwd=_REPO,
    env=environment | {'TFDS_DATA_DIR': str(tmp_path / 'tfds')},
    check=True,
  )
  results = json.loads((tmp_path / 'run' / 'results.json').read_text())
  # After 12 epochs 25 points and more were seen; chance fluctuates by 2.
  for metric in ('knn/20/top1', 'retrieval/test-vs-train/rank1'):
    assert results['final'][metric] - results['init'][metric] > 0.07
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  last = json.loads(lines[-1])
  assert last['feature_spread'] > 0.1
  assert 1 < last['teacher_entropy'] < 6.2
