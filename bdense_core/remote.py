"""Storage behind URLs: fsspec's view of it, and errands to it, which may take long or hang."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def open_place(url: str) -> tuple[Any, str]:
    """fsspec's file system, which asks the storage itself and not its memory of it, and the path there."""
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url)
    files.invalidate_cache()  # others write there at the same time
    return files, path.rstrip("/")


def errand(action: Callable[[], T]) -> Future[T]:
    """Begin something beside the training, in a thread of its own; a process that ends does not wait for it."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(action())
        except Exception as error:  # noqa: BLE001 - whatever a driver raises
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer
