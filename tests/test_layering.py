"""Dependencies point one way: main -> train -> methods -> models, losses."""

import ast
import pathlib
import sys

import pytest

_REPO = pathlib.Path(__file__).resolve().parents[1]
_PACKAGES = ('cmd_jax', 'configs', 'tfds_builders')
_MODULES = {
  '.'.join(path.relative_to(_REPO).with_suffix('').parts).removesuffix(
    '.__init__'
  ): path
  for package in _PACKAGES
  for path in sorted((_REPO / package).rglob('*.py'))
} | {'main': _REPO / 'main.py'}

# What a part of the package may import of the rest of the package.
_ALLOWED = {
  'cmd_jax.losses': {'losses', 'parallel', 'blocks'},
  'cmd_jax.models': {'models', 'parallel', 'errors'},
  'cmd_jax.parts': {
    'parts',
    'data',
    'models',
    'errors',
    'atomic',
    'formats',
    'untrusted',
  },
  'cmd_jax.convert': {
    'convert',
    'models',
    'errors',
    'atomic',
    '__version__',
    'untrusted',
  },
  'cmd_jax.methods': {
    'methods',
    'models',
    'losses',
    'schedules',
    'parallel',
    'errors',
  },
  'cmd_jax.evaluators': {'evaluators', 'data', 'errors', 'parallel'},
  'cmd_jax.data': {
    'data',
    'errors',
    'parallel',
    'atomic',
    'blocks',
    'distributed',
    'untrusted',
  },
}
# The batch is what data and the train step agree on.
_EXCEPTIONS = {
  ('cmd_jax.data.resident', 'cmd_jax.train_step.Batch'),
  ('cmd_jax.data.resident', 'cmd_jax.train_step.Batches'),
  ('cmd_jax.data.stream', 'cmd_jax.train_step.Batch'),
}


def _imports(source, module='', is_package=False):
  """Names that a module imports, relative ones made absolute."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        parts = module.split('.')
        up = node.level - is_package
        parents = parts[: len(parts) - up] if up else parts
        base = '.'.join([*parents, *filter(None, [node.module])])
      found |= {f'{base}.{alias.name}' for alias in node.names}
  return found


def _imports_of(module):
  path = _MODULES[module]
  is_package = path.name == '__init__.py'
  found = _imports(path.read_text(), module, is_package)
  return {name for name in found if (module, name) not in _EXCEPTIONS}


def _is_below(name, package):
  return name == package or name.startswith(f'{package}.')


def _in(package):
  return [module for module in _MODULES if _is_below(module, package)]


def test_imports_are_read_in_every_form():
  source = '\n'.join(
    [
      'import a.b as c, d',
      'from e import f',
      'from . import g',
      'from ..h import i',
      'def late():',
      '  from j.k import l',
    ]
  )
  found = _imports(source, 'top.mid.module')
  expected = {'a.b', 'd', 'e.f', 'top.mid.g', 'top.h.i', 'j.k.l'}
  assert found == expected
  assert 'top.mid.module.g' in _imports(source, 'top.mid.module', True)


@pytest.mark.parametrize('package', _ALLOWED)
def test_parts_import_only_what_is_below_them(package):
  modules = _in(package)
  assert modules
  for module in modules:
    for name in _imports_of(module):
      # The package itself has nothing but the version.
      if name != 'cmd_jax' and _is_below(name, 'cmd_jax'):
        part = name.split('.')[1]
        assert part in _ALLOWED[package], f'{module} imports {name}'


def test_losses_need_nothing_but_jax_and_numpy():
  for module in _in('cmd_jax.losses'):
    for name in _imports_of(module):
      top = name.split('.')[0]
      known = top in sys.stdlib_module_names or top == '__future__'
      assert known or top in {'jax', 'numpy', 'cmd_jax'}, f'{module}: {name}'


def test_configs_import_nothing_but_each_other():
  assert len(_in('configs')) > 2
  for module in _in('configs'):
    for name in _imports_of(module):
      top = name.split('.')[0]
      known = top in sys.stdlib_module_names or top == '__future__'
      assert known or top in {'configs', 'ml_collections'}, f'{module}: {name}'


@pytest.mark.parametrize('top', ['cmd_jax.train', 'main'])
def test_the_top_is_imported_by_main_alone(top):
  for module in _MODULES:
    if module != 'main':
      for name in _imports_of(module):
        assert not _is_below(name, top), f'{module} imports {name}'


def test_only_what_is_above_imports_the_experiment():
  above = {
    'main',
    'cmd_jax.train',
    'cmd_jax.announce',
    'cmd_jax.evaluate',
    'cmd_jax.frozen',
    'cmd_jax.part_masks',
    'cmd_jax.experiment',
  }
  for module in _MODULES:
    if any(_is_below(n, 'cmd_jax.experiment') for n in _imports_of(module)):
      below = module.startswith(('cmd_jax.export', 'cmd_jax.report'))
      assert module in above or below, module


@pytest.mark.parametrize('package', ['tensorflow', 'torch', 'clu'])
def test_nothing_imports_a_framework_that_is_no_dependency(package):
  for module in _MODULES:
    for name in _imports_of(module):
      assert name.split('.')[0] != package, f'{module} imports {name}'
