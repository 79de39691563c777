"""What stands for the objects of a pickle: records of plain data, and checks of foreign values."""

from dataclasses import dataclass, field
from typing import Any

MAX_BYTES = 2 * 2**30  # the largest network read here, ImageNet-64, has 1.2e9
MAX_TEXT = 200


@dataclass(frozen=True, slots=True)
class Global:
    """A name in the file, not what it names."""

    name: str


@dataclass(slots=True, eq=False)
class Object:
    """A module of the network, or another object with attributes."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class DType:
    """A numpy number type, as `struct` writes it."""

    code: str
    order: str = "<"


def checked_arguments(args: object, *kinds: type) -> tuple[Any, ...]:
    """The arguments, if they are of these kinds; newer torch adds one after the dictionary of hooks."""
    numbers = {len(kinds), len(kinds) + (kinds[-1:] == (dict,))}
    if not isinstance(args, tuple) or len(args) not in numbers:
        raise ValueError("a part of the network has arguments of another number than known")
    for value, kind in zip(args, kinds, strict=False):
        if not isinstance(value, kind):
            raise ValueError(f"a part of the network has a {type(value).__name__} in place of a {kind.__name__}")
    return args


def checked_name(value: object) -> str:
    if type(value) is not str:
        raise ValueError(f"a {type(value).__name__} stands where a name belongs")
    return value


def shown(text: str) -> str:
    """Foreign text in a message: one line, not too long."""
    short = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."
    return short if short.isprintable() else ascii(short)
