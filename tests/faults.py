"""Kills what a running study stands on, lets a user run it to its end, and counts in the database what became of it.

    python -m tests.faults --runs 50

Each run is a study of its own, launched by the real command with a local Ray, all on one embedded PostgreSQL in a
home below /tmp. Its proposals are an even grid over one axis of a known function, so that the whole truth about it is
known beforehand: which trials must come, and each one's value. One fault strikes at a random moment, mostly between
the first trial and the last, now and then while the launch starts. If the launch ends with an error, the same command
is given again until it ends well. Then the tables are read by SQL of our own, not by the service's:

    lost      a grid point or a control without a COMPLETE row
    doubled   a COMPLETE row too many, or one that was never due
    zombie    a row that still runs or waits after the end
    differs   a value that is not the function's, another best trial (by SQL, or by `bdense-weights export`),
              or a row that was COMPLETE before the fault and is not the same any more
    stuck     a launch that did not end within minutes, or that ended badly each time
    struck    a run in which the fault left a trace: a second launch, a row that failed or was resumed, or a line about
              a lost trial or a database that does not answer. Only these say something about counting under faults;
              a fault that never does in several runs is itself a failure

Everything is drawn from --seed, though what a kill meets differs from time to time. Only processes of a launch's own
session are killed, and the PostgreSQL of this home.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import psutil
import psycopg2
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bdense_core.methods.synthetic import Synthetic
from bdense_core.task import Score, Task
from bdense_core.weights import Weights, endpoint_only, uniform
from search import server
from search.space import Slope
from search.study_file import studies_folder
from tests.e2e.conftest import Running, User, farewell, new_user
from tests.patience import PATIENCE_S

METHOD = Synthetic()
GRACE_S = 20
"""Counted from the database's start or a trial's last heartbeat: a few times what a busy machine needs for a report."""
OUTAGE_S = 20.0
"""How long PostgreSQL is kept away."""
_PARALLEL = 2
"""On any machine: how long a study goes on after a fault must not depend on its processors."""
_MOST_LAUNCHES = 5
_LAUNCH_WITHIN_S = 240
_SHARE_AT_START = 0.2
_STARTING_S = 6.0
_WORKERS = ("ray::TrialActor", "ray::ResourceTrainable")


@dataclass(frozen=True)
class Grid:
    """The study of a run: so many points along the slope, and the two controls.

    The points must be exact in binary, however they are computed: the function's noise depends on the last bit.
    """

    points: int = 8
    seconds: float = 1.2
    slopes: tuple[float, float] = (-0.5, 3.0)
    spared: int = 1
    """So many scores from the end on nothing strikes."""

    def options(self, *more: str) -> list[str]:
        """What the launch command gets beside the study's file and name; `more` are keys with values."""
        low, high = self.slopes
        keys = (
            f"space={{family: slope, a: [{low}, {high}]}}", "sampler.kind=grid", f"sampler.grid_points={self.points}",
            f"method.seconds={self.seconds}", "seeds.control_repeats=1", "pruner.kind=none", "lease.heartbeat_s=1",
            f"lease.grace_s={GRACE_S}", "lease.max_retries=5", f"budget.trials={self.points}",
            f"resources.max_parallel={_PARALLEL}", *more,
        )  # fmt: skip
        return ["--no-dashboard", *(part for key in keys for part in ("--set", key))]

    def truth(self) -> dict[str, float]:
        """Every proposal that must come, with its value."""
        low, high = self.slopes
        slopes = [low + (high - low) * i / (self.points - 1) for i in range(self.points)]
        space = Slope(a=self.slopes)
        weightings = {_proposal("search", a): space.weights({"a": a}, METHOD.num_branches) for a in slopes}
        weightings["control:endpoint_only"] = endpoint_only(METHOD.num_branches)
        weightings["control:uniform"] = uniform(METHOD.num_branches)
        return {proposal: value_of(weights) for proposal, weights in weightings.items()}

    @property
    def reports(self) -> int:
        """How many scores an undisturbed run prints."""
        return (self.points + 2) * round(METHOD.budget_kimg)


