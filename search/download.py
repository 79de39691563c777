"""One file over HTTP: resumed where it stopped, checked, and only then under its name."""

import errno
import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from bdense_core.files import sha256_of_file, write_text_atomically
from search.errors import FetchError

__all__ = ["Progress", "download"]

Progress = Callable[[str, int, int | None], None]
"""Told a file's name, the bytes that are here, and all of its bytes where known."""

BACKOFF_S = 0.5
_TRIES = 4
_TIMEOUT_S = (20, 60)  # to connect, and between two pieces
_PIECE = 2**16  # at most so much is lost where a connection breaks off
_OFFLINE = "on a machine without internet copy the files to a folder and name it with --from"


class _Broken(Exception):
    """The connection ended before the file did."""


def download(url: str, target: Path, *, accept: Callable[[str], None], progress: Progress | None = None) -> str:
    """Fetch `url` into `target` and return its sha256.

    What has come is kept in `<target>.part` and the next call goes on from there, whatever ended this one.

    Args:
        accept: told the sha256 before the file gets its name; what it raises discards the file.

    Raises:
        FetchError: no such file, no connection, or no room on the disk.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = _Part(target, url)
        with _session() as session:
            _receive_all(session, part, progress)
        digest = sha256_of_file(part.path)
        try:
            accept(digest)
        except Exception:
            part.discard()
            raise
        part.path.replace(target)
        part.discard()
    except OSError as error:
        raise FetchError(_unwritable(target, error)) from error
    return digest


@dataclass(frozen=True)
class _Part:
    """The bytes that have come, and a note of where they came from."""

    target: Path
    url: str

    @property
    def path(self) -> Path:
        return self.target.with_name(f"{self.target.name}.part")

    @property
    def _note(self) -> Path:
        return self.target.with_name(f"{self.target.name}.part.json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def validator(self) -> str | None:
        """What the server calls this version of the file; None: begin anew, the bytes may be another file's."""
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(note, dict) or note.get("url") != self.url or not isinstance(note.get("validator"), str):
            return None
        return str(note["validator"])

    def begin(self, validator: str | None) -> None:
        """Forget what is there, and note what comes."""
        self.path.unlink(missing_ok=True)
        write_text_atomically(self._note, json.dumps({"url": self.url, "validator": validator}))

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)


def _session() -> requests.Session:
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # of each try: the end is told in one line
    retry = Retry(
        total=_TRIES,
        backoff_factor=BACKOFF_S,
        status_forcelist=(429, 500, 502, 503, 504),
        respect_retry_after_header=False,  # it may say hours
        raise_on_status=False,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def _receive_all(session: requests.Session, part: _Part, progress: Progress | None) -> None:
    """Go on until the file is whole. A connection that breaks off may do so as often as it gets further."""
    farthest, fruitless = part.size, 0
    while True:
        try:
            return _receive(session, part, progress)
        except _Broken as error:
            fruitless = 0 if part.size > farthest else fruitless + 1
            farthest = max(farthest, part.size)
            if fruitless >= _TRIES:
                raise FetchError(
                    f"cannot fetch {part.url}: {error}; try again later, it goes on from byte {part.size}; {_OFFLINE}"
                ) from error
            time.sleep(BACKOFF_S)


def _receive(session: requests.Session, part: _Part, progress: Progress | None) -> None:
    """One request for what is still missing.

    Raises:
        _Broken: the answer ended early; what came is in the part.
        FetchError: the server has no such file, cannot be reached, or the disk is full.
    """
    validator = part.validator()
    start = part.size if validator else 0
    headers = {"Accept-Encoding": "identity"}
    if start and validator:
        # With another version of the file on the server the answer is that whole file, status 200.
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    try:
        with session.get(part.url, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
            if answer.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
                if answer.headers.get("Content-Range") == f"bytes */{start}":
                    return  # all of it was here already
                part.discard()
                raise _Broken("the server has another file than before")
            total = _accept_answer(answer, part, start)
            _write(answer, part, total, progress)
    except requests.ConnectionError as error:
        raise FetchError(
            f"cannot reach the server of {part.url} ({_cause(error)}); try again later; {_OFFLINE}"
        ) from error
    except requests.RequestException as error:
        raise FetchError(f"cannot fetch {part.url} ({_cause(error)}); check the address") from error


def _accept_answer(answer: requests.Response, part: _Part, start: int) -> int | None:
    """Check what kind of answer it is, make the part ready for it, and return the size of the whole file."""
    if answer.status_code == HTTPStatus.PARTIAL_CONTENT and start:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start:
            part.discard()
            raise _Broken("the server sends another range than asked for")
        return None if found[2] == "*" else int(found[2])
    if answer.status_code != HTTPStatus.OK:
        raise FetchError(
            f"{part.url} answers {answer.status_code} {answer.reason}; "
            f"check the address, or whether the publisher has moved the file; {_OFFLINE}"
        )
    strong = answer.headers.get("ETag", "")
    part.begin(strong if strong.startswith('"') else answer.headers.get("Last-Modified"))
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _write(answer: requests.Response, part: _Part, total: int | None, progress: Progress | None) -> None:
    done = part.size
    free = shutil.disk_usage(part.path.parent).free
    if total is not None and total - done > free:
        raise FetchError(
            f"the disk of {part.path.parent} has {free / 1e6:.0f} MB left, but {part.target.name} needs "
            f"{(total - done) / 1e6:.0f} MB more; make room and run the same command again"
        )
    try:
        with part.path.open("ab") as file:
            for piece in answer.iter_content(_PIECE):
                file.write(piece)
                done += len(piece)
                if progress is not None:
                    progress(part.target.name, done, total)
    except requests.RequestException as error:
        raise _Broken("the connection breaks off") from error
    if total is not None and done < total:
        raise _Broken("the connection breaks off")
    if total is not None and done > total:
        part.discard()
        raise _Broken("the server sends more than it announced")


def _cause(error: requests.RequestException) -> str:
    """The innermost reason, without the addresses and objects around it."""
    cause: BaseException = error
    while (inner := getattr(cause, "reason", None) or cause.__cause__ or cause.__context__) is not None:
        if not isinstance(inner, BaseException):
            break
        cause = inner
    return getattr(cause, "strerror", None) or str(cause).rpartition(": ")[2] or type(cause).__name__


def _unwritable(target: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"the disk of {target.parent} is full; make room and run the same command again: what came is kept"
    return f"cannot write {target}: {error.strerror or error}; choose a folder you can write to"
