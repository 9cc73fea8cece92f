"""Reads what torch.save wrote, without PyTorch and without running it.

A pickle is a program that may call whatever it names. The interpreter here
knows the instructions that torch.save writes and calls nothing that a file
names: a table says what stands in for each name, all other names are refused.
Python's own Unpickler is no base for it: whatever its `find_class` allows, it
allocates what a memo index asks for and hashes any tuple as a key of a dict.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from cmd_jax.convert.torch_globals import (
  DAMAGED,
  INERT,
  TRUNCATED,
  WHOLE_MODEL,
  Global,
  Storage,
  UnreadableError,
  expect,
  find_global,
  set_item,
)

_MAX_INSTRUCTIONS = 5_000_000


def _find_storage(reference: Any) -> Storage:
  """The storage of a persistent id; `view` is of the old format only."""
  kind = expect(reference, tuple)[0]
  if kind == 'module':
    raise UnreadableError(f'holds a pickled module: {WHOLE_MODEL}')
  _, storage_type, key, _, count, *rest = reference
  view = rest[0] if rest else None
  start = 0
  if view is not None:
    _, start, count = view
  dtype = expect(storage_type, Global).dtype
  if kind != 'storage' or dtype is None:
    raise TypeError('no storage')
  return Storage(expect(key, str), dtype, start, count)


class Interpreter:
  """Runs one pickle.

  Args:
    file: where to read, from its position on.
    end: position that the pickle must not go beyond.

  Attributes:
    storages: dtype of each storage that was referred to, by key.
  """

  def __init__(self, file: BinaryIO, end: int):
    self._file = file
    self._end = end
    self._stack: list[Any] = []
    self._outer: list[list[Any]] = []
    self._memo: dict[int, Any] = {}
    self.storages: dict[str, np.dtype] = {}

  def run(self) -> Any:
    """The object: dicts, lists, tuples, Tensors and numbers.

    Raises:
      UnreadableError: the pickle is damaged, names what is not in the table or
        has instructions that torch.save does not write.
    """
    try:
      for _ in range(_MAX_INSTRUCTIONS):
        code = self.take(1)
        if code == b'.':
          return self.pop()
        if code not in _STEPS:
          raise UnreadableError(
            f'has the pickle instruction {code!r}, which torch.save does not '
            f'write, and was not read any further: {WHOLE_MODEL}'
          )
        _STEPS[code](self)
    except (LookupError, TypeError, ValueError) as error:
      raise UnreadableError(DAMAGED) from error
    raise UnreadableError(
      f'has a pickle of more than {_MAX_INSTRUCTIONS} instructions: save the '
      'state dict alone'
    )

  def take(self, count: int) -> bytes:
    """The next bytes."""
    if not 0 <= count <= self._end - self._file.tell():
      raise UnreadableError(TRUNCATED)
    data = self._file.read(count)
    if len(data) < count:
      raise UnreadableError(TRUNCATED)
    return data

  def unpack(self, form: str) -> Any:
    """The next number in a format of `struct`."""
    (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
    return value

  def line(self) -> str:
    """The rest of a line, the name of a global or of its module."""
    data = self._file.readline(min(1000, self._end - self._file.tell()))
    if not data.endswith(b'\n'):
      raise UnreadableError(TRUNCATED)
    return data[:-1].decode()

  def push(self, value: Any) -> None:
    """Puts a value on the stack."""
    self._stack.append(value)

  def pop(self) -> Any:
    """Takes the last value off the stack."""
    return self._stack.pop()

  def text(self, form: str, encoding: str) -> None:
    """A string whose length comes first."""
    self.push(self.take(self.unpack(form)).decode(encoding, 'replace'))

  def skip(self, form: str) -> None:
    """Bytes whose length comes first: no weights are kept in them."""
    self.take(self.unpack(form))
    self.push(INERT)

  def long(self, form: str) -> None:
    """An integer of any length."""
    data = self.take(self.unpack(form))
    self.push(int.from_bytes(data, 'little', signed=True))

  def put(self, index: int) -> None:
    """Remembers the last value."""
    self._memo[index] = self._stack[-1]

  def memoize(self) -> None:
    """Remembers the last value under the next number."""
    self.put(len(self._memo))

  def get(self, form: str) -> None:
    """Pushes a remembered value."""
    self.push(self._memo[self.unpack(form)])

  def mark(self) -> None:
    """Begins a group of values."""
    self._outer.append(self._stack)
    self._stack = []

  def group(self) -> list[Any]:
    """Takes the values since the last mark."""
    items = self._stack
    self._stack = self._outer.pop()
    return items

  def discard(self) -> None:
    """Forgets the last value, or the mark if nothing came after it."""
    if self._stack:
      self._stack.pop()
    else:
      self.group()

  def pack(self, count: int) -> None:
    """A tuple of the last values."""
    items = [self.pop() for _ in range(count)]
    self.push(tuple(reversed(items)))

  def append(self, items: list[Any]) -> None:
    """Extends the list on the stack; sets and stand-ins carry nothing."""
    if type(self._stack[-1]) is list:
      self._stack[-1].extend(items)

  def set_items(self, items: list[Any]) -> None:
    """Fills the dict on the stack, with keys and values in turn."""
    for key, value in zip(items[::2], items[1::2], strict=True):
      set_item(self._stack[-1], key, value)

  def make_dict(self) -> None:
    """A dict of the keys and values since the last mark."""
    items = self.group()
    self.push({})
    self.set_items(items)

  def make_set(self) -> None:
    """A frozen set, which carries nothing here."""
    self.group()
    self.push(INERT)

  def name_global(self) -> None:
    """The stand-in of a module and a name on the stack."""
    name, module = self.pop(), self.pop()
    self.push(find_global(module, name))

  def call(self) -> None:
    """What stands in for a call; no code but that of the table runs."""
    args, function = self.pop(), self.pop()
    self.push(expect(function, Global).build(expect(args, tuple)))

  def call_with_names(self) -> None:
    """The same with named arguments, which no stand-in has."""
    self.pop()
    self.call()

  def find_storage(self) -> None:
    """The storage that a persistent id names."""
    storage = _find_storage(self.pop())
    self.storages[storage.key] = storage.dtype
    self.push(storage)


# By the byte of the instruction, in the order of pickletools.
_STEPS: dict[bytes, Callable[[Interpreter], Any]] = {
  b'J': lambda m: m.push(m.unpack('<i')),
  b'K': lambda m: m.push(m.unpack('<B')),
  b'M': lambda m: m.push(m.unpack('<H')),
  b'\x8a': lambda m: m.long('<B'),
  b'\x8b': lambda m: m.long('<i'),
  b'T': lambda m: m.text('<i', 'latin-1'),
  b'U': lambda m: m.text('<B', 'latin-1'),
  b'B': lambda m: m.skip('<I'),
  b'C': lambda m: m.skip('<B'),
  b'\x8e': lambda m: m.skip('<Q'),
  b'\x96': lambda m: m.skip('<Q'),
  b'N': lambda m: m.push(None),
  b'\x88': lambda m: m.push(True),
  b'\x89': lambda m: m.push(False),
  b'\x8c': lambda m: m.text('<B', 'utf-8'),
  b'X': lambda m: m.text('<I', 'utf-8'),
  b'\x8d': lambda m: m.text('<Q', 'utf-8'),
  b'G': lambda m: m.push(m.unpack('>d')),
  b']': lambda m: m.push([]),
  b'a': lambda m: m.append([m.pop()]),
  b'e': lambda m: m.append(m.group()),
  b'l': lambda m: m.push(m.group()),
  b')': lambda m: m.push(()),
  b't': lambda m: m.push(tuple(m.group())),
  b'\x85': lambda m: m.pack(1),
  b'\x86': lambda m: m.pack(2),
  b'\x87': lambda m: m.pack(3),
  b'}': lambda m: m.push({}),
  b'd': Interpreter.make_dict,
  b's': lambda m: m.set_items([m.pop(), m.pop()][::-1]),
  b'u': lambda m: m.set_items(m.group()),
  b'\x8f': lambda m: m.push(INERT),
  b'\x90': lambda m: m.append(m.group()),
  b'\x91': Interpreter.make_set,
  b'0': Interpreter.discard,
  b'2': lambda m: m.push(m._stack[-1]),
  b'(': Interpreter.mark,
  b'1': Interpreter.group,
  b'h': lambda m: m.get('<B'),
  b'j': lambda m: m.get('<I'),
  b'q': lambda m: m.put(m.unpack('<B')),
  b'r': lambda m: m.put(m.unpack('<I')),
  b'\x94': Interpreter.memoize,
  b'c': lambda m: m.push(find_global(m.line(), m.line())),
  b'\x93': Interpreter.name_global,
  b'R': Interpreter.call,
  # The state of an object: ours have none.
  b'b': Interpreter.pop,
  b'\x81': Interpreter.call,
  b'\x92': Interpreter.call_with_names,
  b'\x80': lambda m: m.take(1),
  b'\x95': lambda m: m.take(8),
  b'Q': Interpreter.find_storage,
}
