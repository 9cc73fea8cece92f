"""The summary of a curated folder on a run's page."""

import pytest

from cmd_jax.cli import program
from cmd_jax.errors import UserError
from cmd_jax.report.curated import read_curated
from cmd_jax.rundir.workdir import Workdir
from tests import scored_runs

_TABLE = """\
file,class_name,duplicate_of,same_photograph_called,is_outlier,suggested_class,suspicion,select_rank
a/0.png,a,,,0,,,1
a/1.png,a,a/0.png,,0,,,
a/2.png,a,,,1,b,0.25,2
b/0.png,b,,,0,a,0.75,
b/1.png,b,a/0.png,a,0,,,
"""


@pytest.fixture
def workdir(tmp_path):
  (tmp_path / 'curated').mkdir()
  (tmp_path / 'curated' / 'curate.csv').write_text(_TABLE)
  return Workdir(str(tmp_path))


def test_findings_are_counted_and_the_surest_come_first(workdir):
  found = read_curated(workdir)
  assert found['counts'] == {
    'images': 5,
    'duplicates': 2,
    'outliers': 1,
    'suspicious labels': 3,
    'to label first': 2,
  }
  assert found['suspects'] == [
    {'file': 'b/1.png', 'given': 'b', 'suggested': 'a'},
    {'file': 'b/0.png', 'given': 'b', 'suggested': 'a'},
    {'file': 'a/2.png', 'given': 'a', 'suggested': 'b'},
  ]


def test_a_run_that_was_not_curated_has_none(tmp_path):
  assert read_curated(Workdir(str(tmp_path))) is None


@pytest.mark.parametrize('text', ['junk,\n1,2\n', _TABLE.replace('0.75', 'x')])
def test_another_table_is_refused_in_one_line(workdir, text):
  (workdir.path / 'curated' / 'curate.csv').write_text(text)
  with pytest.raises(UserError, match=r'curate\.csv cannot be read') as caught:
    read_curated(workdir)
  assert '\n' not in str(caught.value)


def test_a_run_of_no_folder_needs_input(tmp_path, capsys):
  state = scored_runs.make_state(1, 7)
  run = scored_runs.make_workdir(tmp_path / 'run', state, steps=7)
  flags = [f'--workdir={run.path}', '--compilation_cache=']
  assert program.run(['curate', *flags]) == 2
  assert '--input is missing' in capsys.readouterr().err
