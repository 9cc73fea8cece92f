"""Files that a list names with another spelling than the folder does."""

from __future__ import annotations

import collections
import posixpath
import unicodedata
from collections.abc import Collection, Mapping, Sequence

from cmd_jax.errors import UserError
from cmd_jax.files.safe_read import one_line


def composed(text: str) -> str:
  """Text in one form of Unicode: an umlaut may be one sign, or two.

  Args:
    text: a name; what is no valid Unicode stays as it is.
  """
  return text if text.isascii() else unicodedata.normalize('NFC', text)


def _with_slashes(name: str) -> str:
  return posixpath.normpath(name.replace('\\', '/'))


def _loosely(name: str) -> str:
  return composed(composed(name).casefold())


def _candidates(name: str, tables: Sequence[Mapping[str, list[str]]]):
  """The files that a name may mean, by the strictest rule that finds any."""
  for table, key in zip(tables, (composed, _loosely)):
    found = table.get(key(_with_slashes(name))) or table.get(key(name))
    if found:
      return found
  return []


def find_files(
  wanted: Mapping[str, str], free: Collection[str]
) -> dict[str, str]:
  """The files that are meant by names which no file has.

  Backslashes are taken for slashes, and the form of Unicode and then the case
  of letters are not looked at.

  Args:
    wanted: names and where each was read, for messages.
    free: names of files that no other entry means.

  Returns:
    {name: the one file it can mean}, without those that mean none.

  Raises:
    UserError: a name may mean several files, or two names the same.
  """
  if not wanted:
    return {}
  tables = []
  for key in (composed, _loosely):
    table = collections.defaultdict(list)
    for file in free:
      table[key(file)].append(file)
    tables.append(table)
  meant, name_of = {}, {}
  for name, place in wanted.items():
    found = _candidates(name, tables)
    if len(found) > 1:
      first, second = sorted(found)[:2]
      raise UserError(
        f'{place}: {one_line(name)} may be {one_line(ascii(first))} or '
        f'{one_line(ascii(second))}; write the name as the file has it'
      )
    if not found:
      continue
    other = name_of.setdefault(found[0], name)
    if other != name:
      raise UserError(
        f'{place}: {one_line(ascii(name))} is the file that '
        f'{one_line(ascii(other))} is; keep one of the rows'
      )
    meant[name] = found[0]
  return meant
