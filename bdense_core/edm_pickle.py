"""Published EDM checkpoints: pickles that carry source code, read as plain data; nothing in them is run.

Python's own unpickler calls what a file names. Here the instructions of a pickle (listed by `pickletools`)
are followed by a small machine that has nothing to call: a global is a name from a short list and stands
for a record below, everything else is refused by its name. What the machine reads costs memory in
proportion to the file: counts, sizes and strides are checked before anything is made from them.

Two rules for the source text that each EDM object carries. It is dropped unread but for one check: a
text that does not define the class it comes with was not written by EDM, and the file is refused. And a
network must be complete without it: the arguments it was built with and all of its layers.
"""

import hashlib
import math
import os
import pickletools
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from bdense_core.errors import CheckpointError, ConfigError, UnsafePickle
from bdense_core.network_config import NetworkConfig

__all__ = ["EDMCheckpoint", "read_edm_pickle"]

_KEY = "ema"
_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_MAX_BYTES = 2 * 2**30  # the largest network read here, ImageNet-64, has 1.2e9
_MAX_INSTRUCTIONS = 1_000_000  # a full-size network has about a tenth
_MAX_DEPTH = 16
_MAX_TEXT = 200
_MAX_SOURCE = 2**20  # EDM's modules have some 40,000 characters
_MAX_HEADER = 2048  # of a storage: five pickles of about 250 bytes together


@dataclass(frozen=True, kw_only=True, eq=False)
class EDMCheckpoint:
    """A network of a published checkpoint.

    Attributes:
        state: parameters and buffers by their official names, float32, on the CPU.
        class_name: the preconditioning wrapper, such as `EDMPrecond`.
        key: where in the file the network stood.
        sha256: of the whole file.
    """

    config: NetworkConfig
    state: dict[str, Tensor]
    class_name: str
    key: str
    sha256: str


def read_edm_pickle(path: Path) -> EDMCheckpoint:
    """The moving average of the weights (`ema`) and its configuration.

    Raises:
        UnsafePickle: the file names something beyond the parts of an EDM network; it was not called.
        CheckpointError: the file is missing, damaged, or holds no EDM network.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not 0 < size <= _MAX_BYTES:
                raise ValueError("it is empty" if size == 0 else f"it has {size} bytes, more than any of them")
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            return _checkpoint(_Machine(_Input(file, size), _OBJECTS).read(last=True), size, digest)
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except UnsafePickle as error:
        raise UnsafePickle(f"{path} is refused: {error}; nothing of it was run, do not open it otherwise") from error
    except (ValueError, ConfigError) as error:
        detail = _shown(str(error))
        raise CheckpointError(f"{path} is no EDM checkpoint that can be read: {detail}; fetch it again") from error


# --- plain data instead of objects ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Global:
    """A name in the file, not what it names."""

    name: str


@dataclass(slots=True, eq=False)
class _Object:
    """A module of the network, or another object with attributes."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _DType:
    """A numpy number type, as `struct` writes it."""

    code: str
    order: str = "<"


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """The numbers behind a tensor."""

    dtype: torch.dtype
    count: int
    raw: memoryview


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """A tensor not made yet; it is known to lie inside its storage and to be no larger."""

    storage: _Storage
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


# --- what the known names stand for ---------------------------------------------------------------------


def _persistent_object(args: tuple[Any, ...]) -> _Object:
    (meta,) = _arguments(args, dict)
    class_name, state, source = (meta.get(key) for key in ("class_name", "state", "module_src"))
    if meta.get("type") != "class" or not isinstance(class_name, str) or not isinstance(state, dict):
        raise ValueError("it is called for something that is no object of a class")
    if not isinstance(source, str) or len(source) > _MAX_SOURCE:
        raise ValueError("it is called without a source text, or with a huge one")
    if source and not re.search(rf"^class\s+{re.escape(class_name[:_MAX_TEXT])}\b", source, re.MULTILINE):
        raise UnsafePickle(f"it brings a source text that does not define the class {_shown(class_name)} it is for")
    return _Object(class_name, state)


def _module(args: tuple[Any, ...]) -> _Object:
    _arguments(args)
    return _Object("ModuleDict")


def _dict(args: tuple[Any, ...]) -> dict[str, Any]:
    _arguments(args)
    return {}


def _set(args: tuple[Any, ...]) -> set[str]:
    (members,) = _arguments(args, list)
    return {_string(member) for member in members}


def _parameter(args: tuple[Any, ...]) -> _View:
    view: _View = _arguments(args, _View, bool, dict)[0]
    return view


