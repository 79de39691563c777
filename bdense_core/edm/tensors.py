"""Tensors of a pickle: the bytes they are stored in, and what part of these each one is."""

import math
import struct
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NoReturn

import torch
from torch import Tensor

from bdense_core.edm.machine import Input, Machine
from bdense_core.edm.records import MAX_BYTES, Global, checked_arguments
from bdense_core.errors import UnsafePickle

_MAX_HEADER = 2048  # of a storage: five pickles of about 250 bytes together
_MAX_DIMENSIONS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """The numbers behind a tensor."""

    dtype: torch.dtype
    count: int
    raw: memoryview


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor not made yet; it is known to lie inside its storage and to be no larger."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """A copy in float32."""
        if self.storage.count == 0:
            return torch.zeros(self.size)
        # A bytearray, as torch warns about memory it must not write to.
        flat = torch.frombuffer(bytearray(self.storage.raw), dtype=self.storage.dtype)
        return (
            flat.as_strided(self.size, self.stride, self.offset)
            .to(torch.float32)
            .clone(memory_format=torch.contiguous_format)
        )


def parameter(args: tuple[Any, ...]) -> View:
    view: View = checked_arguments(args, View, bool, dict)[0]
    return view


def tensor(args: tuple[Any, ...]) -> View:
    storage, offset, size, stride, *_ = checked_arguments(args, Storage, int, tuple, tuple, bool, dict)
    numbers = (offset, *size, *stride)
    natural = all(type(n) is int and n >= 0 for n in numbers)
    if len(size) != len(stride) or len(size) > _MAX_DIMENSIONS or not natural:
        raise ValueError("a tensor has sizes or strides that are no natural numbers")
    inside = max(numbers) <= storage.count and math.prod(size) <= storage.count
    # A step of 0 would make a tensor of any size from one number; none is larger than its storage.
    if inside and math.prod(size):
        inside = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) < storage.count
    if not inside:
        raise ValueError(f"a tensor reaches outside the {storage.count} numbers it is stored in")
    return View(storage, offset, size, stride)


def storage(args: tuple[Any, ...]) -> Storage:
    """A storage in torch's format from before its zip files: five pickles, then count and numbers."""
    (content,) = checked_arguments(args, bytes)
    start = content[:_MAX_HEADER]
    header = Input(BytesIO(start), len(start))
    magic, protocol, system, described, keys = (
        Machine(header, dict.fromkeys(_DTYPES, _no_call), _storage_id).read() for _ in range(5)
    )
    if (magic, protocol) != (0x1950A86A20F9469CFC6C, 1001) or not isinstance(system, dict):
        raise ValueError("a storage is not in torch's format of version 1001")
    if system.get("little_endian") is not True:
        raise ValueError("a storage is not little-endian")
    if not isinstance(described, StorageId) or keys != [described.key]:
        raise ValueError("a storage holds something else than one storage")
    raw = memoryview(content)[header.tell() :]
    width = described.dtype.itemsize
    if raw[:8] != struct.pack("<Q", described.count) or len(raw) != 8 + described.count * width:
        raise ValueError(f"a storage of {described.count} numbers of {width} bytes has {len(raw)} bytes")
    return Storage(described.dtype, described.count, raw[8:])


@dataclass(frozen=True, slots=True)
class StorageId:
    """What a storage says of itself, before its numbers."""

    dtype: torch.dtype
    key: str
    count: int


def _storage_id(value: object) -> StorageId:
    """What stands for a storage in its own pickle: ('storage', type, key, device, count, view)."""
    kind, dtype, key, _, count, view = checked_arguments(value, str, Global, str, str, int, object)
    if kind != "storage" or not 0 <= count <= MAX_BYTES or view is not None:
        raise ValueError("a storage is described in an unknown way")
    return StorageId(_DTYPES[dtype.name], key, count)


def _no_call(args: tuple[Any, ...]) -> NoReturn:
    raise UnsafePickle("a storage type is called, which no checkpoint does")


_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.uint8,  # as bytes: a bool that is neither 0 nor 1 must not come to be
}
