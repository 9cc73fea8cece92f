"""What stands in for the names that a pickle of torch.save may mention.

Nothing here runs anything, whatever the arguments: the builders put data into
records after checks of type.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

AGAIN = 'download or copy it again'
TRUNCATED = f'ends in the middle of its contents: {AGAIN}'
DAMAGED = f'is damaged: {AGAIN}'
WHOLE_MODEL = (
  'if it is a whole model, load it with the program that wrote it and save '
  'model.state_dict()'
)


class UnreadableError(Exception):
  """What is wrong with a file and what to do; the caller knows which file."""


class Inert:
  """Stands in for all objects of no interest; carries and does nothing."""

  __slots__ = ()


INERT = Inert()
# Begins the names of items whose keys are no strings.
NAMELESS = '(no name) '


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
  """A run of numbers in the file.

  Attributes:
    key: its name in the file.
    dtype: of the numbers.
    start: where it begins in what the key names, in numbers.
    count: how many numbers there are.
  """

  key: str
  dtype: np.dtype
  start: int
  count: int


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
  """A strided view of a storage; strides and offset count numbers."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]
  dtype: np.dtype


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
  """Stands in for what a pickle names.

  Attributes:
    name: its full name.
    dtype: of a type of storage, or the dtype that is named.
    build: what a call gives; one of the functions below.
  """

  name: str
  dtype: np.dtype | None = None
  build: Callable[[tuple], Any] = lambda args: INERT


def expect(value: Any, kind: type) -> Any:
  """The value if it is of just that type; TypeError otherwise."""
  if type(value) is not kind:
    raise TypeError(f'{type(value)} where {kind} belongs')
  return value


def _build_dict(args: tuple) -> dict[str, Any]:
  # Only Python 2 gives the items of an OrderedDict as an argument.
  pairs = args[0] if args and type(args[0]) is list else []
  result = {}
  for pair in pairs:
    key, value = expect(pair, list)
    set_item(result, key, value)
  return result


def _build_tensor(args: tuple) -> Tensor:
  storage, offset, shape, strides = args[:4]
  return Tensor(
    expect(storage, Storage),
    offset,
    expect(shape, tuple),
    expect(strides, tuple),
    storage.dtype,
  )


def _build_tensor_v3(args: tuple) -> Tensor:
  dtype = expect(args[6], Global).dtype
  if dtype is None:
    raise TypeError('no dtype')
  return dataclasses.replace(_build_tensor(args), dtype=dtype)


def _build_parameter(args: tuple) -> Tensor:
  return expect(args[0], Tensor)


def _build_from_type(args: tuple) -> Tensor:
  function, _, inner = args[:3]
  build = expect(function, Global).build
  if build not in (_build_tensor, _build_tensor_v3, _build_parameter):
    raise TypeError(f'{function.name} makes no tensor')
  return build(expect(inner, tuple))


def _build_size(args: tuple) -> tuple:
  return expect(args[0], tuple)


def _build_attribute(args: tuple) -> Inert:
  # As members of an enumeration are pickled by some versions of Python.
  owner, name = args
  expect(owner, Global)
  expect(name, str)
  return INERT


