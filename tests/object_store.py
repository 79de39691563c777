"""An object store that speaks S3, on loopback: moto's server, as a process of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import requests

from tests.patience import PATIENCE_S


@dataclass(frozen=True)
class ObjectStore:
    """One empty bucket, and what a process needs in its environment to find it."""

    url: str
    environment: dict[str, str]

    def names(self) -> list[str]:
        """All objects, below the bucket."""
        files, root = self._open()
        return sorted(name.removeprefix(f"{root}/") for name in files.find(root))

    def read(self, name: str) -> bytes:
        files, root = self._open()
        content: bytes = files.cat_file(f"{root}/{name}")
        return content

    def write(self, name: str, content: bytes) -> None:
        files, root = self._open()
        files.pipe_file(f"{root}/{name}", content)

    def _open(self) -> tuple[Any, str]:
        files, root = fsspec.core.url_to_fs(self.url)
        files.invalidate_cache()
        return files, root


@contextmanager
def serving() -> Iterator[ObjectStore]:
    """An S3 server with a bucket; this process's environment leads there while the block runs."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        _wait_for(endpoint, server)
        fsspec.filesystem("s3").mkdir("bucket")
        yield ObjectStore("s3://bucket", environment)
    finally:
        server.terminate()
        server.wait(PATIENCE_S)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _wait_for(endpoint: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            requests.get(endpoint, timeout=5)
        except requests.ConnectionError:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return
