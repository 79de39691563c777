"""Shards of a teacher cache behind a URL, for machines that share no folder: what one has computed, no other computes.

The copy is a help and nothing more: where it cannot be read or written, or does not answer, a log line says so once,
shards are computed as without it, and no run ends.
"""

import logging
import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import wait
from pathlib import Path, PurePosixPath
from typing import TypeVar

from bdense_core.errors import CacheError
from bdense_core.integrity import check_shard
from bdense_core.remote import errand, open_place

T = TypeVar("T")

_ANSWER_WITHIN_S = 60.0
"""How long the store may take for one shard."""
_LEFT_ALONE_S = 300.0
"""How long a store that has failed is not asked again: each of hundreds of shards would wait for it."""
_LOOK_EVERY_S = 0.1
_LOGIN = re.compile(r"//[^/@]*@")

log = logging.getLogger(__name__)


class SharedShards:
    """The copy of one cache's folder.

    Args:
        url: where all caches have theirs, of a protocol that fsspec knows (`s3://bucket/folder`). Credentials come from
            the driver's own configuration.
        name: of the cache's folder.
    """

    def __init__(self, url: str, name: str) -> None:
        self._url = f"{url.rstrip('/')}/{name}"
        self._told = False
        self._left_alone_until = -math.inf

    def fetch(self, shard: int, folder: Path) -> Generator[None, None, bool]:
        """Bring a shard into the cache's folder, whole or not at all; says whether it is there now.

        A shard that two machines computed may have two forms: everyone takes the same one, the first by name. Yields
        while it waits.
        """
        scratch: Path | None = None
        try:
            scratch = Path(tempfile.mkdtemp(prefix=f".shard-{shard:05d}-", suffix=".tmp", dir=folder))
            fetched = yield from self._ask(lambda: self._download(shard, scratch), "read", "shards are computed here")
            if fetched is not None:
                check_shard(fetched)
                fetched.rename(folder / fetched.name)
        except (CacheError, OSError) as error:
            self._tell("read", error, "shards are computed here")
            return False
        finally:
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
        return fetched is not None

    def offer(self, path: Path) -> Generator[None, None, None]:
        """Copy a shard of the cache's folder to the URL, under its own name. Yields while it waits."""
        yield from self._ask(lambda: self._upload(path), "written", "shards stay here")

    def _download(self, shard: int, scratch: Path) -> Path | None:
        files, root = open_place(self._url)
        found = sorted(files.glob(f"{root}/shard-{shard:05d}-*.safetensors"))
        if not found:
            return None
        fetched = scratch / PurePosixPath(found[0]).name
        files.get_file(found[0], str(fetched))
        return fetched

    def _upload(self, path: Path) -> None:
        files, root = open_place(self._url)
        files.makedirs(root, exist_ok=True)
        files.put_file(str(path), f"{root}/{path.name}")

    def _ask(self, action: Callable[[], T], purpose: str, instead: str) -> Generator[None, None, T | None]:
        """What a thread brings of the store; None where that failed, or took too long, or did so a short while ago."""
        if time.monotonic() < self._left_alone_until:
            return None
        answer = errand(action)
        until = time.monotonic() + _ANSWER_WITHIN_S
        while not answer.done() and time.monotonic() < until:
            wait([answer], timeout=_LOOK_EVERY_S)
            yield
        late = TimeoutError(f"no answer within {_ANSWER_WITHIN_S:g} s")
        if (error := answer.exception() if answer.done() else late) is None:
            return answer.result()
        self._left_alone_until = time.monotonic() + _LEFT_ALONE_S
        self._tell(purpose, error, instead)
        return None

    def _tell(self, purpose: str, error: BaseException, instead: str) -> None:
        if not self._told:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            shown = _LOGIN.sub("//", self._url)
            cause = cause.replace(self._url, shown)
            log.warning("the shared teacher cache %s cannot be %s: %s; %s", shown, purpose, cause, instead)
        self._told = True