def value_of(weights: Weights, seed: int = 0) -> float:
    """The known function's value."""
    task = Task(weights=weights, seed=seed, every_kimg=1, teacher=None, evaluation=None, cache_root=None)
    *_, last = METHOD.run(task)
    assert isinstance(last, Score)
    return last.value


def _proposal(role: str, a: float | None) -> str:
    return f"a = {a:.9f}" if role == "search" and a is not None else role


# -- what strikes, and when


@dataclass(frozen=True)
class Moment:
    """After so many scores of the launch, and so many seconds more; after none: while it starts."""

    reports: int
    delay_s: float

    @classmethod
    def drawn(cls, chance: random.Random, grid: Grid) -> "Moment":
        if chance.random() < _SHARE_AT_START:
            return cls(0, chance.uniform(0, _STARTING_S))
        return cls(chance.randint(1, grid.reports - grid.spared), chance.uniform(0, 0.4))

    def wait(self, launch: Running) -> None:
        launch.wait_for(lambda lines: sum(" synthetic-score " in line for line in lines) >= self.reports)
        time.sleep(self.delay_s)


@dataclass(frozen=True)
class Scene:
    """What a fault may strike at: a launch, its user, and the chance that chooses."""

    user: User
    launch: Running
    chance: random.Random
    outage_s: float = OUTAGE_S

    def processes(self) -> list[psutil.Process]:
        """All processes of the launch's Ray: they stay in its session, even when it is gone."""
        return [process for process in psutil.process_iter() if self._is_of_launch(process)]

    def _is_of_launch(self, process: psutil.Process) -> bool:
        try:
            return os.getsid(process.pid) == self.launch.process.pid != process.pid
        except ProcessLookupError:
            return False

    def raylets(self) -> list[psutil.Process]:
        return [process for process in self.processes() if _title(process).split(" ")[0].endswith("/raylet")]

    def workers(self) -> list[psutil.Process]:
        """The processes of trials, named by Ray after what they do just now."""
        return [process for process in self.processes() if _title(process).startswith(_WORKERS)]

    def once(self, find: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
        """What `find` finds, as soon as it finds anything; nothing if the launch has ended before."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := find()) and self.launch.process.poll() is None:
            assert time.monotonic() < deadline, self.launch.lines
            time.sleep(0.05)
        return found


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL to all of them, and wait for their end."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(processes), timeout=30)


def _launcher(scene: Scene) -> None:
    scene.launch.process.kill()
    scene.launch.process.wait()


def _worker(scene: Scene) -> None:
    if workers := scene.once(scene.workers):
        kill([scene.chance.choice(workers)])


def _workers(scene: Scene) -> None:
    kill(scene.once(scene.workers))


def _raylet(scene: Scene) -> None:
    kill(scene.once(scene.raylets))


def _postgres(scene: Scene) -> None:
    home = scene.user.home
    with FileLock(home / "postgres.lock"):  # whoever would start it again waits for this
        postmaster = psutil.Process(int((home / "postgres/data/postmaster.pid").read_text().split()[0]))
        kill([postmaster, *postmaster.children(recursive=True)])
        time.sleep(scene.outage_s)


FAULTS: dict[str, Callable[[Scene], None]] = {
    "launcher": _launcher,
    "worker": _worker,
    "workers": _workers,
    "raylet": _raylet,
    "postgres": _postgres,
}
GRIDS = {"raylet": Grid(seconds=8.0, spared=16)}
"""Workers go on for some 15 s without their raylet: a study that ends meanwhile would not notice."""
_TRACES = ("LOST: ", " FAILED", "lost trial(s)", "the database does not answer")
"""What a launcher says when it has noticed."""


# -- what became of it


@dataclass(frozen=True)
class Trial:
    """A row of the database."""

    number: int
    state: str
    proposal: str
    value: float | None
    about: dict[str, Any]
    ended: str | None


_TRIALS = """
    SELECT t.number, t.state, v.value, p.param_value, t.datetime_complete,
           (SELECT json_object_agg(key, value_json::json) FROM trial_user_attributes u WHERE u.trial_id = t.trial_id)
    FROM trials t JOIN studies s ON s.study_id = t.study_id
    LEFT JOIN trial_values v ON v.trial_id = t.trial_id
    LEFT JOIN trial_params p ON p.trial_id = t.trial_id AND p.param_name = 'a'
    WHERE s.study_name = %s ORDER BY t.number, v.trial_value_id
"""


def read_trials(home: Path, study: str) -> list[Trial]:
    """A study's rows, one for each trial and value; the embedded server is started if it does not run."""
    connection = psycopg2.connect(server.ensure_running(home).replace("+psycopg2", "", 1))
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT to_regclass('trials') IS NOT NULL")
            if cursor.fetchone() == (False,):
                return []
            cursor.execute(_TRIALS, (study,))
            return [
                Trial(number, state, _proposal((about or {}).get("role", "search"), a), value, about or {}, str(ended))
                for number, state, value, a, ended, about in cursor.fetchall()
            ]
    finally:
        connection.close()


@dataclass(frozen=True)
class Counts:
    """What was counted after a run; sums of several are made by `+`."""

    runs: int = 1
    expected: int = 0
    found: int = 0
    lost: int = 0
    doubled: int = 0
    zombie: int = 0
    differs: int = 0
    stuck: int = 0
    struck: int = 0
    resumed: int = 0
    launches: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.zombie or self.differs or self.stuck)


