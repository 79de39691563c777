"""From the launch's events to a tracker's runs, in a thread of its own: a launch waits for no tracker."""

import contextlib
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

from bdense_core.weights import shares
from search.errors import UnlikeProtocols
from search.listeners import Listener
from search.logs import say
from search.noise import noise_floor
from search.records import Claim, Row
from search.settings import mask
from search.trackers.runs import Param, Run, Tracked, Tracker

_SPARE, _MOST = 1_000, 20_000
"""Events that wait for a tracker: beyond the first, losses are left out; beyond the second, it is switched off."""
_DATABASE = re.compile(r"\bpostgres\w*(\+\w+)?://\S*")


class Feed(Listener):
    """One tracker behind a queue. One that fails is switched off with a warning, and the launch goes on."""

    def __init__(self, name: str, tracker: Tracker, study: Tracked) -> None:
        self._name, self._tracker, self._study = name, tracker, study
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._is_off = self._leaves_out = False
        self._open: dict[int, int] = {}
        """Of each trial that runs: how many images its student has seen."""
        self._rows: list[Row] = []
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Nothing more comes."""
        self._queue.put(None)

    def wait(self, deadline: float) -> None:
        """Until all is sent, or the monotonic clock says so."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn("does not take what is left in time; the rest is not sent")

    # -- events, in the launcher's thread

    def started(self, claim: Claim) -> None:
        self._put(partial(self._begin, claim))

    def progressed(self, claim: Claim, result: dict[str, Any]) -> None:
        for images, values in measured(self._study.metric, result):
            self._put(partial(self._log, claim.number, images, values), is_spare=result["event"] == "progress")

    def ended(self, claim: Claim, state: str, value: float, *, violated: Sequence[str] = ()) -> None:
        misses = {"misses": " ".join(violated)} if violated else {}
        self._put(partial(self._end, claim.number, state, misses, value))

    def failed(self, claim: Claim, reason: str, *, retry: bool) -> None:
        about = {"reason": cleaned(reason), "retried": str(retry).lower()}
        self._put(partial(self._end, claim.number, "FAIL", about))

    def lost(self, claim: Claim, reason: str) -> None:
        self._put(partial(self._end, claim.number, "LOST", {"reason": cleaned(reason)}))

    def refresh(self, rows: list[Row]) -> None:
        self._rows = rows

    def _put(self, action: Callable[[], None], *, is_spare: bool = False) -> None:
        behind = self._queue.qsize()
        if self._is_off or (is_spare and behind >= _SPARE):
            if not self._is_off and not self._leaves_out:
                self._leaves_out = True
                self._warn(f"is {behind} events behind; some losses are left out")
        elif behind >= _MOST:
            self._is_off = True
            self._warn(f"is {behind} events behind: it is switched off, and the launch goes on")
        else:
            self._queue.put(action)

    # -- within the tracker's thread

    def _work(self) -> None:
        while (action := self._queue.get()) is not None:
            if not self._is_off:
                self._try(action)
        if not self._is_off:
            self._try(self._leave)
        if self._is_off:
            with contextlib.suppress(Exception):  # it has been told of already
                self._tracker.close()

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever it is, no trial is lost for it
            self._is_off = True
            self._warn(f"is switched off, and the launch goes on: {one_line(error)}")

    def _begin(self, claim: Claim) -> None:
        self._open[claim.number] = 0
        self._tracker.begin(run_of(self._study, claim))

    def _log(self, number: int, images: int, values: Mapping[str, float]) -> None:
        self._open[number] = max(self._open[number], images)
        self._tracker.log(number, images, values)

    def _end(self, number: int, state: str, about: Mapping[str, str], value: float | None = None) -> None:
        images = self._open.pop(number)
        if value is not None:
            self._tracker.log(number, images, {"value": value})
        self._tracker.end(number, state, {"state": state, **about, **self._noise()})

    def _noise(self) -> dict[str, str]:
        """What one run's score means, where the controls have told it."""
        with contextlib.suppress(UnlikeProtocols):
            if (floor := noise_floor(self._rows)) is not None:
                return {"noise_sd": f"{floor.sd:.4g}"}
        return {}

    def _leave(self) -> None:
        """Trials that were given back keep their run, and whoever goes on with them goes on in it."""
        for number in sorted(self._open):
            self._end(number, "WAITING", {})
        self._tracker.close()

    def _warn(self, text: str) -> None:
        say(f"warning: tracker {self._name} {text}", level=logging.WARNING)


def run_of(study: Tracked, claim: Claim) -> Run:
    """The run of a trial that this launcher begins."""
    params: dict[str, Param] = {**claim.settings, **claim.params}
    params |= {f"share_{index}": round(share, 6) for index, share in enumerate(shares(claim.weights))}
    tags = {**study.about, "role": claim.role, "seeds": " ".join(map(str, claim.seeds))}
    if claim.rule != "fixed":
        tags["rule"] = claim.rule
    if claim.origin != claim.number:
        tags["retry_of"] = f"{study.name}/trial-{claim.origin}"
    return Run(
        number=claim.number,
        name=f"{study.name}/trial-{claim.number}",
        key=f"{study.key}-{claim.number}",
        params=params,
        tags=tags,
    )


def measured(metric: str, result: dict[str, Any]) -> Iterator[tuple[int, dict[str, float]]]:
    """The finite numbers of a worker's event, each with how many images its student had seen."""
    images = round(1000 * result["kimg"])
    if result["event"] == "progress":
        phase = str(result.get("phase"))
        seed = f"{phase.replace(' ', '-')}/" if phase.startswith("seed ") else ""  # it counts its images anew
        found = [(images, {f"{seed}loss": result.get("loss")})]
    else:
        again = {f"evaluation-{index}/{metric}": value for index, value in enumerate(result["evaluations"], start=1)}
        values = {metric: result["value"], "surrogate": result["surrogate"], **dict(result["metrics"]), **again}
        found = [(images, values)]
        found += [(round(1000 * kimg), {f"seed-{seed}/{metric}": value}) for seed, kimg, value in result["repeats"]]
    for at, numbers in found:
        finite = {name: float(value) for name, value in numbers.items() if value is not None and math.isfinite(value)}
        if finite:
            yield at, finite


def cleaned(text: str) -> str:
    """A reason for everybody to read: no address of the database, no password."""
    return re.sub(r"\S*(?:://|=)\S*", lambda word: mask(word[0]), _DATABASE.sub("***", text))


def one_line(error: Exception) -> str:
    """What went wrong in a tracker."""
    first = (str(error).strip().splitlines() or [""])[0]
    return cleaned(f"{type(error).__name__}: {first}")
