import json

import jax
import pytest

from cmd_jax.report import meaning
from cmd_jax.rundir.workdir import Workdir
from tests import tiny


@pytest.mark.parametrize('method', ['cmd', 'dino', 'simclr'])
def test_every_curve_of_a_method_has_a_meaning(method):
  step, state = tiny.make_step(method)
  _, metrics = jax.eval_shape(step, state, tiny.make_batch(), jax.random.key(0))
  about = meaning.describe_curves(metrics, num_prototypes=12, term_warmup=0)
  terms = {name for name in metrics if name.startswith('loss/')}
  assert about.keys() == metrics.keys() - terms
  assert 'Healthy' in about['feature_spread']


def test_ranges_follow_the_prototypes_and_the_warm_up_is_told():
  names = ('loss', 'teacher_entropy', 'nobody knows')
  about = meaning.describe_curves(names, num_prototypes=1000, term_warmup=0)
  assert about.keys() == {'loss', 'teacher_entropy'}
  assert 'between 2.1 and 6.8' in about['teacher_entropy']
  assert 'term_warmup' not in about['loss']
  about = meaning.describe_curves(names, num_prototypes=1000, term_warmup=1200)
  assert 'The loss may rise over the first 1,200 steps' in about['loss']


def test_a_run_is_judged_by_its_warnings_and_its_steps(tmp_path):
  workdir = Workdir(str(tmp_path))
  [good] = meaning.judge(workdir, {})
  assert good['kind'] == 'right' and 'No sign of collapse' in good['text']
  steps = [{'step': 7}, {'step': 1200}]
  workdir.non_finite_file.write_text(json.dumps({'steps': steps}))
  warnings = [{'kind': 'uniform', 'step': 9, 'text': 'all alike'}]
  found = meaning.judge(workdir, {'warnings': warnings})
  assert [x['kind'] for x in found] == ['wrong', 'wrong']
  assert found[0]['text'] == 'Collapse: all alike.'
  assert '2 step(s) (7, 1,200)' in found[1]['text']
  workdir.non_finite_file.write_text('{"steps"')
  assert meaning.judge(workdir, {})[0]['kind'] == 'right'
