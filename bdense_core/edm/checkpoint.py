"""From the plain data of a pickle to a network: its configuration and its weights by their names."""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bdense_core.edm.machine import Input, Machine
from bdense_core.edm.names import CONSTRUCTORS, PERSISTENT
from bdense_core.edm.records import MAX_BYTES, MAX_TEXT, Object, checked_name, shown
from bdense_core.edm.tensors import View
from bdense_core.errors import CheckpointError, ConfigError, UnsafePickle
from bdense_core.network_config import NetworkConfig

_KEY = "ema"
_MAX_DEPTH = 16


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
            if not 0 < size <= MAX_BYTES:
                raise ValueError("it is empty" if size == 0 else f"it has {size} bytes, more than any of them")
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            return _checkpoint(Machine(Input(file, size), CONSTRUCTORS).read(last=True), size, digest)
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except UnsafePickle as error:
        raise UnsafePickle(f"{path} is refused: {error}; nothing of it was run, do not open it otherwise") from error
    except (ValueError, ConfigError) as error:
        detail = shown(str(error))
        raise CheckpointError(f"{path} is no EDM checkpoint that can be read: {detail}; fetch it again") from error


def _checkpoint(content: object, size: int, digest: str) -> EDMCheckpoint:
    network = _network(content)
    kwargs = _kwargs(network)
    views = dict(_walk(network, "", set(), 0))
    # No tensor is larger than its storage, but many may share one.
    if sum(math.prod(view.size) for view in views.values()) > size:
        raise ValueError("its tensors have more numbers than the file has bytes")
    return EDMCheckpoint(
        config=_config(network.class_name, kwargs),
        state={name: view.tensor() for name, view in views.items()},
        class_name=network.class_name,
        key=_KEY,
        sha256=digest,
    )


def _network(content: object) -> Object:
    if not isinstance(content, dict) or _KEY not in content:
        keys = ", ".join(map(shown, list(content)[:5])) if isinstance(content, dict) else "no dictionary"
        raise ValueError(f"it has no entry {_KEY!r}, only {keys or 'nothing'}")
    network = content[_KEY]
    if not isinstance(network, Object):
        raise ValueError(f"its entry {_KEY!r} is no network")
    return network


def _kwargs(network: Object) -> dict[str, Any]:
    """The arguments that the network was built with, all of them by name."""
    kwargs = network.state.get("_init_kwargs")
    if not isinstance(kwargs, dict) or network.state.get("_init_args"):
        raise ValueError(f"its {shown(network.class_name)} ({PERSISTENT}) lacks the arguments it was built with")
    return {checked_name(key): _plain(value) for key, value in kwargs.items()}


def _plain(value: Any) -> Any:
    """An argument of a network: numbers, short texts, and short lists of them."""
    if isinstance(value, list | tuple) and len(value) <= MAX_TEXT:
        if any(isinstance(item, list | tuple) for item in value):
            raise ValueError("an argument of the network is a list of lists")
        return [_plain(item) for item in value]
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**53):
        return value
    if isinstance(value, str) and len(value) <= MAX_TEXT:
        return value
    raise ValueError("an argument of the network is no number, text or list of these")


def _config(class_name: str, kwargs: dict[str, Any]) -> NetworkConfig:
    try:
        return NetworkConfig.from_edm_kwargs(class_name, kwargs)
    except TypeError as error:
        raise ValueError(f"an argument of its {shown(class_name)} has the wrong kind ({error})") from error


def _walk(module: Object, prefix: str, seen: set[int], depth: int) -> Iterator[tuple[str, View]]:
    """Parameters, buffers and then those of the modules within, as a state dict lists them."""
    if id(module) in seen or depth > _MAX_DEPTH:
        raise ValueError(f"the module {prefix.rstrip('.')} occurs twice, or in itself")
    seen.add(id(module))
    parameters, buffers, modules = (_entries(module, key, prefix) for key in ("_parameters", "_buffers", "_modules"))
    passing = module.state.get("_non_persistent_buffers_set") or set()
    if not isinstance(passing, set):
        raise ValueError(f"the module {prefix.rstrip('.')} has buffers of an unknown kind")
    kept = {name: view for name, view in buffers.items() if name not in passing}
    for name, view in [*parameters.items(), *kept.items()]:
        if view is None:
            continue
        if not isinstance(view, View) or not view.storage.dtype.is_floating_point:
            raise ValueError(f"{prefix}{name} is no tensor of floating-point numbers")
        yield f"{prefix}{name}", view
    for name, child in modules.items():
        if child is None:
            continue
        if not isinstance(child, Object):
            raise ValueError(f"{prefix}{name} is no module")
        yield from _walk(child, f"{prefix}{name}.", seen, depth + 1)


def _entries(module: Object, key: str, prefix: str) -> dict[str, Any]:
    entries = module.state.get(key)
    if not isinstance(entries, dict):
        where = prefix.rstrip(".") or f"network ({PERSISTENT})"
        raise ValueError(f"the {shown(module.class_name)} of the {where} lacks its {key}")
    if any("." in name or not 0 < len(name) <= MAX_TEXT or not name.isprintable() for name in entries):
        raise ValueError(f"{prefix.rstrip('.')} has {key} with impossible names")
    return entries
