"""Live progress on stderr: a display on a terminal, plain lines elsewhere."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
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
from search.records import Claim, Counts, Row

AnyEvent = TypeVar("AnyEvent", bound=Event)
_LINE_EVERY_S = 10.0
"""Seconds between two lines of a run that is not watched on a terminal."""


@dataclass
class _Line:
    claim: Claim
    started: float = field(default_factory=time.monotonic)
    phase: str = "starting"
    kimg: float = 0.0
    done: float = 0.0
    value: float | None = None


class Board:
    """What happens in a launch, for the person who watches."""

    def __init__(
        self, *, metric: str, trials: int, controls: int, control_runs: int, slots: int, console: Console | None = None
    ) -> None:
        """`control_runs`: training runs of one control, one for each of its seeds."""
        self._control_runs = control_runs
        self._console = console or Console(stderr=True)
        self._metric = metric
        self._trials, self._controls, self._slots = trials, controls, slots
        self._lines: dict[int, _Line] = {}
        self._counted = self._controls_done = 0
        self._best: tuple[float, str] | None = None
        self._durations: list[float] = []
        self._start = time.monotonic()
        self._lock = threading.RLock()
        self._live: Live | None = None

    def resume(self, rows: list[Row], counts: Counts) -> None:
        """Begin from what is stored."""
        self._counted, self._controls_done = counts.counted, counts.controls_done
        self._durations = [
            row.duration_s / max(1, len(row.seeds)) for row in rows if row.state == "COMPLETE" and row.duration_s
        ]
        for row in rows:
            if row.state == "COMPLETE" and row.value is not None:
                self._consider(row.value, f"trial {row.number} ({row.role})")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    # -- events

    def started(self, claim: Claim) -> None:
        with self._lock:
            self._lines[claim.number] = _Line(claim)
        if self._live is None:
            self._say(f"trial {claim.number} {claim.role} started, shares {_shares(claim)}")

    def progressed(self, claim: Claim, result: dict[str, Any]) -> None:
        with self._lock:
            line = self._lines.setdefault(claim.number, _Line(claim))
            line.kimg, line.done = float(result["kimg"]), float(result["fraction"])
            line.phase = result.get("phase") or "scored"
            line.value = result.get("value", line.value)
        if self._live is None and result["event"] == "score":
            self._say(
                f"trial {claim.number} {claim.role} kimg {result['kimg']:g} {self._metric} {result['value']:.4g}"
                f" seed {claim.seeds[0]} {time.monotonic() - line.started:.0f} s"
            )

    def ended(self, claim: Claim, state: str, value: float) -> None:
        with self._lock:
            line = self._lines.pop(claim.number, None)
            if claim.is_control:
                self._controls_done += 1
            else:
                self._counted += 1
            if state == "COMPLETE":
                self._consider(value, f"trial {claim.number} ({claim.role})")
                if line:
                    self._durations.append((time.monotonic() - line.started) / len(claim.seeds))
            left = self._time_left()
        self._say(
            f"trial {claim.number} {claim.role} {state} {self._metric} {value:.4g} | "
            f"{self._counted}/{self._trials} trials, {self._controls_done}/{self._controls} controls, "
            f"best {self._best_text()}, {left}"
        )

    def failed(self, claim: Claim, reason: str) -> None:
        with self._lock:
            self._lines.pop(claim.number, None)
        self._say(f"trial {claim.number} {claim.role} FAILED: {reason}")

    def note(self, text: str) -> None:
        self._say(text)

    # -- drawing

    def _say(self, text: str) -> None:
        if self._live is not None:
            self._console.print(Text(text, style="dim"))
        else:
            print(text, file=sys.stderr, flush=True)

    def _consider(self, value: float, name: str) -> None:
        if self._best is None or value < self._best[0]:
            self._best = (value, name)

    def _best_text(self) -> str:
        return "none yet" if self._best is None else f"{self._best[0]:.4g} by {self._best[1]}"

    def _time_left(self) -> str:
        """From the mean duration of finished runs; before the first one, from how far the running ones are."""
        now = time.monotonic()
        controls_left = self._controls - self._controls_done
        runs_left = (self._trials - self._counted) + controls_left * self._control_runs
        if runs_left <= 0:
            return "done"
        lines = [(line, len(line.claim.seeds)) for line in self._lines.values()]
        known = [(now - line.started) / (line.done * runs) for line, runs in lines if line.done > 0.1]
        durations = self._durations or known
        if not durations:
            return "time left not known yet"
        behind = sum(min(line.done, 1.0) * runs for line, runs in lines)
        seconds = max(0.0, runs_left - behind) * sum(durations) / len(durations) / min(self._slots, runs_left)
        return f"about {_clock(seconds)} left"

    def _render(self) -> RenderableType:
        with self._lock:
            total = self._trials + self._controls
            done = self._counted + self._controls_done
            head = Text.assemble(
                (f"{self._counted}/{self._trials} trials", "bold"),
                f", {self._controls_done}/{self._controls} controls; ",
                f"{_clock(time.monotonic() - self._start)} elapsed, {self._time_left()}",
            )
            best = Text.assemble(f"best {self._metric} ", (self._best_text(), "bold green"))
            table = Table(box=None, pad_edge=False, header_style="dim")
            for column in ("trial", "role", "phase", "kimg", self._metric, ""):
                table.add_column(column, no_wrap=True)
            for number, line in sorted(self._lines.items()):
                value = "" if line.value is None else f"{line.value:.4g}"
                bar = ProgressBar(total=1.0, completed=line.done, width=16)
                row = (str(number), line.claim.role, line.phase, f"{line.kimg:.1f}", value, bar)
                table.add_row(*row)
            bar = ProgressBar(total=max(total, 1), completed=done, width=min(60, self._console.width))
            return Group(bar, head, best, table)


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
            self._say(f"{text}, about {_clock((1 - event.done) * self._images / rate)} left")

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


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