_DTYPES = {
  'float64': ('Double', np.float64),
  'float32': ('Float', np.float32),
  'float16': ('Half', np.float16),
  'bfloat16': ('BFloat16', ml_dtypes.bfloat16),
  'int64': ('Long', np.int64),
  'int32': ('Int', np.int32),
  'int16': ('Short', np.int16),
  'int8': ('Char', np.int8),
  'uint8': ('Byte', np.uint8),
  'bool': ('Bool', np.bool_),
  'complex64': ('ComplexFloat', np.complex64),
  'complex128': ('ComplexDouble', np.complex128),
  'uint16': (None, np.uint16),
  'uint32': (None, np.uint32),
  'uint64': (None, np.uint64),
}
_BUILDS = {
  'collections.OrderedDict': _build_dict,
  'collections.defaultdict': _build_dict,
  '__builtin__.getattr': _build_attribute,
  'builtins.getattr': _build_attribute,
  'torch.Size': _build_size,
  'torch._utils._rebuild_tensor': _build_tensor,
  'torch._utils._rebuild_tensor_v2': _build_tensor,
  'torch._utils._rebuild_tensor_v3': _build_tensor_v3,
  'torch._utils._rebuild_parameter': _build_parameter,
  'torch._utils._rebuild_parameter_with_state': _build_parameter,
  'torch._tensor._rebuild_from_type_v2': _build_from_type,
}
# Found beside the weights in published files: arguments, logs, versions.
_INERT = """
  __builtin__.Ellipsis __builtin__.bytearray __builtin__.complex
  __builtin__.dict __builtin__.float __builtin__.frozenset __builtin__.int
  __builtin__.list __builtin__.long __builtin__.set __builtin__.slice
  __builtin__.str __builtin__.tuple __builtin__.type __builtin__.unicode
  __builtin__.xrange _codecs.encode addict.Dict addict.addict.Dict
  argparse.Namespace builtins.Ellipsis builtins.bytearray builtins.bytes
  builtins.complex builtins.dict builtins.float builtins.frozenset
  builtins.int builtins.list builtins.range builtins.set builtins.slice
  builtins.str builtins.tuple builtins.type collections.ChainMap
  collections.Counter collections.deque copy_reg._reconstructor
  copyreg._reconstructor datetime.date datetime.datetime datetime.time
  datetime.timedelta datetime.timezone decimal.Decimal
  detectron2.config.config.CfgNode easydict.EasyDict fractions.Fraction
  functools.partial fvcore.common.config.CfgNode
  ml_collections.config_dict.config_dict.ConfigDict
  mmcv.utils.config.ConfigDict mmengine.config.config.ConfigDict
  numpy._core.multiarray._reconstruct numpy._core.multiarray.scalar
  numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar numpy.dtype
  numpy.ndarray omegaconf.base.ContainerMetadata omegaconf.base.Metadata
  omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig
  omegaconf.nodes.AnyNode omegaconf.nodes.BooleanNode
  omegaconf.nodes.FloatNode omegaconf.nodes.IntegerNode
  omegaconf.nodes.StringNode pathlib.Path pathlib.PosixPath pathlib.PurePath
  pathlib.PurePosixPath pathlib.PureWindowsPath pathlib.WindowsPath
  pathlib._local.Path pathlib._local.PosixPath pathlib._local.PurePath
  pathlib._local.PurePosixPath pathlib._local.PureWindowsPath
  pathlib._local.WindowsPath
  pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint
  pytorch_lightning.utilities.parsing.AttributeDict re._compile torch.Tensor
  torch.device torch.nn.parameter.Parameter torch.storage.TypedStorage
  torch.torch_version.TorchVersion types.SimpleNamespace typing.Any uuid.UUID
  yacs.config.CfgNode
""".split()


def _make_globals() -> dict[str, Global]:
  table = {name: Global(name) for name in _INERT}
  for name, build in _BUILDS.items():
    table[name] = Global(name, build=build)
  dtypes = {}
  for name, (storage, dtype) in _DTYPES.items():
    dtypes[f'torch.{name}'] = dtype
    if storage:
      dtypes[f'torch.{storage}Storage'] = dtype
      dtypes[f'torch.cuda.{storage}Storage'] = dtype
  for name in ('torch', 'torch.storage'):
    dtypes[f'{name}.UntypedStorage'] = np.uint8
    dtypes[f'{name}._UntypedStorage'] = np.uint8
  for name, dtype in dtypes.items():
    table[name] = Global(name, dtype=np.dtype(dtype))
  return table


_GLOBALS = _make_globals()
# Nothing of them would run either, but a file that asks for them means harm.
_OF_PYTHON = sys.stdlib_module_names | {
  *('__builtin__', 'commands', 'copy_reg', 'popen2', 'urllib2'),
}
_OF_SYSTEM = set(
  'os posix nt sys subprocess shutil socket system popen eval exec compile '
  '__import__ __builtins__ __globals__ __subclasses__'.split()
)
# Of PyTorch: losses, optimisers and settings, all but what makes tensors.
_BESIDE_WEIGHTS = (
  *('torch.nn.', 'torch.optim.', 'torch.distributed.', 'torch.utils.data.'),
  *('torch.amp.', 'torch.cuda.amp.'),
)


def _is_foreign(full: str) -> bool:
  """Whether a name is of a program of others, such as of its settings."""
  parts = full.split('.')
  if _OF_SYSTEM.intersection(parts):
    return False
  return full.startswith(_BESIDE_WEIGHTS) or (
    parts[0] not in _OF_PYTHON and parts[0] != 'torch'
  )


def find_global(module: Any, name: Any) -> Global:
  """What stands in for a name.

  What is neither of Python itself nor of PyTorch, such as the enumerations and
  settings of a trainer, carries and does nothing, as all that is built of it.

  Raises:
    UnreadableError: a name of Python's or PyTorch's that is not in the table.
  """
  full = f'{expect(module, str)}.{expect(name, str)}'
  if full in _GLOBALS:
    return _GLOBALS[full]
  if _is_foreign(full):
    return Global(full)
  raise UnreadableError(
    f'asks for {full[:200]!r}, which no weights need, so it was not read any '
    f'further and nothing of it was run: {WHOLE_MODEL}'
  )


def set_item(target: Any, key: Any, value: Any) -> None:
  """Puts an item under its name, or under one of its own if it has none."""
  if type(target) is not dict:
    return
  # Names are strings; hashing any other key may take for ever.
  if type(key) is str:
    target[key] = value
  elif value is INERT or isinstance(value, dict | list | Tensor):
    target[f'{NAMELESS}{len(target)}'] = value
