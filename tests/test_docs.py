import pathlib
import re

import pytest

from cmd_jax.cli.commands import COMMANDS
from cmd_jax.config.table import FIELDS

_REPO = pathlib.Path(__file__).resolve().parents[1]
_PAGES = sorted(
  [
    *_REPO.glob('*.md'),
    *_REPO.glob('docs/*.md'),
    _REPO / 'benchmarks/README.md',
  ]
)
# An example of docs/extending.md, which one is to write.
_EXAMPLES = {'cmd_jax/evaluators/nearest_parts.py'}


@pytest.mark.parametrize('page', _PAGES, ids=lambda page: page.name)
def test_files_that_the_documentation_names_exist(page):
  text = page.read_text()
  paths = set(
    re.findall(
      r'\b(?:cmd_jax|configs|tests|benchmarks|docs)/[\w./]*\.\w+', text
    )
  )
  missing = [
    path
    for path in paths - _EXAMPLES
    if not (_REPO / path.rstrip('.')).exists()
  ]
  assert not missing


@pytest.mark.parametrize('page', _PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  links = re.findall(r'\]\(([^)#]+)[^)]*\)', page.read_text())
  for link in links:
    if '://' not in link:
      assert (page.parent / link).exists(), link


def _fields_and_groups():
  paths = [path.removesuffix('.*') for path in FIELDS]
  return {
    path.rsplit('.', up)[0]
    for path in paths
    for up in range(path.count('.') + 1)
  }


@pytest.mark.parametrize('page', _PAGES, ids=lambda page: page.name)
def test_fields_that_the_documentation_names_exist(page):
  named = set(
    re.findall(r'(?<![\w./])(?:--)?config\.([a-z][\w.]*\w)', page.read_text())
  )
  # Files, and what stands for any field.
  unknown = named - _fields_and_groups() - {'json', 'md', 'field'}
  open_groups = tuple(x[:-1] for x in FIELDS if x.endswith('.*'))
  assert not [x for x in unknown if not x.startswith(open_groups)]


@pytest.mark.parametrize('page', _PAGES, ids=lambda page: page.name)
def test_commands_that_the_documentation_shows_have_their_flags(page):
  lines = re.findall(r'cmd-jax ([a-z]+)((?:.*\\\n)*[^\n`]*)', page.read_text())
  for name, arguments in lines:
    flags = set(re.findall(r'(?<!\S)--(\w+)(?=[=\s]|$)', arguments))
    assert flags <= {*COMMANDS[name].options, 'config', 'help'}, name
