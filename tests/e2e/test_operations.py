"""A study steered from outside while it runs, and what is said when somebody asks for what cannot be."""

import contextlib
import csv
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from search import cli, derived
from search.storage import Studies
from search.study_file import studies_folder
from tests.complaints import complains
from tests.patience import PATIENCE_S
from tests.studies import opened, run_all, run_one, synthetic

pytestmark = pytest.mark.e2e

SYNTHETIC = str(studies_folder() / "synthetic.yaml")
SLOW = (
    "--no-dashboard",
    "--set",
    "seeds.control_repeats=1",
    "--set",
    "method.seconds=2",
    "--set",
    "pruner.kind=none",
    "--set",
    "resources.max_parallel=2",
)


@dataclass
class Desk:
    """Somebody who asks about one study, in this process: each question takes milliseconds."""

    study: str
    url: str | None = None

    def ask(self, command: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        out, err = io.StringIO(), io.StringIO()
        chosen = ["--study", self.study, *(["--storage", self.url] if self.url else []), *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            cli.main([command, *chosen])
        code = end.value.code
        assert isinstance(code, int)
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    def does(self, command: str, *arguments: str) -> str:
        done = self.ask(command, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def status(self) -> dict[str, Any]:
        done = self.ask("status", "--format", "json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while not condition(found := self.status()):
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found


def are_known(trials: list[dict[str, Any]]) -> bool:
    return len(trials) > 0 and all(trial["node"] for trial in trials)


@pytest.fixture
def launcher(newcomer):
    """A launch of `steered`, ended in any case."""
    running = newcomer.start_launch(SYNTHETIC, "--study", "steered", "--trials", "6", *SLOW)
    yield running
    if running.process.poll() is None:
        running.interrupt()
        running.wait()


def test_a_running_study_is_watched_paused_edited_resumed_stopped_and_deleted(newcomer, launcher, monkeypatch) -> None:
    monkeypatch.setenv("BDENSE_HOME", str(newcomer.home))
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    desk = Desk("steered")
    launcher.wait_for(lambda lines: any("runs in process" in line for line in lines))

    found = desk.wait_for(lambda status: are_known(status["running"]))
    assert all(trial["lease_alive"] and trial["pid"] and trial["kimg"] >= 1 for trial in found["running"])
    assert {trial["launcher_pid"] for trial in found["running"]} == {launcher.process.pid}
    assert [who["pid"] for who in found["launchers"]] == [launcher.process.pid]
    complains(desk.ask("delete", "--yes"), 1, "of study 'steered' are running", "stop --study steered")

    assert "paused: nothing new starts" in desk.does("pause")
    assert "paused already" in desk.does("pause")
    launcher.wait_for(lambda lines: any("paused" in line for line in lines))
    started = {trial["number"] for trial in desk.status()["running"]}
    found = desk.wait_for(lambda status: not status["running"])
    records = json.loads(desk.does("trials", "--format", "json"))
    assert found["paused"] and found["counts"]["counted"] < 6
    assert started <= {record["number"] for record in records if record["state"] == "COMPLETE"}, "they ran to their end"
    assert "budget.trials: 6 -> 40, at once" in desk.does("set", "budget.trials=40")
    assert "time left: not while it is paused" in desk.does("status")
    assert "waits, as the study is paused" in desk.does("enqueue", "--a", "1.25", "--b", "-2")
    assert json.loads(desk.does("trials", "--format", "json"))[: len(records)] == records, "nothing starts meanwhile"

    assert "going on" in desk.does("resume")
    assert "was not paused" in desk.does("resume")
    desk.wait_for(lambda status: status["counts"]["counted"] > 6)
    desk.wait_for(lambda status: len(status["launchers"]) == 1)
    assert "runs with the next free place" in desk.does("enqueue", "--a", "0.5", "--b", "-1")

    desk.wait_for(lambda status: len(status["running"]) > 0)
    assert "1 launcher(s) ended" in desk.does("stop")
    assert launcher.wait() == 130
    counts = desk.status()["counts"]
    assert counts["running"] == 0 and 6 < counts["counted"] < 40
    assert "no trial of study steered is running" in desk.does("stop")

    table = newcomer.home.parent / "trials.csv"
    assert f"wrote {table}" in desk.does("trials", "--format", "csv", "--output", str(table))
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["number"]) for line in lines] == list(range(len(lines)))
    (own,) = [line for line in lines if line["enqueued"] == "true" and line["a"] == "1.25"]
    assert own["state"] == "COMPLETE" and float(own["b"]) == -2 and float(own["weight_3"]) > float(own["weight_0"])
    assert sum(line["role"] == "search" and line["state"] == "COMPLETE" for line in lines) == counts["counted"]

    assert f"deleted study steered: {len(lines)} trial(s)" in desk.does("delete", "--yes")
    assert not list(newcomer.home.glob("checkpoints/steered-*"))
    assert "steered" not in newcomer.weights("list").stdout
    complains(desk.ask("status"), 1, "no study 'steered'")


@pytest.fixture
def desk(database_url: str) -> Desk:
    """Somebody at a study with one ended trial and three that wait, which nobody runs."""
    run_one(opened(database_url, synthetic(name="still")))
    return Desk("still", database_url)


WRONG: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("enqueue", "--a", "99", "--b", "0"), ("a = 99", "[-1, 3]")),
    (("enqueue", "--a", "nan", "--b", "0"), ("a is 'nan'", "finite")),
    (("enqueue", "--a", "1"), ("searches a, b",)),
    (("set", "method.noise=1"), ("method.noise cannot be changed", "budget.trials")),
    (("set", "budget.trails=1"), ("unknown key budget.trails", "did you mean budget.trials?")),
    (("set", "lease.grace_s.x=1"), ("unknown key lease.grace_s.x",)),
    (("set", "budget.trials=many"), ("budget.trials", "'many'")),
    (("set", "lease.grace_s=3"), ("must exceed twice lease.heartbeat_s",)),
    (("set", "resources.cpus=.inf"), ("resources.cpus must be finite",)),
    (("set", "resources.gpus=1"), ("device",)),
    (("set", "budget.trials=20", "method.noise=1"), ("method.noise cannot be changed",)),
    (("set", "budget.trials"), ("set wants KEY=VALUE",)),
    (("set", "budget.trials=[1"), ("no valid YAML",)),
    (("trials", "--output", "trials.csv"), ("--format csv",)),
    (("delete",), ("no terminal", "--yes")),
]


