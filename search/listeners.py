"""Who is told what happens in a launch: one stream of events, for counters and for trackers alike."""

from collections.abc import Sequence
from typing import Any

from search.records import Claim, Row


class Listener:
    """Is told every event by `progress.Board`, in the launcher's own thread: a method returns in microseconds.

    Whoever listens overrides what concerns it; here nothing is done.
    """

    def started(self, claim: Claim) -> None:
        """This launcher begins a trial, or goes on with one."""

    def progressed(self, claim: Claim, result: dict[str, Any]) -> None:
        """A worker's event, as `worker.run_trial` yields them, but for its failure."""

    def ended(self, claim: Claim, state: str, value: float, *, violated: Sequence[str] = ()) -> None:
        """The trial ended well, COMPLETE or PRUNED, with the value that is stored.

        Args:
            violated: the study's constraints that it misses, by the figures' names.
        """

    def failed(self, claim: Claim, reason: str, *, retry: bool) -> None:
        """The trial failed; with `retry` another one, which goes on from it, waits in the queue."""

    def lost(self, claim: Claim, reason: str) -> None:
        """The trial belongs to somebody else now."""

    def paused(self, is_paused: bool) -> None:
        """The study is paused, or goes on after a pause."""

    def outage(self, seconds: float | None) -> None:
        """The database stopped answering (None), or answers again after so long."""

    def refresh(self, rows: list[Row]) -> None:
        """The whole study, as the database holds it now."""