def _tensor(args: tuple[Any, ...]) -> _View:
    storage, offset, size, stride, *_ = _arguments(args, _Storage, int, tuple, tuple, bool, dict)
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > _MAX_DEPTH or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor has sizes or strides that are no natural numbers")
    inside = max(numbers) <= storage.count and math.prod(size) <= storage.count
    # A step of 0 would make a tensor of any size from one number; none is larger than its storage.
    if inside and math.prod(size):
        inside = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) < storage.count
    if not inside:
        raise ValueError(f"a tensor reaches outside the {storage.count} numbers it is stored in")
    return _View(storage, offset, size, stride)


def _storage(args: tuple[Any, ...]) -> _Storage:
    """A storage in torch's format from before its zip files: five pickles, then count and numbers."""
    (content,) = _arguments(args, bytes)
    header = BytesIO(content[:_MAX_HEADER])
    magic, protocol, system, storage, keys = (
        _Machine(_Input(header, len(header.getbuffer())), _STORAGE_TYPES, _persistent_id).read() for _ in range(5)
    )
    if (magic, protocol) != (0x1950A86A20F9469CFC6C, 1001) or not isinstance(system, dict):
        raise ValueError("a storage is not in torch's format of version 1001")
    if system.get("little_endian") is not True:
        raise ValueError("a storage is not little-endian")
    if not isinstance(storage, _StorageId) or keys != [storage.key]:
        raise ValueError("a storage holds something else than one storage")
    raw = memoryview(content)[header.tell() :]
    width = storage.dtype.itemsize
    if raw[:8] != struct.pack("<Q", storage.count) or len(raw) != 8 + storage.count * width:
        raise ValueError(f"a storage of {storage.count} numbers of {width} bytes has {len(raw)} bytes")
    return _Storage(storage.dtype, storage.count, raw[8:])


def _dtype(args: tuple[Any, ...]) -> _DType:
    code = args[0] if args and isinstance(args[0], str) else ""
    if code not in _NUMPY_CODES:
        raise UnsafePickle(f"it has numpy data of type {_shown(code)!r}, which is no number")
    return _DType(_NUMPY_CODES[code])


def _scalar(args: tuple[Any, ...]) -> Any:
    kind, content = _arguments(args, _DType, bytes)
    layout = kind.order + kind.code
    if len(content) != struct.calcsize(layout):
        raise ValueError(f"a numpy scalar has {len(content)} bytes")
    return struct.unpack(layout, content)[0]


def _no_call(args: tuple[Any, ...]) -> NoReturn:
    raise UnsafePickle("a storage type is called, which no checkpoint does")


@dataclass(frozen=True, slots=True)
class _StorageId:
    dtype: torch.dtype
    key: str
    count: int


def _persistent_id(value: object) -> _StorageId:
    """What stands for a storage in its own pickle: ('storage', type, key, device, count, view)."""
    kind, dtype, key, _, count, view = _arguments(value, str, _Global, str, str, int, object)
    if kind != "storage" or not 0 <= count <= _MAX_BYTES or view is not None:
        raise ValueError("a storage is described in an unknown way")
    return _StorageId(_DTYPES[dtype.name.rpartition(".")[2].removesuffix("Storage")], key, count)


def _arguments(args: object, *kinds: type) -> tuple[Any, ...]:
    """The arguments, if they are of these kinds; newer torch adds one after the dictionary of hooks."""
    numbers = {len(kinds), len(kinds) + (kinds[-1:] == (dict,))}
    if not isinstance(args, tuple) or len(args) not in numbers:
        raise ValueError("a part of the network has arguments of another number than known")
    for value, kind in zip(args, kinds, strict=False):
        if not isinstance(value, kind):
            raise ValueError(f"a part of the network has a {type(value).__name__} in place of a {kind.__name__}")
    return args


