"""A store that takes forever to answer, until it is let go."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from tests.patience import PATIENCE_S

URL = "hanging://store"


class Hanging(MemoryFileSystem):
    """In memory; what it was asked so that it hangs, and what of that it has answered."""

    protocol = "hanging"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    let_go = threading.Event()
    hangs = frozenset[str]()
    asked: ClassVar[list[str]] = []
    answered: ClassVar[list[str]] = []

    def find(self, *arguments: Any, **named: Any) -> Any:
        self._hang("find")
        return super().find(*arguments, **named)

    def put_file(self, *arguments: Any, **named: Any) -> Any:
        self._hang("put")
        return super().put_file(*arguments, **named)

    def ls(self, *arguments: Any, **named: Any) -> Any:
        self._hang("ls")
        return super().ls(*arguments, **named)

    def rm(self, *arguments: Any, **named: Any) -> Any:
        self._hang("rm")
        return super().rm(*arguments, **named)

    def _hang(self, what: str) -> None:
        if what in self.hangs:
            self.asked.append(what)
            self.let_go.wait(PATIENCE_S)
            self.answered.append(what)


@contextmanager
def hanging(*hangs: str) -> Iterator[type[Hanging]]:
    """While the block runs there is such a store at `URL`, empty, where some of find, put, ls and rm hang."""
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    Hanging.store.clear()
    Hanging.pseudo_dirs[:] = [""]
    Hanging.asked.clear()
    Hanging.answered.clear()
    Hanging.let_go = threading.Event()
    Hanging.hangs = frozenset(hangs)
    try:
        yield Hanging
    finally:
        Hanging.hangs = frozenset()
        Hanging.let_go.set()
