"""Published teachers, with their reference statistics and feature network, as this project's own files.

models/inception/features.pt            as published
models/<name>/teacher.safetensors       from the published pickle, of which nothing is run
models/<name>/reference.safetensors     from the published npz
models/<name>/origin.json               where each came from, and what it hashed to
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bdense_core.errors import BadValue, BDenseError
from bdense_core.files import sha256_of_file, write_atomically, write_text_atomically
from bdense_core.integrity import read_metadata
from bdense_core.network_config import NetworkConfig
from search.catalogue import Entry, Role, Source, entry
from search.download import Progress, download
from search.errors import FetchError

__all__ = ["Fetched", "alone_in", "fetch", "fetch_entry"]

_FORMAT = "bdense-origin/1"
_FILES: dict[Role, str] = {
    "features": "features.pt",
    "teacher": "teacher.safetensors",
    "reference": "reference.safetensors",
}
_SAME_NETWORK = ("architecture", "preconditioning", "img_resolution", "img_channels", "label_dim")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """One file, ready for use.

    Attributes:
        sha256: of the file itself.
        url: where the publisher has it.
        source_sha256: of what the publisher has.
        fresh: False if it was here already.
    """

    role: Role
    path: Path
    sha256: str
    url: str
    source_sha256: str
    fresh: bool


def fetch(
    name: str,
    models: Path,
    *,
    say: Callable[[str], None],
    source: Path | None = None,
    base_url: str | None = None,
    sha256: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[Fetched]:
    """Get a teacher of the catalogue with all that goes with it; what is here and intact stays.

    Args:
        models: the folder of all fetched models.
        say: told each thing that is done, one line each.
        source: read the published files from this folder instead of fetching them, or one such file, which
            brings only itself.
        base_url: a mirror of the publisher's server.
        sha256: what a published file must hash to, by `teacher`, `reference` or `features`.

    Raises:
        BadValue: no such teacher, or a wrong argument.
        FetchError: a file cannot be got, or is another than known.
        CheckpointError: the teacher is damaged, or a pickle that wants more than a network needs.
        EvaluationError: the reference statistics are damaged.
    """
    return fetch_entry(entry(name), models, say=say, source=source, base_url=base_url, sha256=sha256, progress=progress)


def fetch_entry(
    wanted: Entry,
    models: Path,
    *,
    say: Callable[[str], None],
    source: Path | None = None,
    base_url: str | None = None,
    sha256: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[Fetched]:
    """`fetch` for an entry of one's own."""
    local = None if source is None else _local_files(wanted, source)
    job = _Job(wanted, models, say, base_url, _pins(wanted, sha256 or {}), progress, local)
    roles = [role for role in wanted.sources() if source is None or source.is_dir() or role in (local or {})]
    with alone_in(models):
        say(f"terms of use of {wanted.name}: {wanted.terms}")
        return [job.get(role) for role in roles]


@contextmanager
def alone_in(models: Path) -> Iterator[None]:
    """Nobody else fetches into this folder meanwhile.

    Raises:
        FetchError: somebody does, or the folder cannot be written.
    """
    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / ".fetch.lock", timeout=0):
            yield
    except Timeout as error:
        raise FetchError(f"another command is fetching into {models}; wait until it has ended") from error
    except OSError as error:
        raise FetchError(
            f"cannot fetch into {models}: {error.strerror or error}"
            f"{'' if error.filename is None else f' ({error.filename})'}; make room, or check the permissions"
        ) from error