@dataclass(frozen=True)
class Run:
    """One study, one fault."""

    study: str
    fault: str
    moment: Moment
    counts: Counts
    wrong: tuple[str, ...]
    """What differs, in words."""
    output: tuple[str, ...]
    """All that its launches said."""


def audit(
    rows: list[Trial], truth: dict[str, float], before: list[Trial], exported: dict[str, Any]
) -> tuple[Counts, tuple[str, ...]]:
    """The counts of an ended study, and what is wrong with its values in words."""
    complete = Counter(row.proposal for row in rows if row.state == "COMPLETE")
    counts = Counts(
        expected=len(truth),
        found=len(complete.keys() & truth.keys()),
        lost=len(truth.keys() - complete.keys()),
        doubled=sum(complete.values()) - len(complete.keys() & truth.keys()),
        zombie=sum(row.state in ("RUNNING", "WAITING") for row in rows),
        resumed=sum("resumed_from" in row.about for row in rows),
    )
    return counts, tuple(_differences(rows, truth, before, exported))


def left_a_trace(rows: list[Trial], output: Sequence[str]) -> bool:
    """Whether rows or the launchers' lines tell of a fault."""
    return any(row.state == "FAIL" or "resumed_from" in row.about for row in rows) or any(
        trace in line for line in output for trace in _TRACES
    )


def _differences(
    rows: list[Trial], truth: dict[str, float], before: list[Trial], exported: dict[str, Any]
) -> Iterator[str]:
    for row in rows:
        if row.state == "COMPLETE" and row.value != truth.get(row.proposal):
            yield f"trial {row.number} ({row.proposal}) is {row.value}, not {truth.get(row.proposal)}"
    for row in before:
        if row.state == "COMPLETE" and row not in rows:
            yield f"trial {row.number} was COMPLETE before the fault and has changed"
    best = min((name for name in truth if not name.startswith("control:")), key=truth.__getitem__)
    searched = [row for row in rows if row.state == "COMPLETE" and not row.proposal.startswith("control:")]
    found = min(searched, key=lambda row: (row.value is None, row.value), default=None)
    if found is None or found.proposal != best:
        yield f"the best by SQL is {found and found.proposal}, not {best}"
    elif (exported.get("trial"), exported.get("score", {}).get("value")) != (found.number, found.value):
        yield f"the export names trial {exported.get('trial')}, not {found.number}"


# -- a run


