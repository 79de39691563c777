"""Live progress on stderr: a display on a terminal, log lines elsewhere."""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bdense_core.task import Event, Progress, Score
from search import logs
from search.labels import settings_text
from search.listeners import Listener
from search.records import Claim, Counts, Row

_log = logging.getLogger(__name__)

AnyEvent = TypeVar("AnyEvent", bound=Event)
_LINE_EVERY_S = 10.0
"""Seconds between two lines of a run that is not watched on a terminal."""


@dataclass
class _Line:
    """A trial that this launcher runs."""

    claim: Claim
    started: float = field(default_factory=time.monotonic)
    phase: str = "starting"
    kimg: float = 0.0
    done: float = 0.0
    begun_at: float | None = None
    """How much was done at the first sign of life: not nothing where a trial goes on."""
    value: float | None = None
    node: str | None = None
    pid: int | None = None


class Board:
    """What happens in a launch, for whoever watches: a display on a terminal, log lines, and whatever listens."""

    def __init__(
        self,
        *,
        study: str,
        metric: str,
        trials: int,
        controls: int,
        control_runs: int,
        slots: int,
        trial_runs: int = 1,
        is_comparison: bool = False,
        listeners: Sequence[Listener] = (),
        console: Console | None = None,
    ) -> None:
        """
        Args:
            control_runs: training runs of one control, one for each of its seeds.
            trial_runs: the same of a searched trial.
            is_comparison: nothing is searched, and no single run is the best one.
        """
        self._study, self._metric, self._is_comparison = study, metric, is_comparison
        self._trials, self._trial_runs, self._slots = trials, trial_runs, slots
        self._controls, self._control_runs = controls, control_runs
        self._listeners = tuple(listeners)
        self._console = console or Console(stderr=True)
        self._lines: dict[int, _Line] = {}
        self._counted = self._controls_done = 0
        self._running: dict[int, float] = {}
        """All that run, here or elsewhere: how many training runs of each are behind it."""
        self._best: tuple[float, str] | None = None
        self._durations: list[float] = []
        self._is_paused = self._database_away = False
        self._start = time.monotonic()
        self._lock = (
            threading.RLock()
        )  # never held while a line is logged: the display holds its own, and asks for this
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not logs.as_json():
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def refresh(self, rows: list[Row], counts: Counts, *, trials: int | None = None, slots: int | None = None) -> None:
        """Take over what is stored: other launchers work on the same study, and its total may have changed."""
        with self._lock:
            self._counted, self._controls_done = counts.counted, counts.controls_done
            self._trials = self._trials if trials is None else trials
            self._slots = self._slots if slots is None else slots
            self._running = {
                row.number: row.progress.get("fraction", 0.0) * len(row.seeds) for row in rows if row.state == "RUNNING"
            }
            ended = [row for row in rows if row.state in ("COMPLETE", "PRUNED")]
            self._durations = [row.duration_s / max(1, len(row.seeds)) for row in ended if row.duration_s]
            self._best = None
            for row in ended:
                if row.state == "COMPLETE" and row.value is not None and not row.violated:
                    self._consider(row.value, f"trial {row.number} ({row.role})")
        for listener in self._listeners:
            listener.refresh(rows)

    # -- events

    def started(self, claim: Claim) -> None:
        with self._lock:
            self._lines[claim.number] = _Line(claim)
        for listener in self._listeners:
            listener.started(claim)
        settings = f", {settings_text(claim.settings)}" if claim.settings else ""
        about = {"weights": list(claim.weights), "settings": claim.settings}
        self._follow("started", f"started, shares {_shares(claim)}{settings}", claim, **about)

    def progressed(self, claim: Claim, result: dict[str, Any]) -> None:
        """A worker's event: `event`, `kimg`, `fraction`, and where it has them `phase`, `value`, `node`, `pid`,
        `note` (one line for people) and `resumed` (the kimg that it goes on from)."""
        with self._lock:
            line = self._lines.setdefault(claim.number, _Line(claim))
            moved = (line.node, line.pid) != (result.get("node"), result.get("pid"))
            next_seed = line.phase != result.get("phase") and str(result.get("phase")).startswith("seed ")
            line.node, line.pid = result.get("node"), result.get("pid")
            line.kimg, line.done = float(result["kimg"]), float(result["fraction"])
            line.begun_at = line.done if line.begun_at is None else line.begun_at
            line.phase = result.get("phase") or "scored"
            line.value = result.get("value", line.value)
        for listener in self._listeners:
            listener.progressed(claim, result)
        if moved:
            self._follow("placed", f"runs in process {line.pid}", claim, pid=line.pid)
        if (kimg := result.get("resumed")) is not None:
            self._tell("resumed", f"going on from {kimg:g} kimg", claim, kimg=kimg)
        if note := result.get("note"):
            self._tell("note", str(note), claim, level=logging.WARNING)
        if next_seed:
            self._follow("phase", line.phase, claim, phase=line.phase)
        if result["event"] == "score":
            self._score(claim, result, time.monotonic() - line.started)

    def _score(self, claim: Claim, result: dict[str, Any], seconds: float) -> None:
        kimg, value, seed = result["kimg"], result["value"], claim.seeds[0]
        text = f"kimg {kimg:g} {self._metric} {value:.4g} seed {seed} {seconds:.0f} s"
        values = {"kimg": kimg, "metric": self._metric, "value": value, "seed": seed, "seconds": round(seconds, 1)}
        self._follow("score", text, claim, **values)

    def ended(self, claim: Claim, state: str, value: float, *, violated: Sequence[str] = ()) -> None:
        """The trial ended well; one that misses constraints of the study is never the best."""
        with self._lock:
            line = self._lines.pop(claim.number, None)
            self._running.pop(claim.number, None)
            if not claim.is_search:
                self._controls_done += 1
            else:
                self._counted += 1
            if state == "COMPLETE" and not violated:
                self._consider(value, f"trial {claim.number} ({claim.role})")
            if line:
                self._durations.append((time.monotonic() - line.started) / len(claim.seeds))
            best = [] if self._is_comparison else [f"best {self._best_text()}"]
            misses = f", which misses {', '.join(violated)}" if violated else ""
            text = (
                f"{state} {self._metric} {value:.4g}{misses} | {', '.join([self._how_far(), *best, self._time_left()])}"
            )
        for listener in self._listeners:
            listener.ended(claim, state, value, violated=violated)
        self._tell("ended", text, claim, line=line, state=state, metric=self._metric, value=value)

    def failed(self, claim: Claim, reason: str, *, retry: bool = False) -> None:
        """The trial failed; with `retry` it waits in the queue again."""
        line = self._drop(claim)
        for listener in self._listeners:
            listener.failed(claim, reason, retry=retry)
        text = f"FAILED: {reason}" + ("; it is queued again" if retry else "")
        self._tell("failed", text, claim, line=line, level=logging.ERROR, reason=reason, retry=retry)

    def lost(self, claim: Claim, reason: str) -> None:
        """The trial is no longer ours; whatever its worker still sends is dropped."""
        line = self._drop(claim)
        for listener in self._listeners:
            listener.lost(claim, reason)
        self._tell("lost", f"LOST: {reason}", claim, line=line, level=logging.WARNING, reason=reason)

    def paused(self, is_paused: bool) -> None:
        """Whether the study is paused; only a change is told."""
        if is_paused == self._is_paused:
            return
        self._is_paused = is_paused
        for listener in self._listeners:
            listener.paused(is_paused)
        how = f"paused; `bdense-weights resume --study {self._study}` goes on"
        self._tell("paused" if is_paused else "unpaused", how if is_paused else "going on after the pause")

    def outage(self, seconds: float | None = None) -> None:
        """The database does not answer; with `seconds` it answers again after so long. Only a change is told."""
        if (seconds is None) == self._database_away:
            return
        self._database_away = seconds is None
        for listener in self._listeners:
            listener.outage(seconds)
        if seconds is None:
            self._tell("outage", "the database does not answer; waiting for it", level=logging.WARNING)
        else:
            text = f"the database answers again, after {clock(seconds)}"
            self._tell("outage_over", text, seconds=round(seconds, 1))

    def note(self, text: str) -> None:
        self._tell("note", text)

    # -- telling

    def _follow(self, event: str, text: str, claim: Claim, **values: Any) -> None:
        """Told where no display shows it already."""
        if self._live is None:
            self._tell(event, text, claim, **values)

    def _tell(
        self,
        event: str,
        text: str,
        claim: Claim | None = None,
        *,
        line: _Line | None = None,
        level: int = logging.INFO,
        **values: Any,
    ) -> None:
        """One log record; `line` where the trial has left the board already."""
        about: dict[str, Any] = {"event": event, "study": self._study}
        if claim is not None:
            line = line or self._lines.get(claim.number)
            text = f"trial {claim.number} {claim.role} {text}"
            about |= {"trial": claim.number, "role": claim.role}
            if line and line.node:
                about["node"] = line.node
        _log.log(level, "%s", text, extra=about | values)

    def _drop(self, claim: Claim) -> _Line | None:
        with self._lock:
            self._running.pop(claim.number, None)
            return self._lines.pop(claim.number, None)

    def _how_far(self) -> str:
        if self._is_comparison:
            return f"{self._controls_done}/{self._controls} runs"
        return f"{self._counted}/{self._trials} trials, {self._controls_done}/{self._controls} controls"

    def _consider(self, value: float, name: str) -> None:
        if self._best is None or value < self._best[0]:
            self._best = (value, name)

    def _best_text(self) -> str:
        return "none yet" if self._best is None else f"{self._best[0]:.4g} by {self._best[1]}"

    def _time_left(self) -> str:
        """From the mean duration of ended runs; before the first one, from how fast the running ones are."""
        now = time.monotonic()
        trials_left, controls_left = max(0, self._trials - self._counted), max(0, self._controls - self._controls_done)
        runs_left = trials_left * self._trial_runs + controls_left * self._control_runs
        if runs_left == 0:
            return "done"
        lines = [(line, len(line.claim.seeds)) for line in self._lines.values()]
        known = [
            (now - line.started) / ((line.done - line.begun_at) * runs)
            for line, runs in lines
            if line.begun_at is not None and line.done - line.begun_at > 0.1
        ]
        durations = self._durations or known
        if not durations:
            return "time left not known yet"
        behind = sum((self._running | {line.claim.number: line.done * runs for line, runs in lines}).values())
        # others' slots show by what they run; the runs of one trial come one after another
        at_once = max(1, min(max(self._slots, len(self._running)), trials_left + controls_left))
        seconds = max(0.0, runs_left - behind) * sum(durations) / len(durations) / at_once
        return f"about {clock(seconds)} left"

    # -- drawing

    def _render(self) -> RenderableType:
        with self._lock:
            total = self._trials + self._controls
            done = self._counted + self._controls_done
            bar = ProgressBar(total=max(total, 1), completed=done, width=min(60, self._console.width))
            best = Text.assemble(f"best {self._metric} ", (self._best_text(), "bold green"))
            return Group(bar, self._head(), *([] if self._is_comparison else [best]), self._table())

    def _head(self) -> Text:
        head = Text.assemble(
            (self._how_far(), "bold"),
            f"; {clock(time.monotonic() - self._start)} elapsed, {self._time_left()}",
        )
        if elsewhere := len(self._running - self._lines.keys()):
            head.append(f"; {elsewhere} run by other launchers")
        if self._is_paused:
            head.append("; PAUSED", style="bold yellow")
        if self._database_away:
            head.append("; NO DATABASE", style="bold red")
        return head

    def _table(self) -> Table:
        several = len({line.node for line in self._lines.values() if line.node}) > 1
        table = Table(box=None, pad_edge=False, header_style="dim")
        words = ("role", *(["node"] if several else []), "phase")  # these are cut where the terminal is narrow
        for column in ("trial", *words, "kimg", self._metric, ""):
            table.add_column(column, no_wrap=column not in words)
        for number, line in sorted(self._lines.items()):
            value = "" if line.value is None else f"{line.value:.4g}"
            bar = ProgressBar(total=1.0, completed=line.done, width=12)
            said = (line.claim.role, *([line.node or ""] if several else []), line.phase)
            cut = (Text(text, no_wrap=True, overflow="ellipsis") for text in said)
            table.add_row(str(number), *cut, f"{line.kimg:.1f}", value, bar)
        return table


