"""Shards of a teacher cache behind a URL, for machines that share no folder: what one has computed, no other computes.

The copy is a help and nothing more: where it cannot be read or written, a log line says so once, shards are computed as
without it, and no run ends.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from bdense_core.integrity import check_shard

log = logging.getLogger(__name__)


def open_place(url: str) -> tuple[Any, str]:
    """fsspec's file system, which asks the storage itself and not its memory of it, and the path there."""
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url)
    files.invalidate_cache()  # others write there at the same time
    return files, path.rstrip("/")


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

    def fetch(self, shard: int, folder: Path) -> bool:
        """Bring a shard into the cache's folder, whole or not at all; says whether it is there now.

        A shard that two machines computed may have two forms: everyone takes the same one, the first by name.
        """
        with self._trouble("read", "shards are computed here"):
            files, root = open_place(self._url)
            found = sorted(files.glob(f"{root}/shard-{shard:05d}-*.safetensors"))
            if not found:
                return False
            with tempfile.TemporaryDirectory(prefix=".fetched-", dir=folder) as scratch:
                fetched = Path(scratch) / PurePosixPath(found[0]).name
                files.get_file(found[0], str(fetched))
                check_shard(fetched)
                fetched.rename(folder / fetched.name)
            return True
        return False

    def offer(self, path: Path) -> None:
        """Copy a shard of the cache's folder to the URL, under its own name."""
        with self._trouble("written", "shards stay here"):
            files, root = open_place(self._url)
            files.makedirs(root, exist_ok=True)
            files.put_file(str(path), f"{root}/{path.name}")

    @contextmanager
    def _trouble(self, purpose: str, instead: str) -> Iterator[None]:
        """Whatever a driver raises ends here, said once; a damaged shard is said with its name."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            if not self._told:
                log.warning("the shared teacher cache %s cannot be %s: %s; %s", self._url, purpose, cause, instead)
            self._told = True
