"""Lists the benchmarks: `python -m benchmarks`."""

from __future__ import annotations

import ast
import pathlib

FOLDER = pathlib.Path(__file__).parent


def list_benchmarks() -> dict[str, str]:
  """First line of the docstring of every module that can be run, by name."""
  found = {}
  for path in sorted(FOLDER.glob('*.py')):
    tree = ast.parse(path.read_text())
    functions = {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}
    if 'main' in functions and path.stem != '__main__':
      found[path.stem] = (ast.get_docstring(tree) or '').partition('\n')[0]
  return found


def main() -> None:
  """Prints the list."""
  benchmarks = list_benchmarks()
  width = max(map(len, benchmarks))
  print('python -m benchmarks.NAME [--help]\n')
  for name, line in benchmarks.items():
    print(f'  {name:{width}}  {line}')


if __name__ == '__main__':
  main()