def test_wrong_input_is_refused_in_one_line_and_changes_nothing(desk: Desk, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    before = desk.does("trials", "--format", "json"), desk.does("set")
    for command, words in WRONG:
        complains(desk.ask(*command), 2, *words)
    assert (desk.does("trials", "--format", "json"), desk.does("set")) == before


def test_an_unknown_study_is_told_with_those_that_are_known(desk: Desk) -> None:
    for command in ("status", "trials", "enqueue", "set", "pause", "resume", "stop", "delete"):
        complains(Desk("unknown", desk.url).ask(command), 1, "no study 'unknown'", "still")


def test_a_study_that_nobody_runs_says_so_and_can_be_steered_all_the_same(desk: Desk) -> None:
    text = desk.does("status")
    assert "0/12 trials, 1/2 controls, 0 running" in text and "launchers: none at work" in text
    assert "time left: not known yet" in text
    assert "runs with the next launch" in desk.does("enqueue", "--a", "1", "--b", "-1")
    assert '-> "mine", at once' in desk.does("set", "description=mine")
    assert 'description: "mine" already' in desk.does("set", "description=mine")
    assert "no trial of study still is running" in desk.does("stop")
    unwritable = desk.ask("trials", "--format", "csv", "--output", "/nowhere/trials.csv")
    complains(unwritable, 1, "there is no folder /nowhere")
    assert "deleted study still" in desk.does("delete", "--yes")


def test_a_comparison_counts_runs_and_takes_no_search(database_url: str) -> None:
    store = opened(database_url, synthetic("budget.trials=1", name="believed"))
    run_all(store)
    run_one(opened(database_url, derived.confirmation(Studies(store.database), "believed", top=1, seeds=2)))
    desk = Desk("believed.confirm", database_url)
    text = desk.does("status")
    assert "\n1/6 runs, 0 running, 5 waiting" in text and "0/0" not in text
    assert desk.status()["is_comparison"]
    known = desk.does("set")
    assert "lease.max_retries" in known and "budget.trials" not in known and "comparison" not in known
    before = desk.does("trials", "--format", "json"), known
    for command in (("set", "budget.trials=2"), ("enqueue", "--a", "1", "--b", "-1")):
        complains(desk.ask(*command), 2, "'believed.confirm' is a comparison, which searches nothing", "--seeds")
    assert (desk.does("trials", "--format", "json"), desk.does("set")) == before
    assert "lease.max_retries: 2 -> 5, at once" in desk.does("set", "lease.max_retries=5")


def test_a_whole_section_is_set_and_told_key_by_key(desk: Desk) -> None:
    told = desk.does("set", "lease={max_retries: 5, grace_s: 180}")
    assert "lease.max_retries: 2 -> 5, at once" in told and "lease.grace_s: 180 already" in told


def test_launchers_of_other_machines_are_told_apart_and_waited_for(database_url: str, desk: Desk) -> None:
    stores = [opened(database_url, synthetic(name="still"), owner=host) for host in ("north", "south")]
    claims = [store.trials.claim() for store in stores]
    assert [who["host"] for who in desk.status()["launchers"]] == ["north", "south"]
    assert "asked to stop: north (pid 1, 1 trial(s)), south" in desk.does("stop", "--no-wait")
    done = desk.ask("stop", "--timeout", "0")
    complains(done, 1, "still at work after 0 s: north", "south", "status --study still")
    for store, claim in zip(stores, claims, strict=True):
        assert claim is not None
        store.trials.give_back(claim.number)
    assert desk.status()["launchers"] == []


def test_looking_at_a_study_loads_neither_torch_nor_ray(desk: Desk) -> None:
    code = (
        "import sys\nfrom search import cli\n"
        "for command in ('status', 'trials', 'set', 'pause', 'resume'):\n"
        "    try:\n        cli.main([command, *sys.argv[1:]])\n"
        "    except SystemExit as end:\n        assert end.code == 0\n"
        "print(sorted({'torch', 'ray'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, "--study", desk.study, "--storage", str(desk.url)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_embedded_server_is_made_asked_and_stopped_by_commands(newcomer) -> None:
    def does(action: str) -> str:
        done = newcomer.weights("server", action)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "running: False" in does("status") and not newcomer.home.exists()
    assert "running" in does("start")
    assert f"running: True\ndata: {newcomer.home}" in does("status")
    psql = newcomer.run(
        f"{does('bin').strip()}/psql", does("url").strip(), "--tuples-only", "--command", "SELECT 6 * 7"
    )
    assert psql.stdout.split() == ["42"], psql.stderr
    assert "stopped" in does("stop") and "it was not running" in does("stop")
    assert (newcomer.home / "postgres" / "data").is_dir(), "its data stay"
