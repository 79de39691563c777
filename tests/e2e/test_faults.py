"""A study under faults: what is lost, what goes on, what is written about it. `tests/faults.py` counts in long runs."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bdense_core.distill import distill
from bdense_core.task import Score
from search import server
from search.database import Database
from search.storage import Studies
from search.study_file import load_study, studies_folder
from tests import faults
from tests.e2e.conftest import Running, User
from tests.faults import FAULTS, Grid, Moment, Scene, Trial, read_trials
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.e2e

SYNTHETIC = str(studies_folder() / "synthetic.yaml")
DIGITS = studies_folder() / "digits.yaml"
GRID = Grid(points=2, seconds=1)
LONG = Grid(points=2, seconds=12)
"""After its first score there are 20 s to go: longer than workers live without their raylet."""
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.fixture(scope="module")
def user(new_user_of_module: User) -> User:
    """One home for all studies of this file; each launch has a local Ray of its own."""
    return new_user_of_module


def start(user: User, study: str, grid: Grid = GRID, *keys: str) -> Running:
    return user.start_launch(SYNTHETIC, "--study", study, *grid.options(*keys))


def scene(user: User, launch: Running) -> Scene:
    return Scene(user, launch, random.Random(0))


def says(launch: Running, *words: str) -> bool:
    return any(all(word in line for word in words) for line in launch.lines)


def wait_until_said(launch: Running, *words: str) -> None:
    launch.wait_for(lambda _lines: says(launch, *words))


def complete(rows: list[Trial]) -> dict[str, float | None]:
    """The value of each proposal that ended; no proposal may have ended twice."""
    ended = [row for row in rows if row.state == "COMPLETE"]
    assert max(Counter(row.proposal for row in ended).values()) == 1, ended
    return {row.proposal: row.value for row in ended}


def states(rows: list[Trial]) -> Counter[str]:
    return Counter(row.state for row in rows)


@pytest.mark.parametrize("fault", list(FAULTS))
def test_no_trial_is_lost_doubled_left_over_or_changed_whatever_is_killed(user, fault) -> None:
    grid, reports = (LONG, 1) if fault == "raylet" else (GRID, 3)
    moment = Moment(reports=reports, delay_s=0.1)
    done = faults.run(user, f"kill-{fault}", fault, moment, random.Random(1), grid=grid, outage_s=5)
    assert done.counts.clean, "\n".join([*done.wrong, *done.output])
    assert done.counts.found == 4
    if fault in ("launcher", "raylet"):  # Ray ends a launch whose raylet is gone
        assert (done.counts.struck, done.counts.launches) == (1, 2), "\n".join(done.output)
    assert not any("Traceback" in line for line in done.output), "\n".join(done.output)


def test_a_fault_that_left_no_trace_in_several_runs_is_told() -> None:
    def made(fault: str, struck: int) -> faults.Run:
        return faults.Run("s", fault, Moment(1, 0.0), faults.Counts(struck=struck), (), ())

    runs = [made("worker", 0), made("worker", 1), made("raylet", 0), made("raylet", 0), made("postgres", 0)]
    assert faults.never_struck(runs) == ["raylet"]


def test_a_frozen_workers_trial_is_taken_from_it_and_run_by_another(user) -> None:
    launch = start(user, "frozen-worker", Grid(points=2, seconds=3), "lease.grace_s=6")
    wait_until_said(launch, "kimg 1 ")
    frozen = scene(user, launch).workers()[0]
    frozen.suspend()
    assert launch.wait() == 0, launch.lines
    assert not psutil.pid_exists(frozen.pid)
    rows = read_trials(user.home, "frozen-worker")
    lost = [row for row in rows if row.state == "FAIL"]  # a busy machine may be slow to tell of the others too
    assert lost and all("its lease expired" in row.about["reason"] for row in lost)
    assert complete(rows) == Grid(points=2).truth()


def test_a_launcher_that_was_frozen_drops_its_late_results(user) -> None:
    grid = Grid(points=4, seconds=2, slopes=(0.0, 3.0))
    first = start(user, "frozen-launcher", grid, "lease.grace_s=4")
    wait_until_said(first, "kimg 2 ")
    first.process.send_signal(signal.SIGSTOP)
    taken = [row.number for row in read_trials(user.home, "frozen-launcher") if row.state == "RUNNING"]
    second = start(user, "frozen-launcher", grid, "lease.grace_s=4")
    wait_until_said(second, " COMPLETE ")
    first.process.send_signal(signal.SIGCONT)
    assert (second.wait(), first.wait()) == (0, 0), [*second.lines, *first.lines]
    for number in taken:
        assert any(says(first, f"trial {number} ", why) for why in ("no longer owned", "lost its lease")), first.lines
    rows = read_trials(user.home, "frozen-launcher")
    assert {row.state for row in rows if row.number in taken} == {"FAIL"}
    assert complete(rows) == grid.truth()
    assert set(states(rows)) == {"COMPLETE", "FAIL"}


def test_controls_and_what_people_queued_run_once_each_although_the_launcher_is_killed(user) -> None:
    grid = Grid(points=4, seconds=1.5)
    first = start(user, "queued", grid, "sampler.kind=random")
    wait_until_said(first, "trial 0 ", "started")
    queued = Studies(Database(server.ensure_running(user.home))).open("queued")
    for a in (0.125, 1.125):
        queued.enqueue({"a": a})  # not by the command: four searched trials would have begun before it has
    wait_until_said(first, " search kimg 1 ")
    first.process.kill()
    first.wait()
    assert start(user, "queued", grid, "sampler.kind=random").wait() == 0
    rows = read_trials(user.home, "queued")
    ended = complete(rows)
    assert {"control:endpoint_only", "control:uniform", "a = 0.125000000", "a = 1.125000000"} < ended.keys()
    assert len(ended) == 2 + 4 and set(states(rows)) <= {"COMPLETE", "FAIL"}
    faults.kill(scene(user, first).processes())


@pytest.fixture
def full_disk(user: User) -> Iterator[Path]:
    """A disk without a free byte."""
    folder = user.home.parent / "full"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("only root may mount a small disk")
    with contextlib.suppress(OSError), (folder / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_for_checkpoints_costs_the_checkpoints_alone_and_is_noted(user, full_disk) -> None:
    launch = start(user, "full-disk", Grid(points=2, seconds=0.5), f"checkpoints.url={full_disk}")
    assert launch.wait() == 0, launch.lines
    rows = read_trials(user.home, "full-disk")
    assert complete(rows) == Grid(points=2).truth() and set(states(rows)) == {"COMPLETE"}
    for row in rows:
        assert any("No space left on device" in note for note in row.about["notes"]), row
    assert says(launch, "No space left on device")


@contextlib.contextmanager
def little_memory(mebibytes: int) -> Iterator[Path | None]:
    """A group of processes that the kernel kills when they want more memory; None where no such can be made."""
    group = MEMORY_GROUPS / f"bdense-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(mebibytes << 20))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        while members := (group / "cgroup.procs").read_text().split():
            for member in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(member), signal.SIGKILL)
            time.sleep(0.05)
        group.rmdir()


@contextlib.contextmanager
def greedy_neighbour(group: Path) -> Iterator[None]:
    """A process in the group that wants more than there is.

    Alone, the worker could live for minutes in little memory, reading its libraries' pages over and over.
    """
    wants = "import sys; sys.stdin.read(1); b'1' * (1 << 30)"
    with subprocess.Popen((sys.executable, "-c", wants), stdin=subprocess.PIPE) as process:
        try:
            (group / "cgroup.procs").write_text(str(process.pid))
            process.communicate(b"1", timeout=PATIENCE_S)
            yield
        finally:
            process.kill()


def run_out_of_memory(worker: psutil.Process) -> None:
    """Let the kernel kill the worker for its memory, or do as the kernel would."""
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(little_memory(32))
        if group is None:
            worker.kill()
        else:
            (group / "cgroup.procs").write_text(str(worker.pid))
            stack.enter_context(greedy_neighbour(group))
        deadline = time.monotonic() + PATIENCE_S
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "the kernel let it live"
            time.sleep(0.05)


def truncate_state(folder: Path) -> None:
    for snapshot in folder.glob("snapshot-*.safetensors"):
        os.truncate(snapshot, snapshot.stat().st_size // 2)


def test_a_worker_that_the_kernel_kills_for_its_memory_costs_one_retry(user) -> None:
    launch = start(user, "out-of-memory")
    run_out_of_memory(scene(user, launch).once(scene(user, launch).workers)[0])
    assert launch.wait() == 0, launch.lines
    rows = read_trials(user.home, "out-of-memory")
    assert complete(rows) == GRID.truth()
    (failed,) = [row for row in rows if row.state == "FAIL"]
    assert "its worker was lost" in failed.about["reason"]


@pytest.mark.long
def test_a_distillation_keeps_its_value_through_full_memory_a_truncated_state_and_an_interrupt(user) -> None:
    keys = ("method.budget_kimg=2", "evaluation.n_samples=100", "seeds.control_repeats=1", "resources.max_parallel=1",
            "checkpoints.every_s=0", "budget.trials=0")  # fmt: skip
    options = [part for key in keys for part in ("--set", key)]
    command = (str(DIGITS), "--study", "distilled", "--no-dashboard", *options)
    first = user.start_launch(*command)
    here = scene(user, first)
    (worker,) = here.once(here.workers)
    run_out_of_memory(worker)  # importing torch does it
    wait_until_said(first, "control:endpoint_only FAILED")

    wait_until_said(first, "control:uniform kimg 1 ")
    (worker,) = here.workers()
    worker.suspend()
    (kept,) = (user.home / "checkpoints").glob("distilled-*")
    truncate_state(kept / "trial-00001")
    worker.kill()

    wait_until_said(first, "control:paper kimg 1 ")
    first.interrupt()
    assert first.wait() == 130, first.lines
    assert {row.state for row in read_trials(user.home, "distilled")} == {"WAITING", "FAIL"}
    assert list((kept / "trial-00002").glob("snapshot-*"))
    assert user.launch(*command).returncode == 0

    rows = read_trials(user.home, "distilled")
    failed = {row.proposal: row.about["reason"] for row in rows if row.state == "FAIL"}
    assert failed.keys() == {"control:endpoint_only", "control:uniform"}
    assert all("its worker was lost" in reason for reason in failed.values())
    ended = {row.proposal: row.about for row in rows if row.state == "COMPLETE"}
    assert any("is damaged; looking for an older one" in note for note in ended["control:uniform"]["notes"])
    assert ended["control:paper"]["resumed_from"] >= 1
    assert complete(rows) == undisturbed(user, keys)
    assert not list(kept.glob("trial-*")), "the state of trials that have ended is removed"


def undisturbed(user: User, keys: tuple[str, ...]) -> dict[str, float]:
    """The controls' values, each from one run in this process with as many threads as a worker has."""
    import torch

    study = load_study(DIGITS, overrides=keys, models=user.home / "models")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    values = {}
    for name, arm in study.controls().items():
        *_, last = distill(study.spec.method, study.task(arm.weights, 0, cache_root=user.home / "cache"))
        assert isinstance(last, Score)
        values[f"control:{name}"] = last.value
    torch.set_num_threads(threads)
    return values
