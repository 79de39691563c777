"""Places that all nodes can read and write: a path, or a URL of a protocol that fsspec knows."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from bdense_core.errors import BadValue, CheckpointError
from bdense_core.remote import open_place
from search.settings import mask

_KEPT = {"checkpoints.url": "the checkpoints", "cache.url": "the shared teacher cache"}
"""By the study file's key: what is kept there."""


def check_writable(url: str, key: str = "checkpoints.url") -> None:
    """Make the place, and find out early that nothing could be written there.

    Raises:
        BadValue: an unknown protocol, or a driver that is not installed.
        CheckpointError: the storage cannot be reached or written.
    """
    with told("written", url, key):
        files, path = open_place(url)
        files.makedirs(path, exist_ok=True)
        probe = f"{path}/.writable-{secrets.token_hex(8)}"  # another launcher may be trying the same
        files.pipe_file(probe, b"")
        files.rm_file(probe)


@contextmanager
def told(purpose: str, url: str, key: str = "checkpoints.url") -> Iterator[None]:
    """Whatever a driver raises, as one line without a password.

    Raises:
        BadValue: an unknown protocol, or a driver that is not installed.
        CheckpointError: anything else.
    """
    try:
        yield
    except Exception as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if (password := urlsplit(url).password) is not None:
            cause = cause.replace(password, "***").replace(unquote(password), "***")
        cause = cause.replace(url, mask(url)).rstrip(".")
        if isinstance(error, ImportError) or "Protocol not known" in cause:
            raise BadValue(
                f"{key} {mask(url)} cannot be used: {cause}; install the driver's package on all nodes, or "
                "give it a path"
            ) from error
        raise CheckpointError(
            f"{_KEPT[key]} at {mask(url)} cannot be {purpose}: {cause}; make the storage reachable and writable, or "
            f"change {key}"
        ) from error
