"""The names that a checkpoint may use, and what record each one stands for."""

import re
import struct
from typing import Any

from bdense_core.edm import tensors
from bdense_core.edm.machine import Constructor
from bdense_core.edm.records import MAX_TEXT, DType, Object, checked_arguments, checked_name, shown
from bdense_core.errors import UnsafePickle

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"

_MAX_SOURCE = 2**20  # EDM's modules have some 40,000 characters


def _persistent_object(args: tuple[Any, ...]) -> Object:
    (meta,) = checked_arguments(args, dict)
    class_name, state, source = (meta.get(key) for key in ("class_name", "state", "module_src"))
    if meta.get("type") != "class" or not isinstance(class_name, str) or not isinstance(state, dict):
        raise ValueError("it is called for something that is no object of a class")
    if not isinstance(source, str) or len(source) > _MAX_SOURCE:
        raise ValueError("it is called without a source text, or with a huge one")
    if source and not re.search(rf"^class\s+{re.escape(class_name[:MAX_TEXT])}\b", source, re.MULTILINE):
        raise UnsafePickle(f"it brings a source text that does not define the class {shown(class_name)} it is for")
    return Object(class_name, state)


def _module_dict(args: tuple[Any, ...]) -> Object:
    checked_arguments(args)
    return Object("ModuleDict")


def _dict(args: tuple[Any, ...]) -> dict[str, Any]:
    checked_arguments(args)
    return {}


def _set(args: tuple[Any, ...]) -> set[str]:
    (members,) = checked_arguments(args, list)
    return set(map(checked_name, members))


def _dtype(args: tuple[Any, ...]) -> DType:
    code = args[0] if args and isinstance(args[0], str) else ""
    if code not in _NUMPY_CODES:
        raise UnsafePickle(f"it has numpy data of type {shown(code)!r}, which is no number")
    return DType(_NUMPY_CODES[code])


def _scalar(args: tuple[Any, ...]) -> Any:
    kind, content = checked_arguments(args, DType, bytes)
    layout = kind.order + kind.code
    if len(content) != struct.calcsize(layout):
        raise ValueError(f"a numpy scalar has {len(content)} bytes")
    return struct.unpack(layout, content)[0]


_NUMPY_CODES = {
    **{"b1": "?", "f2": "e", "f4": "f", "f8": "d"},
    **{"i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"},
}
CONSTRUCTORS: dict[str, Constructor] = {
    PERSISTENT: _persistent_object,
    "torch.nn.modules.container.ModuleDict": _module_dict,
    "torch._utils._rebuild_parameter": tensors.parameter,
    "torch._utils._rebuild_tensor_v2": tensors.tensor,
    "torch.storage._load_from_bytes": tensors.storage,
    "collections.OrderedDict": _dict,
    "dnnlib.util.EasyDict": _dict,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
