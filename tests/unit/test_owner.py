"""Processes told apart."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from search import owner

SOMEBODY, NOBODY = 65533, 65534
SHOWS_NOTHING = "/nowhere"
"""In place of /proc: mounted with hidepid=2 it does not show the processes of others."""


def test_a_living_process_is_not_dead_and_an_ended_one_is() -> None:
    code = "import sys; from search import owner; print(owner.this_process(), flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    name = child.stdout.readline().strip()
    assert not owner.is_dead_here(name)
    child.stdin.close()
    child.wait()
    child.stdout.close()
    assert owner.is_dead_here(name)


def test_a_set_clock_does_not_kill_and_a_reused_number_does_not_revive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a /proc, a start is told in ticks since the boot; elsewhere small corrections are borne."""
    name = owner.this_process()
    host, system, pid, _ = name.split("|")
    now = psutil.Process().create_time()
    assert owner.is_dead_here("|".join([host, system, pid, "t1"]))
    assert not owner.is_dead_here("|".join([host, system, pid, str(int(now) - 5)]))
    assert owner.is_dead_here("|".join([host, system, pid, str(int(now) - 500)]))
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: now + 3600)  # as after `date -s`
    assert owner.this_process() == name and not owner.is_dead_here(name)


def test_owners_elsewhere_and_unreadable_ones_are_left_alone() -> None:
    assert not owner.is_dead_here("localhost|another-boot|1|1")
    assert not owner.is_dead_here("nonsense")


@contextlib.contextmanager
def process_of_another_user() -> Iterator[str]:
    """One that we may send no signal to, as an owner."""
    if os.geteuid() != 0:
        yield owner_with(1)
        return
    child = subprocess.Popen(["sleep", "600"], user=NOBODY)
    name = owner_with(child.pid)
    os.seteuid(SOMEBODY)
    try:
        yield name
    finally:
        os.seteuid(0)
        child.kill()
        child.wait()


def owner_with(pid: int) -> str:
    host, system, _, started = owner.this_process().split("|")
    return "|".join([host, system, str(pid), started])


def test_a_hidden_process_of_another_user_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    with process_of_another_user() as name:
        monkeypatch.setattr(psutil, "PROCFS_PATH", SHOWS_NOTHING)
        with pytest.raises(PermissionError):
            os.kill(owner.host_and_pid(name)[1], 0)
        assert not owner.is_dead_here(name)


def test_an_ended_process_is_dead_where_proc_hides_some(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    name = owner_with(child.pid)
    monkeypatch.setattr(psutil, "PROCFS_PATH", SHOWS_NOTHING)
    assert owner.is_dead_here(name)