@dataclass(frozen=True)
class _Job:
    entry: Entry
    models: Path
    say: Callable[[str], None]
    base_url: str | None
    pins: Mapping[str, str]
    progress: Progress | None
    local: Mapping[Role, Path] | None
    """The published files on this machine; None fetches them."""

    def get(self, role: Role) -> Fetched:
        """One file: the one that is here, else a new one."""
        path, source = self._path(role), self.entry.sources()[role]
        record = self._records().get(role, {})
        expected = self.pins.get(role) or source.sha256 or record.get("sha256")
        found = self._intact(role, path, record, expected)
        if found is None:
            record = self._obtain(role, source, path)
            self.say(f"{path}: sha256 {record['file_sha256']}")
        else:
            here: dict[str, Any] = {
                "sha256": found,
                "bytes": path.stat().st_size,
                "file": path.name,
                "file_sha256": found,
            }
            record = {"url": source.url(), **here} | record
            self.say(f"{path} is here and intact")
        self._note(role, record)
        return Fetched(
            role=role,
            path=path,
            sha256=record["file_sha256"],
            url=record["url"],
            source_sha256=record["sha256"],
            fresh=found is None,
        )

    def _path(self, role: Role) -> Path:
        return self.models / ("inception" if role == "features" else self.entry.name) / _FILES[role]

    def _intact(self, role: Role, path: Path, record: dict[str, Any], expected: str | None) -> str | None:
        """The hash of the file that is here, if it is the one that would be got."""
        if not path.exists():
            return None
        digest = sha256_of_file(path)
        if digest == (expected if role == "features" else record.get("file_sha256")):
            if expected in (None, record.get("sha256"), digest):
                return digest
            self.say(f"{path} was made from another file than asked for; it is made anew")
        else:
            self.say(f"{path} is damaged or of unknown origin; it is made anew")
        return None

    def _obtain(self, role: Role, source: Source, path: Path) -> dict[str, Any]:
        """Get the published file and make ours of it; what is known about both."""
        if self.local is None:
            raw, origin = path if role == "features" else path.with_name(source.name), source.url(self.base_url)
            digest = self._download(role, source, raw, origin)
        elif role in self.local:
            raw, origin = self.local[role], str(self.local[role])
            self.say(f"reading {raw}")
            digest = sha256_of_file(raw)
            self._accept(role, source, digest)
        else:
            absent = [
                known.url(self.base_url) for role, known in self.entry.sources().items() if role not in self.local
            ]
            raise FetchError(f"the folder of --from lacks what is published as {', '.join(absent)}; put it there")
        self.say(f"{source.name}: sha256 {digest}")
        size = raw.stat().st_size
        remove = self.local is None and raw != path
        try:
            self._convert(role, raw, path)
        except BDenseError:
            # What is known to be right is kept for the next run (the disk may be full), all else is not.
            if remove and not (self.pins.get(role) or source.sha256):
                raw.unlink(missing_ok=True)
            raise
        if remove:
            raw.unlink(missing_ok=True)
        made = {"file": path.name, "file_sha256": sha256_of_file(path)}
        return {"url": source.url(), "from": origin, "sha256": digest, "bytes": size, **made}

    def _download(self, role: Role, source: Source, raw: Path, url: str) -> str:
        if role != "features" and raw.is_file():  # an earlier run was ended after it had come
            digest = sha256_of_file(raw)
            try:
                self._accept(role, source, digest)
            except FetchError:
                self.say(f"{raw} is not the file that is wanted; it is fetched again")
            else:
                return digest
        self.say(f"fetching {url}")
        return download(url, raw, accept=lambda found: self._accept(role, source, found), progress=self.progress)

    def _accept(self, role: Role, source: Source, digest: str) -> None:
        known = self.pins.get(role) or source.sha256
        if known is not None and digest != known:
            raise FetchError(
                f"{source.name} has sha256 {digest}, expected {known}; it is not used. Fetch it again, "
                "or from another place: this one is damaged or another file"
            )
        recorded = self._records().get(role, {}).get("sha256")
        if known is None and recorded not in (None, digest):
            raise FetchError(
                f"{source.name} has sha256 {digest}, but an earlier fetch brought {recorded} ({self._origin()}); "
                f"it is not used. If it was changed on purpose, allow it with --sha256 {role}={digest}"
            )

    def _convert(self, role: Role, raw: Path, path: Path) -> None:
        if role == "teacher":
            write_atomically(path, lambda temporary: self._import_teacher(raw, temporary))
        elif role == "reference":
            from bdense_core.frechet import save_statistics, statistics_from_npz

            digest = self.entry.features.sha256 or sha256_of_file(self._path("features"))
            save_statistics(
                statistics_from_npz(raw, features=f"inception@{digest[:16]}", n_samples=self.entry.reference_images),
                path,
            )
        elif raw != path:
            write_atomically(path, lambda temporary: shutil.copyfile(raw, temporary))

    def _import_teacher(self, raw: Path, temporary: Path) -> None:
        from bdense_core.checkpoints import import_edm

        import_edm(raw, temporary)
        found = NetworkConfig.from_dict(read_metadata(str(temporary))["config"])
        for key in _SAME_NETWORK:
            if getattr(found, key) != getattr(self.entry.network, key):
                raise FetchError(
                    f"{raw} is another network than the teacher of {self.entry.name}: its {key} is "
                    f"{getattr(found, key)}, not {getattr(self.entry.network, key)}; fetch the right file"
                )

    def _origin(self) -> Path:
        return self.models / self.entry.name / "origin.json"

    def _records(self) -> dict[str, dict[str, Any]]:
        """What is known of files that came earlier, by role."""
        path = self._origin()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            files: dict[str, dict[str, Any]] = content["files"]
            if content["format"] != _FORMAT or not all(isinstance(record, dict) for record in files.values()):
                raise ValueError("another format")
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FetchError(f"{path} is damaged ({error}); delete it, and all is checked anew") from error
        return files

    def _note(self, role: Role, record: dict[str, Any]) -> None:
        files = self._records()
        if files.get(role) == record:
            return
        content = {"format": _FORMAT, "name": self.entry.name, "terms": self.entry.terms}
        write_text_atomically(self._origin(), json.dumps(content | {"files": files | {role: record}}, indent=2) + "\n")


def _pins(wanted: Entry, sha256: Mapping[str, str]) -> dict[str, str]:
    pins = {role: digest.strip().lower() for role, digest in sha256.items()}
    sources = {str(role): source for role, source in wanted.sources().items()}
    for role, digest in pins.items():
        if role not in sources:
            raise BadValue(f"there is no file {role!r} to give a sha256 for; known are {', '.join(sources)}")
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise BadValue(f"the sha256 of {role} is {digest!r}; give its 64 hexadecimal digits")
        if sources[role].sha256 not in (None, digest):
            raise BadValue(f"the sha256 of {role} is known to be {sources[role].sha256}; leave --sha256 {role} out")
    return pins


def _local_files(wanted: Entry, source: Path) -> dict[Role, Path]:
    """The published files in a folder by their original names, or the one file by its name or kind."""
    sources = wanted.sources()
    if source.is_dir():
        return {role: source / known.name for role, known in sources.items() if (source / known.name).is_file()}
    if not source.is_file():
        raise BadValue(f"{source} does not exist; name a folder with the published files, or the teacher's .pkl")
    for role, known in sources.items():
        if source.name == known.name or (role == "teacher" and source.suffix == ".pkl"):
            return {role: source}
    names = ", ".join(known.name for known in sources.values())
    raise BadValue(f"{source} is none of the files of {wanted.name}; these are {names}")
