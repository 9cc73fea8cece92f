"""What the names in a file tell of its networks.

What is an encoder shows in the names of its first layer, whatever comes before
them; which of two is the average shows in the words before them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from cmd_jax.convert.torch_globals import UnreadableError
from cmd_jax.files.safe_read import one_line

# Words in the names of the running average of a network.
_AVERAGE = set(
  'teacher ema target momentum average averaged avg swa shadow polyak moving '
  'slow'.split()
)
# And of the network that it is the average of, where that has a name.
_TRAINED = set('student online base source fast'.split())
# As in MoCo's encoder_q and encoder_k: no name of a network on their own.
_AVERAGE_BESIDE, _TRAINED_BESIDE = {'k', 'key'}, {'q', 'query'}
# All other words in the names under which programs keep networks.
_NEUTRAL = set(
  'model net network state dict encoder backbone params param parameters '
  'weights module checkpoint ckpt trunk visual vision image feature extractor '
  'body vit deit dinov dino with registers swin resnet efficientnet main raw '
  'live trained pretrained best last final classy learner moving exponential '
  'wrapped orig mod fsdp forward'.split()
)
_WORDS = _NEUTRAL | _AVERAGE | _TRAINED | _AVERAGE_BESIDE | _TRAINED_BESIDE
# The ends of the names in an encoder's first layer: it begins before them.
_FIRST = (
  'patch_embed.proj.weight',
  'embeddings.patch_embeddings.projection.weight',
  'embeddings.patch_embeddings.weight',
  'layer1.0.conv1.weight',
  '_conv_stem.weight',
  'embedding.kernel',
  # A ResNet whose layers a Sequential has numbered.
  '4.0.conv1.weight',
)
_ALONE = 'save the one that is meant alone and give that file'


def words_of(segment: str) -> list[str]:
  """The words of a name between dots, without the numbers they end in."""
  apart = re.sub(r'(?<=[a-z])(?=[A-Z])', '_', segment[:200]).lower()
  words = (x.rstrip('0123456789') for x in re.split('[_-]', apart))
  return [x for x in words if x]


def is_container(segment: str) -> bool:
  """Whether a name between dots is of words for networks alone."""
  words = words_of(segment)
  return bool(words) and _WORDS.issuperset(words)


def _has_word(
  segments: Iterable[str], words: set[str], beside: set[str]
) -> bool:
  for segment in segments:
    found = words_of(segment)
    if words.intersection(found):
      return True
    if len(found) > 1 and beside.intersection(found):
      return True
  return False


def is_average(prefix: str) -> bool:
  """Whether the words before a first layer are of a running average."""
  return _has_word(prefix.split('.'), _AVERAGE, _AVERAGE_BESIDE)


def is_trained(prefix: str) -> bool:
  """Whether they are of the network that an average is of."""
  return _has_word(prefix.split('.'), _TRAINED, _TRAINED_BESIDE)


def roots_of(names: Iterable[str]) -> dict[str, str]:
  """Where encoders begin: what is before a first layer, and its full name."""
  roots = {}
  for name in names:
    for end in _FIRST:
      root = name.removesuffix(end)
      if root != name and (not root or root.endswith('.')):
        roots.setdefault(root, name)
  return roots


def listed(names: Collection[str]) -> str:
  """The first names, as an error shows them."""
  return ', '.join(one_line(name) for name in sorted(names)[:12])


def several_networks(labels: Collection[str], what: str) -> UnreadableError:
  """The error for networks of which none is surely the one."""
  return UnreadableError(
    f'has several {what} ({listed(labels)}) and does not tell which of them '
    f'is the trained one and which its average: {_ALONE}'
  )


def of_role(labels: Iterable[str], network: str) -> list[str]:
  """The labels of the network that is meant, or all if there is but one."""
  averages = [x for x in labels if is_average(x)]
  trained = [x for x in labels if x not in averages]
  if network == 'teacher':
    return averages or trained
  # A name such as 'online' tells more than one such as 'net'.
  told = [x for x in trained if is_trained(x)]
  return (told if len(told) == 1 else trained) or averages


def check_domains(labels: Collection[str], what: str) -> None:
  """Refuses encoders of two domains, neither the average of the other."""
  words = {
    word for x in labels for part in x.split('.') for word in words_of(part)
  }
  if {'source', 'target'} <= words:
    raise several_networks(labels, what)
