import pathlib
import re

import pytest

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
