"""Files of weights from the Hugging Face Hub, by addresses in place of paths.

The package huggingface_hub fetches them and keeps them in its own cache, from
which they are read without a network (HF_HOME, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import os
import pathlib
import posixpath
import re
import urllib.parse
from collections.abc import Callable
from typing import NamedTuple

from cmd_jax.convert import shards
from cmd_jax.convert.torch_globals import UnreadableError
from cmd_jax.errors import UserError, missing_extra
from cmd_jax.files.safe_read import one_line

# pathlib makes one slash of two.
_SCHEME = re.compile(r'hf:/{1,2}(?=[^/])')
_ADDRESS = re.compile(r'([^/@]+)/([^/@]+)(?:@([^/]+))?(?:/(.+?))?/?')
_FORM = 'hf://OWNER/REPO, with @REVISION behind it and /FILE if need be'
# Taken where no file is named, the first that there is.
_USUAL = (
  'model.safetensors',
  'model.safetensors.index.json',
  'pytorch_model.bin',
  'pytorch_model.bin.index.json',
)


class Address(NamedTuple):
  """Where a file is on the Hub.

  Attributes:
    repo: owner and name of the repository.
    revision: branch, tag or commit; None for the main branch.
    file: path in the repository; None takes the usual one.
  """

  repo: str
  revision: str | None
  file: str | None


class _AbsentError(Exception):
  """The repository has no such file, or it is not in the cache.

  Attributes:
    is_offline: whether that is all that is known, without asking the Hub.
  """

  def __init__(self, is_offline: bool):
    super().__init__()
    self.is_offline = is_offline


def is_address(path: str | os.PathLike[str]) -> bool:
  """Whether a path is an address on the Hub, hf://..."""
  return _SCHEME.match(os.fspath(path)) is not None


def parse(address: str | os.PathLike[str]) -> Address:
  """Takes apart hf://owner/repo[@revision][/file].

  A revision with a slash has %2F in its place.

  Raises:
    UserError: something else.
  """
  text = os.fspath(address)
  found = _ADDRESS.fullmatch(_SCHEME.sub('', text, count=1))
  if found is None or '..' in text.split('/'):
    raise UserError(f'{one_line(text)} is no address on the Hub: give {_FORM}')
  owner, name, revision, file = found.groups()
  revision = revision and urllib.parse.unquote(revision)
  return Address(f'{owner}/{name}', revision, file)


def fetch(address: str | os.PathLike[str]) -> pathlib.Path:
  """The file of an address in the cache, fetched if it is not there.

  Of an index, all files that it names are fetched too.

  Args:
    address: see `parse`.

  Returns:
    The path of the file.

  Raises:
    UserError: no address, huggingface_hub is not installed, the repository or
      the file is not there or not open, or it is not in the cache and there is
      no network.
  """
  wanted = parse(address)
  download = _downloader(os.fspath(address), wanted)
  names = _USUAL if wanted.file is None else (wanted.file,)
  is_offline = False
  for name in names:
    try:
      path = download(name, is_offline)
    except _AbsentError as absent:
      # Waiting for the network once is enough.
      is_offline = is_offline or absent.is_offline
      continue
    if shards.is_index(path):
      _fetch_shards(path, name, download)
    return path
  files = ', '.join(names)
  if is_offline:
    raise UserError(
      f'{address} is not in the cache of huggingface_hub ({files}) and the Hub '
      'is out of reach: connect, or fetch it elsewhere and give its path'
    )
  raise UserError(
    f'{address}: {wanted.repo} has no {files}: name another file behind it, as '
    f'hf://{wanted.repo}/FILE'
  )


def _downloader(
  address: str, wanted: Address
) -> Callable[[str, bool], pathlib.Path]:
  """(name, whether from the cache alone) -> the path of a file."""
  try:
    import huggingface_hub
    from huggingface_hub import errors
  except ImportError as error:
    raise missing_extra(f'{address} needs huggingface_hub', 'hub') from error

  def download(name: str, is_offline: bool) -> pathlib.Path:
    try:
      path = huggingface_hub.hf_hub_download(
        wanted.repo,
        name,
        revision=wanted.revision,
        local_files_only=is_offline,
      )
    except errors.EntryNotFoundError as error:
      local = isinstance(error, errors.LocalEntryNotFoundError)
      raise _AbsentError(local) from error
    except errors.GatedRepoError as error:
      raise UserError(
        f'{address} is open to those who accepted its terms alone: accept them '
        f'at https://huggingface.co/{wanted.repo} and run hf auth login'
      ) from error
    except errors.RepositoryNotFoundError as error:
      raise UserError(
        f'{address}: there is no repository {wanted.repo}, or it is private: '
        f'check its name, or run hf auth login'
      ) from error
    except errors.RevisionNotFoundError as error:
      raise UserError(
        f'{address}: {wanted.repo} has no revision {wanted.revision}: give a '
        'branch, a tag or a commit of it'
      ) from error
    # Besides its own it lets those of the client of HTTP of its version pass.
    except Exception as error:
      raise UserError(
        f'{address} could not be fetched ({one_line(error)}): give {_FORM}, or '
        'try again'
      ) from error
    return pathlib.Path(path)

  return download


def _fetch_shards(
  path: pathlib.Path, name: str, download: Callable[[str, bool], pathlib.Path]
) -> None:
  """Fetches the files that an index names, which end up beside it."""
  try:
    index = shards.read_index(path)
  except (OSError, UnreadableError) as error:
    raise UserError(f'{path} {one_line(error)}') from error
  for shard in index.shards:
    try:
      download(posixpath.join(posixpath.dirname(name), shard), False)
    except _AbsentError as absent:
      raise UserError(
        f'{path} names {shard}, which is not there: fetch all files of the '
        'repository, or give another'
      ) from absent
