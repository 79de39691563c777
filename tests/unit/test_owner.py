"""Processes told apart."""

import subprocess
import sys

from search import owner


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


def test_a_corrected_clock_does_not_kill_and_a_reused_number_does_not_revive() -> None:
    host, system, pid, started = owner.this_process().split("|")
    assert not owner.is_dead_here("|".join([host, system, pid, str(int(started) - 5)]))
    assert owner.is_dead_here("|".join([host, system, pid, str(int(started) - 500)]))


def test_owners_elsewhere_and_unreadable_ones_are_left_alone() -> None:
    assert not owner.is_dead_here("localhost|another-boot|1|1")
    assert not owner.is_dead_here("nonsense")