_Constructors = dict[str, Callable[[tuple[Any, ...]], Any]]
_OBJECTS: _Constructors = {
    _PERSISTENT: _persistent_object,
    "torch.nn.modules.container.ModuleDict": _module,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "collections.OrderedDict": _dict,
    "dnnlib.util.EasyDict": _dict,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
_DTYPES = {
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Double": torch.float64,
    "Long": torch.int64,
    "Int": torch.int32,
    "Byte": torch.uint8,
    "Bool": torch.uint8,  # as bytes: a bool that is neither 0 nor 1 must not come to be
}
_STORAGE_TYPES: _Constructors = {f"torch.{name}Storage": _no_call for name in _DTYPES}
_NUMPY_CODES = {
    **{"b1": "?", "f2": "e", "f4": "f", "f8": "d"},
    **{"i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"},
}


# --- the machine ----------------------------------------------------------------------------------------


class _Input:
    """A file that is asked only for as many bytes as it has, however long a text in it claims to be."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise ValueError("it ends too early")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(_MAX_TEXT)

    def at_end(self) -> bool:
        return self._file.tell() == self._size


class _Machine:
    """Follows the instructions of one pickle with plain data; see the module's docstring."""

    def __init__(
        self,
        source: _Input,
        constructors: _Constructors,
        persistent_id: Callable[[object], object] | None = None,
    ) -> None:
        self._source = source
        self._constructors = constructors
        self._persistent_id = persistent_id
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self, *, last: bool = False) -> Any:
        """The one value of the pickle; with `last` nothing may follow it.

        Raises:
            UnsafePickle: a name or an instruction that no checkpoint needs.
            ValueError: damaged, or no pickle.
        """
        for number, (name, argument) in enumerate(self._instructions()):
            if number >= _MAX_INSTRUCTIONS:
                raise ValueError(f"it has more than {_MAX_INSTRUCTIONS} instructions")
            if name in _LITERALS:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self._stack.append(_EMPTY[name]())
            elif name in _STEPS:
                _STEPS[name](self, argument)
            elif name not in _IGNORED:
                raise UnsafePickle(f"the instruction {name} occurs in no EDM checkpoint")
        if len(self._stack) != 1 or self._marks or (last and not self._source.at_end()):
            raise ValueError("more than one value is in it")
        return self._stack[0]

    def _instructions(self) -> Iterator[tuple[str, Any]]:
        for instruction, argument, _ in pickletools.genops(self._source):  # type: ignore[arg-type]
            if instruction.name in ("GLOBAL", "INST"):
                self._known(".".join(str(argument).split(" ", 1)))
            yield instruction.name, argument

    def _known(self, name: str) -> _Global:
        if name not in self._constructors:
            raise UnsafePickle(f"it wants {_shown(name)}, which is no part of an EDM network")
        return _Global(name)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("an instruction finds nothing to work on")
        return self._stack.pop()

    def _pop_marked(self) -> list[Any]:
        if not self._marks:
            raise ValueError("an instruction finds no mark")
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _top(self) -> Any:
        self._stack.append(self._pop())
        return self._stack[-1]

    def _global(self, argument: Any) -> None:
        self._stack.append(_Global(".".join(argument.split(" ", 1))))  # known, see _instructions

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise UnsafePickle("it wants a global whose name is no text")
        self._stack.append(self._known(f"{module}.{name}"))

    def _construct(self, _: Any) -> None:
        args, made_from = self._pop(), self._pop()
        if not isinstance(made_from, _Global):
            raise UnsafePickle("it calls something that is no known name")
        if not isinstance(args, tuple):
            raise ValueError(f"the arguments of {made_from.name} are no tuple")
        try:
            self._stack.append(self._constructors[made_from.name](args))
        except UnsafePickle as error:
            raise UnsafePickle(f"in {made_from.name}: {error}") from error
        except ValueError as error:
            raise ValueError(f"in {made_from.name}: {error}") from error

    def _build(self, _: Any) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, _DType) and isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|"):
            target.order = "<" if state[1] == "|" else state[1]
        elif isinstance(target, _Object) and isinstance(state, dict) and not target.state:
            target.state = state
        else:
            raise UnsafePickle(f"it sets attributes of a {type(target).__name__.lstrip('_')}")

    def _append(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise ValueError("something is appended to what is no list")
        target.extend(values)

    def _add(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not set:
            raise ValueError("something is added to what is no set")
        target.update(_string(value) for value in values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not dict or len(values) % 2:
            raise ValueError("an entry is made in what is no dictionary")
        target.update(zip(map(_string, values[::2]), values[1::2], strict=True))

    def _dict(self, values: list[Any]) -> None:
        self._stack.append({})
        self._set_items(values)

    def _set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def _remember(self, number: int | None) -> None:
        self._memo[len(self._memo) if number is None else number] = self._top()

    def _recall(self, number: int) -> None:
        if number not in self._memo:
            raise ValueError("it refers to a value that it does not have")
        self._stack.append(self._memo[number])

    def _storage_id(self, _: Any) -> None:
        if self._persistent_id is None:
            raise UnsafePickle("it refers to objects outside of the file")
        self._stack.append(self._persistent_id(self._pop()))


_IGNORED = ("PROTO", "FRAME", "STOP")
_LITERALS = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
    | {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda machine, _: machine._marks.append(len(machine._stack)),
    "TUPLE": lambda machine, _: machine._stack.append(tuple(machine._pop_marked())),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "LIST": lambda machine, _: machine._stack.append(machine._pop_marked()),
    "DICT": lambda machine, _: machine._dict(machine._pop_marked()),
    "APPEND": lambda machine, _: machine._append([machine._pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._pop_marked()),
    "ADDITEMS": lambda machine, _: machine._add(machine._pop_marked()),
    "SETITEM": _Machine._set_item,
    "SETITEMS": lambda machine, _: machine._set_items(machine._pop_marked()),
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._construct,
    "NEWOBJ": _Machine._construct,
    "BUILD": _Machine._build,
    "MEMOIZE": _Machine._remember,
    "PUT": _Machine._remember,
    "BINPUT": _Machine._remember,
    "LONG_BINPUT": _Machine._remember,
    "GET": _Machine._recall,
    "BINGET": _Machine._recall,
    "LONG_BINGET": _Machine._recall,
    "BINPERSID": _Machine._storage_id,
}


# --- from plain data to a network -----------------------------------------------------------------------


def _checkpoint(content: object, size: int, digest: str) -> EDMCheckpoint:
    if not isinstance(content, dict) or _KEY not in content:
        keys = ", ".join(map(_shown, list(content)[:5])) if isinstance(content, dict) else "no dictionary"
        raise ValueError(f"it has no entry {_KEY!r}, only {keys or 'nothing'}")
    network = content[_KEY]
    if not isinstance(network, _Object):
        raise ValueError(f"its entry {_KEY!r} is no network")
    kwargs = network.state.get("_init_kwargs")
    if not isinstance(kwargs, dict) or network.state.get("_init_args"):
        raise ValueError(f"its {_shown(network.class_name)} ({_PERSISTENT}) lacks the arguments it was built with")
    plain = {_string(key): _plain(value) for key, value in kwargs.items()}
    views = dict(_walk(network, "", set(), 0))
    # No tensor is larger than its storage, but many may share one.
    if sum(math.prod(view.size) for view in views.values()) > size:
        raise ValueError("its tensors have more numbers than the file has bytes")
    try:
        config = NetworkConfig.from_edm_kwargs(network.class_name, plain)
    except TypeError as error:
        raise ValueError(f"an argument of its {_shown(network.class_name)} has the wrong kind ({error})") from error
    return EDMCheckpoint(
        config=config,
        state={name: view.tensor() for name, view in views.items()},
        class_name=network.class_name,
        key=_KEY,
        sha256=digest,
    )


def _walk(module: _Object, prefix: str, seen: set[int], depth: int) -> Iterator[tuple[str, _View]]:
    """Parameters, buffers and then those of the modules within, as a state dict lists them."""
    if id(module) in seen or depth > _MAX_DEPTH:
        raise ValueError(f"the module {prefix.rstrip('.')} occurs twice, or in itself")
    seen.add(id(module))
    parameters, buffers, modules = (_entries(module, key, prefix) for key in ("_parameters", "_buffers", "_modules"))
    passing = module.state.get("_non_persistent_buffers_set") or set()
    if not isinstance(passing, set):
        raise ValueError(f"the module {prefix.rstrip('.')} has buffers of an unknown kind")
    for name, view in [*parameters.items(), *((n, b) for n, b in buffers.items() if n not in passing)]:
        if view is None:
            continue
        if not isinstance(view, _View) or not view.storage.dtype.is_floating_point:
            raise ValueError(f"{prefix}{name} is no tensor of floating-point numbers")
        yield f"{prefix}{name}", view
    for name, child in modules.items():
        if child is None:
            continue
        if not isinstance(child, _Object):
            raise ValueError(f"{prefix}{name} is no module")
        yield from _walk(child, f"{prefix}{name}.", seen, depth + 1)


def _entries(module: _Object, key: str, prefix: str) -> dict[str, Any]:
    entries = module.state.get(key)
    if not isinstance(entries, dict):
        where = prefix.rstrip(".") or f"network ({_PERSISTENT})"
        raise ValueError(f"the {_shown(module.class_name)} of the {where} lacks its {key}")
    if any("." in name or not 0 < len(name) <= _MAX_TEXT or not name.isprintable() for name in entries):
        raise ValueError(f"{prefix.rstrip('.')} has {key} with impossible names")
    return entries


def _plain(value: Any) -> Any:
    """An argument of a network: numbers, short texts, and short lists of them."""
    if isinstance(value, list | tuple) and len(value) <= _MAX_TEXT:
        if any(isinstance(item, list | tuple) for item in value):
            raise ValueError("an argument of the network is a list of lists")
        return [_plain(item) for item in value]
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**53):
        return value
    if isinstance(value, str) and len(value) <= _MAX_TEXT:
        return value
    raise ValueError("an argument of the network is no number, text or list of these")


def _string(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"a {type(value).__name__} stands where a name belongs")
    return value


def _shown(text: str) -> str:
    """Foreign text in a message: one line, not too long."""
    short = text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."
    return short if short.isprintable() else ascii(short)
