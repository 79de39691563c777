"""Who owns a lease: one process, told apart from every other on any machine, in any container, at any time."""

import hashlib
import os
import socket
from functools import cache
from pathlib import Path

import psutil

_TOLERANCE_S = 10.0
"""Where a process's start is derived from the boot time, it moves when the clock is corrected."""


def this_process() -> str:
    """This process as an owner, such as `host|3f2a91c0|4711|t93120`."""
    started = _ticks(os.getpid()) or str(int(psutil.Process().create_time()))
    return "|".join([socket.gethostname(), _system(), str(os.getpid()), started])


def is_dead_here(owner: str) -> bool:
    """Whether the owner was a process of this very system that no longer runs. False where we cannot know."""
    try:
        _, system, pid, started = owner.split("|")
        return system == _system() and not _runs(int(pid), started)
    except (ValueError, psutil.Error):
        return False


def _runs(pid: int, started: str) -> bool:
    """Whether that process runs, and not another one that got its number later."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if started.startswith("t"):
            return started == (_ticks(pid) or started)
        return abs(process.create_time() - int(started)) <= _TOLERANCE_S
    except psutil.ZombieProcess:
        return False
    except psutil.NoSuchProcess:
        return _answers(pid)


def host_and_pid(owner: str) -> tuple[str, int]:
    """The machine and the process of an owner, for people."""
    host, _, pid, _ = owner.split("|")
    return host, int(pid)


def _ticks(pid: int) -> str | None:
    """When a process began, in ticks since the boot: nobody sets that clock. None where the system tells none."""
    try:
        stat = Path(getattr(psutil, "PROCFS_PATH", "/proc"), str(pid), "stat").read_text()
    except OSError:
        return None
    return "t" + stat.rpartition(")")[2].split()[19]  # the name before it may hold anything


def _answers(pid: int) -> bool:
    """Whether there is such a process, also one of another user that /proc hides (mounted with hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@cache
def _system() -> str:
    """The space that process numbers belong to: this host, this boot, this container."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [
        socket.gethostname(),
        boot.read_text().strip() if boot.exists() else "",
        str(namespace.stat().st_ino) if namespace.exists() else "",
    ]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:12]
