"""What differs per machine: the folders, the database's address, Ray's address.

Imports nothing heavy, so every command can read its settings in milliseconds.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Self
from urllib.parse import unquote

import platformdirs

from bdense_core.errors import BadValue

__all__ = ["Settings", "mask", "normalise_url", "private_folder"]

_DRIVER = "postgresql+psycopg2"
_ADVICE = (
    "give postgresql://USER:PASSWORD@HOST:5432/DATABASE, or leave --storage and OPTUNA_STORAGE out "
    "to use the embedded PostgreSQL"
)
_POSTGRES_SCHEME = re.compile(r"postgres(?:ql)?(?:\+\w+)?", re.IGNORECASE)
# Read as SQLAlchemy reads it (sqlalchemy/engine/url.py), not as urllib does: there a `#` or `?` in a
# password would end the host. Stricter in one point: an `@` cannot be part of the host.
_URL = re.compile(
    r"""(?P<scheme>[\w+]+)://
        (?P<rest>
            (?:[^:/@]*(?::[^@]*)?@)?                        # user and password
            (?:\[[^/?@]+\]|[^/:?@]+)?(?::(?P<port>[^/?@]*))? # host and port
            (?:/(?P<database>[^?]*))?
            (?:\?.*)?
        )""",
    re.VERBOSE,
)
_SECRET_NAME = re.compile(r"password|passwd|pwd|secret|token", re.IGNORECASE)
_CREDENTIALS = re.compile(r"^([^:/@]*://[^:/@]*):.*@")  # greedy: an unescaped @ stays hidden
_PARAMETER = re.compile(r"([^\s?&=]+)(\s*=\s*)('[^']*'|[^\s&]*)")
_SECRET_IN_VALUE = re.compile(rf"((?:{_SECRET_NAME.pattern})\w*\s*=).*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One machine's settings, read once with `Settings.load`."""

    home: Path
    storage: str | None = field(repr=False)
    """The PostgreSQL URL, normalised; None stands for the embedded server."""
    ray_address: str | None
    """The cluster to join; None starts Ray on this machine."""

    @classmethod
    def load(
        cls,
        *,
        storage: str | None = None,
        ray_address: str | None = None,
        home: Path | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> Self:
        """The arguments, else the environment, else the platform's own place; nothing is created.

        Raises:
            BadValue: the storage URL is not PostgreSQL's, or BDENSE_HOME names no folder.
        """
        url = storage or environ.get("OPTUNA_STORAGE") or None
        return cls(
            home=_absolute(home or environ.get("BDENSE_HOME") or platformdirs.user_data_path("bdense", False)),
            storage=None if url is None else normalise_url(url),
            ray_address=ray_address or environ.get("RAY_ADDRESS") or None,
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("Settings may hold the database's password and is never pickled; send the one value")

    @property
    def postgres(self) -> Path:
        return self.home / "postgres"

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    @property
    def checkpoints(self) -> Path:
        """The state of running trials, where the study names no other place."""
        return self.home / "checkpoints"

    @property
    def models(self) -> Path:
        """Teachers, feature networks and reference statistics, by name."""
        return self.home / "models"

    @property
    def trackers(self) -> Path:
        """What trackers of experiments write, where their own variables name no other place."""
        return self.home / "trackers"

    @property
    def throughput(self) -> Path:
        """What was measured of this machine's speed, for plans."""
        return self.home / "throughput"

    @property
    def ray(self) -> Path:
        return self.home / "ray"

    def create(self, folder: Path) -> Path:
        """Make one of the folders above, and `home`, readable by this user alone; an existing one stays.

        Raises:
            BadValue: the folder cannot be made.
        """
        try:
            private_folder(self.home)
            return private_folder(folder)
        except OSError as error:
            raise BadValue(
                f"the folder {folder} cannot be created ({error.strerror}); "
                "set BDENSE_HOME to a folder you can write to"
            ) from error


def private_folder(folder: Path) -> Path:
    """Make a folder with mode 0700 if it is missing; its parents get the usual mode. May raise OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def normalise_url(url: str) -> str:
    """The same PostgreSQL address with the driver's name in full, `postgresql+psycopg2://`.

    Raises:
        BadValue: another database, or not a URL; the message never shows the password.
    """
    text = url.strip()
    scheme = text.partition("://")[0] if "://" in text else ""
    if not scheme:
        raise BadValue(f"the storage {mask(text)!r} is not a URL; {_ADVICE}")
    if not _POSTGRES_SCHEME.fullmatch(scheme):
        raise BadValue(f"the storage {mask(text)!r} is not PostgreSQL, and nothing else is supported; {_ADVICE}")
    parts = _URL.fullmatch(text)
    if parts is None or re.search(r"\s", text):
        raise BadValue(
            f"the storage {mask(text)!r} cannot be read; write special characters of the user, password or "
            f"folder as %XX (@ is %40, a space is %20); {_ADVICE}"
        )
    port = parts["port"]
    if port is not None and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise BadValue(f"the storage {mask(text)!r} has port {port!r}, which is no number from 1 to 65535")
    if not parts["database"]:
        raise BadValue(f"the storage {mask(text)!r} names no database; {_ADVICE}")
    return f"{_DRIVER}://{parts['rest']}"


def mask(url: str) -> str:
    """The URL for people to read: every password in it is ***, also among the query's parameters.

    Any text may come in. What cannot be told apart from a password is hidden too.
    """
    if "://" not in url and "@" in url:
        url = "***@" + url.rpartition("@")[2]
    return _PARAMETER.sub(_mask_parameter, _CREDENTIALS.sub(r"\1:***@", url))


def _mask_parameter(parameter: re.Match[str]) -> str:
    name, equals, value = parameter.groups()
    hidden = "***" if _SECRET_NAME.search(unquote(name)) else _SECRET_IN_VALUE.sub(r"\1***", value)
    return f"{name}{equals}{hidden}"


def _absolute(folder: Path | str) -> Path:
    try:
        return Path(folder).expanduser().absolute()
    except RuntimeError as error:
        raise BadValue(f"BDENSE_HOME={str(folder)!r} names no folder ({error}); give a full path") from error
