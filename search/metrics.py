"""What a launch counts, for Prometheus. Names and meanings: docs/operations.md."""

import contextlib
import time
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, start_http_server

from bdense_core.errors import BadValue
from search.listeners import Listener
from search.records import Claim, Row

HOST = "127.0.0.1"

disable_created_metrics()  # type: ignore[no-untyped-call]  # else each counter has a twin that tells its birth


class Metrics(Listener):
    """The counters and gauges of one launch, each with the label `study`. Kept always, served on demand."""

    def __init__(self, study: str) -> None:
        self.registry = CollectorRegistry()
        self._kimg_of: dict[int, float] = {}
        self._states: set[tuple[str, str]] = set()
        self._moved = time.monotonic()
        self._study = study
        self._trials = Gauge("bdense_trials", "Trials of the study", ["study", "state", "role"], registry=self.registry)
        self._best = Gauge("bdense_best_value", "Lowest final value", ["study"], registry=self.registry)
        self._running = self._gauge("bdense_running_trials", "Trials that this launcher runs now")
        self._paused = self._gauge("bdense_paused", "1 while the study is paused")
        self._away = self._gauge("bdense_database_away", "1 while the database does not answer")
        silence = self._gauge("bdense_seconds_since_progress", "Since a trial of this launcher got on")
        silence.set_function(lambda: time.monotonic() - self._moved)
        self._kimg = self._counter("bdense_kimg", "Thousands of images that this launcher's students have seen")
        self._reports = self._counter("bdense_reports", "Scores that came from workers")
        self._retries = self._counter("bdense_retries", "Failed trials that were queued again")
        self._failures = self._counter("bdense_failures", "Trials that failed")
        self._lost = self._counter("bdense_lost_leases", "Trials that somebody else took over")
        self._outages = self._counter("bdense_database_outages", "Times that the database stopped answering")
        self._outage_s = self._counter("bdense_database_outage_seconds", "How long outages took, once they are over")

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(name, meaning, ["study"], registry=self.registry).labels(self._study)

    def _counter(self, name: str, meaning: str) -> Counter:
        return Counter(name, meaning, ["study"], registry=self.registry).labels(self._study)

    @contextlib.contextmanager
    def served(self, port: int) -> Iterator[str]:
        """The address for Prometheus, while the block runs; port 0: any free one. On loopback only.

        Raises:
            BadValue: the port is taken.
        """
        try:
            server, thread = start_http_server(port, HOST, self.registry)
        except OSError as error:
            raise BadValue(
                f"--metrics-port {port}: cannot listen on {HOST}:{port} ({error.strerror}); choose another, or 0"
            ) from error
        try:
            yield f"http://{HOST}:{server.server_port}/metrics"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    # -- events

    def started(self, claim: Claim) -> None:
        self._kimg_of[claim.number] = 0.0
        self._count_running()

    def progressed(self, claim: Claim, result: dict[str, Any]) -> None:
        kimg, before = float(result["kimg"]), self._kimg_of.get(claim.number, 0.0)
        if result.get("resumed") is not None:
            before = float(result["resumed"])
        self._kimg.inc(kimg - before if kimg >= before else kimg)  # a further training seed begins anew
        self._kimg_of[claim.number] = kimg
        self._moved = time.monotonic()
        if result["event"] == "score":
            self._reports.inc()
        self._count_running()

    def ended(self, claim: Claim, state: str, value: float, *, violated: Sequence[str] = ()) -> None:
        self._gone(claim)

    def failed(self, claim: Claim, reason: str, *, retry: bool) -> None:
        self._failures.inc()
        if retry:
            self._retries.inc()
        self._gone(claim)

    def lost(self, claim: Claim, reason: str) -> None:
        self._lost.inc()
        self._gone(claim)

    def paused(self, is_paused: bool) -> None:
        self._paused.set(is_paused)

    def outage(self, seconds: float | None) -> None:
        if seconds is None:
            self._outages.inc()
        else:
            self._outage_s.inc(seconds)
        self._away.set(seconds is None)

    def refresh(self, rows: list[Row]) -> None:
        tally = Tally((row.state, row.role) for row in rows)
        self._states |= tally.keys()  # what has gone down to 0 is still shown
        for state, role in self._states:
            self._trials.labels(self._study, state, role).set(tally[state, role])
        ended = [row for row in rows if row.state == "COMPLETE" and not row.violated]
        finished = [row.value for row in ended if row.value is not None]
        if finished:
            self._best.labels(self._study).set(min(finished))

    def _gone(self, claim: Claim) -> None:
        self._kimg_of.pop(claim.number, None)
        self._count_running()

    def _count_running(self) -> None:
        self._running.set(len(self._kimg_of))