def run(
    user: User, study: str, fault: str, moment: Moment, chance: random.Random, *, grid: Grid, outage_s: float = OUTAGE_S
) -> Run:
    """One study with one fault, to its end, and its audit."""
    command = [str(studies_folder() / "synthetic.yaml"), "--study", study, *grid.options()]
    scene = Scene(user, user.start_launch(*command), chance, outage_s)
    scenes = [scene]
    try:
        moment.wait(scene.launch)
        before = read_trials(user.home, study) if moment.reports else []
        FAULTS[fault](scene)
        stuck, ended = 0, _ended_well(scene.launch)
        while not ended and len(scenes) < _MOST_LAUNCHES:
            stuck += ended is None
            scenes.append(Scene(user, user.start_launch(*command), chance))
            ended = _ended_well(scenes[-1].launch)
    finally:
        for each in scenes:  # what a killed launcher's Ray has left behind, if it is still there
            kill(each.processes())
    rows = read_trials(user.home, study)
    output = tuple(line.rstrip() for each in scenes for line in (f"--- {study}", *each.launch.lines))
    counts, wrong = audit(rows, grid.truth(), before, _exported(user, study))
    counts += Counts(
        runs=0, differs=int(bool(wrong)), stuck=stuck + (not ended), launches=len(scenes),
        struck=int(len(scenes) > 1 or left_a_trace(rows, output)),
    )  # fmt: skip
    return Run(study, fault, moment, counts, wrong, output)


def _ended_well(launch: Running) -> bool | None:
    """Whether it exited with 0; None if it did not end, and had to be killed."""
    try:
        return launch.wait(_LAUNCH_WITHIN_S) == 0
    except subprocess.TimeoutExpired:
        launch.process.kill()
        launch.process.wait()
        return None


def _exported(user: User, study: str) -> dict[str, Any]:
    done = user.weights("export", "--study", study)
    content: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return content


def table(runs: Sequence[Run]) -> Table:
    """What was counted, by fault and in all."""
    shown = Table("fault", *(field.name for field in fields(Counts)), title="counting under faults")
    by_fault = {fault: [run.counts for run in runs if run.fault == fault] for fault in FAULTS}
    for fault, counts in [*by_fault.items(), ("all", [run.counts for run in runs])]:
        if counts:
            total = sum(counts, Counts(runs=0))
            shown.add_row(fault, *(str(getattr(total, field.name)) for field in fields(Counts)))
    return shown


def never_struck(runs: Sequence[Run]) -> list[str]:
    """The faults that left no trace in any of several runs: nothing was tested with them."""
    made = Counter(run.fault for run in runs)
    struck = {run.fault for run in runs if run.counts.struck}
    return [fault for fault, count in made.items() if count > 1 and fault not in struck]


@click.command()
@click.option("--runs", default=50, show_default=True, type=click.IntRange(min=1), help="Studies; faults take turns.")
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--fault", type=click.Choice(list(FAULTS)), help="This one only.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), help="A file for all counts.")
def main(runs: int, seed: int, fault: str | None, file: Path | None) -> None:
    """Kill processes under running studies, and count lost, doubled and differing trials.

    Exit code 1 if there are any, or if a fault of several runs never struck.
    """
    console = Console(stderr=True)
    user, done = new_user(), list[Run]()
    try:
        server.ensure_running(user.home)
        with Progress(console=console) as progress:
            for index in progress.track(range(runs), description="studies"):
                chosen = fault or list(FAULTS)[index % len(FAULTS)]
                chance = random.Random(f"{seed}/{index}")
                grid = GRIDS.get(chosen, Grid())
                moment = Moment.drawn(chance, grid)
                done.append(run(user, f"run-{index + 1:03d}", chosen, moment, chance, grid=grid))
                _tell(done[-1], console)
                if file is not None:
                    file.write_text(json.dumps({"seed": seed, "runs": [asdict(each) for each in done]}, indent=1))
    finally:
        farewell(user)
    Console(width=120).print(table(done))
    idle = never_struck(done)
    for name in idle:
        console.print(f"{name} never struck: its runs say nothing")
    sys.exit(0 if all(each.counts.clean for each in done) and not idle else 1)


def _tell(done: Run, console: Console) -> None:
    counts = ", ".join(f"{key} {value}" for key, value in asdict(done.counts).items() if value and key != "runs")
    when = f"after {done.moment.reports} scores" if done.moment.reports else "while it starts"
    console.print(
        f"{done.study} {done.fault} {when} + {done.moment.delay_s:.1f} s: {counts}", highlight=False, soft_wrap=True
    )
    if not done.counts.clean:
        console.print(*done.wrong, *done.output, sep="\n", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
