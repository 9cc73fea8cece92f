"""Stands in for main.py: reads its command line, trains nothing."""

import json
import os
import pathlib
import signal
import sys
import time

sys.path.insert(0, os.getcwd())

from absl import flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file('config')
_WORKDIR = flags.DEFINE_string('workdir', None, '')


def main():
  flags.FLAGS(sys.argv)
  config, folder = _CONFIG.value.to_dict(), pathlib.Path(_WORKDIR.value)
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / 'starts', 'a') as file:
    cores = sorted(os.sched_getaffinity(0))
    file.write(' '.join(map(str, cores)) + '\n')
  (folder / 'config.json').write_text(json.dumps(config))
  name = folder.parent.name
  if name == os.environ.get('FAKE_WAITS'):

    def stop(*_):
      (folder / 'stopped').touch()
      sys.exit(143)

    signal.signal(signal.SIGTERM, stop)
    print('step 1\rstep 2', end='', file=sys.stderr, flush=True)
    (folder / 'waits').touch()
    time.sleep(60)
  if name == os.environ.get('FAKE_FAILS'):
    print('step 1\rstep 2\nerror: no\x1b luck', file=sys.stderr)
    sys.exit(2)
  scores = {
    'knn/20/top1': 0.5,
    'linear/logreg/top1': 0.6 + 0.01 * config['seed'],
    'retrieval/test-vs-train/rank1': 0.4,
  }
  results = {
    'init': dict.fromkeys(scores, 0.1),
    'final': scores,
    'steps': 10,
    'seconds': 1.5,
    'hardware': 'none',
    'versions': {'jax': '0'},
  }
  report = {'splits': {'test': {'used': 960}}}
  (folder / 'data_report.json').write_text(json.dumps(report))
  (folder / 'results.json').write_text(json.dumps(results))


if __name__ == '__main__':
  main()
