"""Dependencies point one way: main -> train -> methods -> models, losses."""

import ast
import graphlib
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

# What a package may import of the others, beside the errors.
_ALLOWED = {
  'files': set(),
  'devices': set(),
  'optim': set(),
  'losses': {'devices'},
  'models': {'devices'},
  'methods': {'data', 'models', 'losses', 'optim', 'devices'},
  'convert': {'models', 'files', '__version__'},
  'data': {'devices', 'files'},
  'parts': {'data', 'models', 'files'},
  'evaluators': {'data', 'devices', 'files', 'models', 'parts'},
  'config': {'convert', 'evaluators', 'devices'},
  'rundir': {'config', 'models', 'devices', 'files'},
  'api': {'data', 'devices', 'evaluators'},
  'loading': {'api', 'convert', 'evaluators', 'models', 'rundir'},
  'training': {
    'config',
    'convert',
    'data',
    'devices',
    'evaluators',
    'files',
    'losses',
    'methods',
    'models',
    'optim',
    'parts',
    'rundir',
  },
  'compile_ahead': {
    'config',
    'data',
    'devices',
    'files',
    'models',
    'training',
  },
  'report': {'data', 'evaluators', 'files', 'parts', 'rundir', 'training'},
  'cli': {
    'compile_ahead',
    'config',
    'convert',
    'curation',
    'data',
    'devices',
    'export',
    'files',
    'image_index',
    'report',
    'rundir',
    'training',
  },
  'curation': {
    'api',
    'data',
    'evaluators',
    'export',
    'files',
    'report',
    'rundir',
  },
  'image_index': {'api', 'data', 'evaluators', 'export', 'files'},
  'export': {
    'api',
    'convert',
    'data',
    'evaluators',
    'files',
    'models',
    'rundir',
  },
  '__main__': {'cli', 'devices'},
}
_EXCEPTIONS = {
  ('cmd_jax.rundir.checkpoint', 'cmd_jax.training.state.TrainState'),
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


def test_every_package_has_its_place():
  packages = {m.split('.')[1] for m in _in('cmd_jax') if '.' in m}
  assert packages == _ALLOWED.keys() | {'errors'}


@pytest.mark.parametrize('package', _ALLOWED)
def test_packages_import_only_what_is_below_them(package):
  allowed = _ALLOWED[package] | {package, 'errors'}
  for module in _in(f'cmd_jax.{package}'):
    for name in _imports_of(module):
      # cmd_jax itself has nothing but the version.
      if name != 'cmd_jax' and _is_below(name, 'cmd_jax'):
        assert name.split('.')[1] in allowed, f'{module} imports {name}'


def test_packages_can_be_sorted():
  graphlib.TopologicalSorter(_ALLOWED).prepare()


def test_the_package_does_not_import_configs():
  for module in _in('cmd_jax'):
    for name in _imports_of(module):
      assert not _is_below(name, 'configs'), f'{module} imports {name}'


def test_losses_need_nothing_but_jax_and_numpy():
  for module in _in('cmd_jax.losses'):
    for name in _imports_of(module):
      top = name.split('.')[0]
      known = top in sys.stdlib_module_names or top == '__future__'
      assert known or top in {'jax', 'numpy', 'cmd_jax'}, f'{module}: {name}'


def test_configs_import_nothing_but_the_configs_of_the_package():
  assert len(_in('configs')) > 2
  for module in _in('configs'):
    for name in _imports_of(module):
      top = name.split('.')[0]
      known = top in sys.stdlib_module_names or top == '__future__'
      ours = _is_below(name, 'cmd_jax.config')
      assert known or ours or top == 'ml_collections', f'{module}: {name}'


@pytest.mark.parametrize('package', ['tensorflow', 'torch', 'clu'])
def test_nothing_imports_a_framework_that_is_no_dependency(package):
  for module in _MODULES:
    for name in _imports_of(module):
      assert name.split('.')[0] != package, f'{module} imports {name}'
