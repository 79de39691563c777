"""The instructions of a pickle, followed with plain data; there is nothing here that could be called by name."""

import pickletools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from bdense_core.edm.records import MAX_TEXT, DType, Global, Object, checked_name, shown
from bdense_core.errors import UnsafePickle

Constructor = Callable[[tuple[Any, ...]], Any]

_MAX_INSTRUCTIONS = 1_000_000  # a full-size network has about a tenth


class Input:
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
        return self._file.readline(MAX_TEXT)

    def at_end(self) -> bool:
        return self._file.tell() == self._size


def _instructions(source: Input) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    """The instructions of a pickle; what Python thinks of an old-style text in one is nobody's concern."""
    instructions = pickletools.genops(source)  # type: ignore[arg-type]
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                instruction = next(instructions)
            except StopIteration:
                return
        yield instruction


class Machine:
    """Reads one pickle.

    Args:
        constructors: what makes a record of the arguments, for each name that the pickle may use.
        persistent_id: what makes a record of a reference to outside of the pickle; without it there may be none.
    """

    def __init__(
        self,
        source: Input,
        constructors: Mapping[str, Constructor],
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
        for number, (instruction, argument, _) in enumerate(_instructions(self._source)):
            if number >= _MAX_INSTRUCTIONS:
                raise ValueError(f"it has more than {_MAX_INSTRUCTIONS} instructions")
            if instruction.name not in _STEPS:
                if instruction.name == "INST":
                    self._global(argument)  # an unknown name says more than that it is INST
                raise UnsafePickle(f"the instruction {instruction.name} occurs in no EDM checkpoint")
            _STEPS[instruction.name](self, argument)
        if len(self._stack) != 1 or self._marks or (last and not self._source.at_end()):
            raise ValueError("more than one value is in it")
        return self._stack[0]

    def _known(self, name: str) -> Global:
        if name not in self._constructors:
            raise UnsafePickle(f"it wants {shown(name)}, which is no part of an EDM network")
        return Global(name)

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("an instruction finds nothing to work on")
        return self._stack.pop()

    def _top(self) -> Any:
        self._push(self._pop())
        return self._stack[-1]

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _pop_marked(self) -> list[Any]:
        if not self._marks:
            raise ValueError("an instruction finds no mark")
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _global(self, argument: Any) -> None:
        self._push(self._known(argument.replace(" ", ".", 1)))  # module and name, as `pickletools` gives them

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise UnsafePickle("it wants a global whose name is no text")
        self._push(self._known(f"{module}.{name}"))

    def _construct(self, _: Any) -> None:
        args, made_from = self._pop(), self._pop()
        if not isinstance(made_from, Global):
            raise UnsafePickle("it calls something that is no known name")
        if not isinstance(args, tuple):
            raise ValueError(f"the arguments of {made_from.name} are no tuple")
        try:
            self._push(self._constructors[made_from.name](args))
        except UnsafePickle as error:
            raise UnsafePickle(f"in {made_from.name}: {error}") from error
        except ValueError as error:
            raise ValueError(f"in {made_from.name}: {error}") from error

    def _build(self, _: Any) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, DType) and isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|"):
            target.order = "<" if state[1] == "|" else state[1]
        elif isinstance(target, Object) and isinstance(state, dict) and not target.state:
            target.state = state
        else:
            raise UnsafePickle(f"it sets attributes of a {type(target).__name__}")

    def _append(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise ValueError("something is appended to what is no list")
        target.extend(values)

    def _add(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not set:
            raise ValueError("something is added to what is no set")
        target.update(map(checked_name, values))

    def _set_items(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not dict or len(values) % 2:
            raise ValueError("an entry is made in what is no dictionary")
        target.update(zip(map(checked_name, values[::2]), values[1::2], strict=True))

    def _set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _dict(self, _: Any) -> None:
        values = self._pop_marked()
        self._push({})
        self._set_items(values)

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(values)))

    def _remember(self, number: int | None) -> None:
        self._memo[len(self._memo) if number is None else number] = self._top()

    def _recall(self, number: int) -> None:
        if number not in self._memo:
            raise ValueError("it refers to a value that it does not have")
        self._push(self._memo[number])

    def _refer(self, _: Any) -> None:
        if self._persistent_id is None:
            raise UnsafePickle("it refers to objects outside of the file")
        self._push(self._persistent_id(self._pop()))


_LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
)
_STEPS: dict[str, Callable[[Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(_LITERALS, Machine._push),
    "NONE": lambda machine, _: machine._push(None),
    "NEWTRUE": lambda machine, _: machine._push(True),
    "NEWFALSE": lambda machine, _: machine._push(False),
    "EMPTY_LIST": lambda machine, _: machine._push([]),
    "EMPTY_TUPLE": lambda machine, _: machine._push(()),
    "EMPTY_DICT": lambda machine, _: machine._push({}),
    "EMPTY_SET": lambda machine, _: machine._push(set()),
    "MARK": Machine._mark,
    "TUPLE": lambda machine, _: machine._push(tuple(machine._pop_marked())),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "LIST": lambda machine, _: machine._push(machine._pop_marked()),
    "DICT": Machine._dict,
    "APPEND": lambda machine, _: machine._append([machine._pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._pop_marked()),
    "ADDITEMS": lambda machine, _: machine._add(machine._pop_marked()),
    "SETITEM": Machine._set_item,
    "SETITEMS": lambda machine, _: machine._set_items(machine._pop_marked()),
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), Machine._construct),
    "BUILD": Machine._build,
    **dict.fromkeys(("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"), Machine._remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine._recall),
    "BINPERSID": Machine._refer,
}