class Meter:
    """How a single run gets on: a bar on a terminal, a line now and then elsewhere. A context.

    Args:
        metric: what the scores are called.
        images: that the whole run sees.
        resumes: whether there is a state to go on from.
    """

    def __init__(self, metric: str, *, images: float, resumes: bool = False, console: Console | None = None) -> None:
        self._metric, self._images, self._resumes = metric, images, resumes
        self._console = console or Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>4.0f} %"))
        self._bars = Bars(*columns, TimeRemainingColumn(), console=self._console, transient=True)
        self._bar = self._bars.add_task("starting", total=1.0)
        self._begin: tuple[float, float] | None = None
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def watch(self, events: Generator[AnyEvent, None, Any]) -> Iterator[AnyEvent]:
        """The same events, told to the person as they pass. The first Ctrl-C closes the run, which keeps its state.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
        """
        with _interrupts() as asked:
            for event in events:
                if isinstance(event, Score):
                    self._say(f"{self._metric} {event.value:.4g} at {event.kimg} kimg")
                else:
                    self._show(event)
                yield event
                if asked:
                    events.close()
                    self._say(f"stopped at {event.kimg:g} kimg; the same command goes on from there")
                    raise KeyboardInterrupt

    def count(self, images: Generator[int, None, float]) -> float:
        """The result of a generator that yields how many images it has seen."""
        while True:
            try:
                seen = next(images)
            except StopIteration as end:
                return float(end.value)
            self._show(Progress(kimg=seen / 1000, done=seen / self._images, phase="evaluation"))

    def _show(self, event: Progress) -> None:
        now = time.monotonic()
        if self._begin is None:
            self._begin = (now, event.kimg)
            if self._resumes and event.done < 1:
                self._say(f"going on from {event.kimg:g} kimg")
        since, kimg = self._begin
        rate = (event.kimg - kimg) * 1000 / max(now - since, 1e-9)
        loss = "" if event.loss is None else f", loss {event.loss:.4g}"
        text = f"{event.kimg:.1f} kimg ({event.phase}){loss}, {rate:.0f} images/s"
        self._bars.update(self._bar, completed=event.done, description=text)
        if not self._console.is_terminal and now - self._said > _LINE_EVERY_S and rate > 0:
            self._said = now
            self._say(f"{text}, about {clock((1 - event.done) * self._images / rate)} left")

    def _say(self, text: str) -> None:
        self._console.print(Text(text))


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that a first Ctrl-C puts something into; a second one interrupts as usual."""
    asked: list[int] = []

    def ask(number: int, _frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


class Downloads:
    """Bars of the files that are being fetched, on a terminal. A context."""

    def __init__(self, console: Console | None = None) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bars = Bars(*columns, TimeRemainingColumn(), console=console or Console(stderr=True), transient=True)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._bars.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def progress(self, file: str, here: int, total: int | None) -> None:
        """So many bytes of a file are here, of a total that may not be known."""
        if file not in self._tasks:
            self._tasks[file] = self._bars.add_task(file, total=total)
        self._bars.update(self._tasks[file], completed=here, total=total)


def _shares(claim: Claim) -> str:
    total = sum(claim.weights)
    return " ".join(f"{weight / total:.2f}" for weight in claim.weights)


def clock(seconds: float) -> str:
    """A duration for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
