"""Files that authors publish: fetched whole, or gone on with."""

from __future__ import annotations

import hashlib
import http.client
import os
import pathlib
import shutil
import time
import urllib.error
import urllib.request
from typing import Protocol

from tqdm import tqdm

from cmd_jax.errors import UserError

_BLOCK = 1 << 20
_TIMEOUT_S = 30
# Seconds to wait before each further try at a connection that broke.
_WAITS_S = (1, 5, 15)


class Published(Protocol):
  """A file as its authors published it.

  Attributes:
    name: of the file.
    size: bytes; 0 if unknown.
    sha256: in hexadecimal digits; '' if unknown.
    url: what fetches it.
  """

  name: str
  size: int
  sha256: str
  url: str


class _Refused(Exception):
  """The server has answered, and will not answer otherwise the next time."""


def download(
  file: Published, folder: str | os.PathLike[str], *, progress: bool = True
) -> pathlib.Path:
  """Fetches a file into a folder, where it appears when it is complete.

  What has come so far is in `NAME.part` meanwhile, and stays there if the
  connection breaks for good or the process ends: the next call asks for the
  rest.

  Args:
    file: what to fetch; if it is there it is left as it is.
    folder: made if it is not there.
    progress: whether to show a bar.

  Returns:
    Its path.

  Raises:
    UserError: another file of that name is there, there is no connection,
      the server refuses, the disk is too small, or what came is not the
      published file.
  """
  path = pathlib.Path(folder, file.name)
  if path.exists():
    if file.size and _size(path) != file.size:
      raise UserError(
        f'{path} has {_size(path):,} bytes, but the published file '
        f'{file.size:,}: move it away, and it is fetched'
      )
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f'{file.name}.part')
  _check_space(file, part)
  try:
    total = _fetch_with_patience(file, part, progress)
  except _Refused as e:
    raise UserError(
      f'{file.url} was refused ({e}): fetch {file.name} by hand into {folder}'
    ) from e
  except (OSError, http.client.HTTPException) as e:
    raise UserError(
      f'{file.name} could not be fetched from {file.url} ({_say(e)}); '
      f'{_size(part):,} bytes of it are in {part}, and the same command asks '
      'for the rest'
    ) from e
  _verify(file, part, total)
  os.replace(part, path)
  return path


def _say(error: Exception) -> str:
  is_answer = isinstance(error, urllib.error.HTTPError)
  text = str(error if is_answer else getattr(error, 'reason', error))
  return ' '.join(text.split()) or repr(error)


def _size(path: pathlib.Path) -> int:
  return path.stat().st_size if path.exists() else 0


def _check_space(file: Published, part: pathlib.Path) -> None:
  needed = file.size - _size(part)
  free = shutil.disk_usage(part.parent).free
  if needed > free:
    raise UserError(
      f'{file.name} takes {needed / 1e9:.2f} GB more and {part.parent} has '
      f'{free / 1e9:.2f} GB left: make room, or choose another --manual_dir'
    )


def _fetch_with_patience(
  file: Published, part: pathlib.Path, progress: bool
) -> int:
  """Asks for what is missing until it is there; the size that the server says.

  A try that brought something does not count.
  """
  tries = 0
  while True:
    before = _size(part)
    try:
      return _fetch_rest(file, part, progress)
    except (OSError, http.client.HTTPException):
      if _size(part) > before:
        tries = 0
      if tries == len(_WAITS_S):
        raise
      time.sleep(_WAITS_S[tries])
      tries += 1


def _fetch_rest(file: Published, part: pathlib.Path, progress: bool) -> int:
  """Appends to `part` what it lacks; the size of the whole, 0 if unsaid."""
  have = _size(part)
  if have and have == file.size:
    return have
  request = urllib.request.Request(file.url)
  if have:
    request.add_header('Range', f'bytes={have}-')
  try:
    response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
  except urllib.error.HTTPError as e:
    e.close()
    if e.code == 416:
      # More is there than the server has: another file, or all of it.
      return _whole_of_range(e.headers.get('Content-Range', ''))
    if e.code in (408, 425, 429) or e.code >= 500:
      raise
    raise _Refused(f'{e.code} {e.reason}') from e
  with response:
    total = int(response.headers.get('Content-Length') or 0)
    # Some servers ignore the range and begin again.
    goes_on = response.status == 206
    if goes_on:
      total = _whole_of_range(response.headers.get('Content-Range', ''))
    _append(response, part, have if goes_on else 0, total, progress)
  if total and _size(part) < total:
    raise ConnectionError('the connection ended early')
  return total


def _whole_of_range(text: str) -> int:
  """The size that `bytes 0-9/100` or `bytes */100` ends in; 0 if unsaid."""
  size = text.rpartition('/')[2]
  return int(size) if size.isdigit() else 0


def _append(
  response: http.client.HTTPResponse,
  part: pathlib.Path,
  have: int,
  total: int,
  progress: bool,
) -> None:
  bar = tqdm(
    desc=part.name.removesuffix('.part'),
    initial=have,
    total=total or None,
    unit='B',
    unit_scale=True,
    disable=not progress,
  )
  with bar, part.open('ab' if have else 'wb') as out:
    while block := response.read(_BLOCK):
      out.write(block)
      bar.update(len(block))


def _verify(file: Published, part: pathlib.Path, total: int) -> None:
  """Removes what is not the published file, which no rest would mend."""
  size = _size(part)
  problem = ''
  if size != (file.size or total or size):
    problem = f'has {size:,} bytes, not {file.size or total:,}'
  elif file.sha256:
    with part.open('rb') as content:
      digest = hashlib.file_digest(content, 'sha256').hexdigest()
    if digest != file.sha256:
      problem = f'has the SHA-256 {digest}, not {file.sha256}'
  if problem:
    part.unlink()
    raise UserError(
      f'what {file.url} gives is not the published {file.name}: it {problem}, '
      'and was removed; fetch it from elsewhere, by hand'
    )
