"""What runs next and what stops: Optuna's decisions carried to Ray, and Ray's news carried to the database."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from sqlalchemy.exc import SQLAlchemyError

from search.errors import LeaseLost, StorageError
from search.progress import Board
from search.records import Claim
from search.storage import StudyStore
from search.worker import payload

_ASK_AGAIN_S = 1.0
_REAP_EVERY_S = 5.0


@dataclass
class _Running:
    claim: Claim
    beat: float


class Conductor:
    """One launch of a study: which trials are ours, and what becomes of them."""

    def __init__(self, store: StudyStore, board: Board, *, slots: int, cache_root: Path, max_failures: int) -> None:
        self._store = store
        self._board = board
        self._slots = slots
        self._cache_root = cache_root
        self._max_failures = max_failures
        self._running: dict[str, _Running] = {}
        self._asked = 0.0
        self._reaped = 0.0
        self._failures = 0.0
        self.stop_requested = False
        self.fatal: str | None = None

    # -- asked by Ray

    def next(self, tune_id: str) -> dict[str, Any] | str | None:
        """The configuration of the next trial; None for "not now"; `Searcher.FINISHED` for "no more"."""
        if self.stopping():
            return str(Searcher.FINISHED)
        now = time.monotonic()
        if len(self._running) >= self._slots or now - self._asked < _ASK_AGAIN_S:
            return None
        claim = self._store.claim()
        if claim is None:
            self._asked = now
            return str(Searcher.FINISHED) if not self._running and self._store.is_done() else None
        self._running[tune_id] = _Running(claim, now)
        self._board.started(claim)
        study = self._store.study
        task = study.task(claim.weights, claim.seeds[0], cache_root=self._cache_root)
        return {
            "trial": payload(study.spec.method, task, claim.seeds),
            "threads": int(study.spec.resources.cpus),
        }

    def on_result(self, tune_id: str, result: dict[str, Any]) -> str:
        """Store what a worker reports; the answer is Ray Tune's CONTINUE or STOP."""
        running = self._running.get(tune_id)
        if running is None:
            return str(TrialScheduler.STOP)
        try:
            return self._store_result(tune_id, running, result)
        except LeaseLost as error:
            self._end(tune_id)
            self._board.note(str(error))
            return str(TrialScheduler.STOP)

    def _store_result(self, tune_id: str, running: _Running, result: dict[str, Any]) -> str:
        claim = running.claim
        if result["event"] == "failed":
            retry = result.get("retry", False)
            # A proposal that fails in each of its attempts counts once, whoever's fault it is: a full disk stays full.
            self._failures += 1 / (1 + self._store.study.spec.lease.max_retries) if retry else 1
            self._fail(tune_id, result["reason"], retry=retry, detail=result.get("detail"))
            return str(TrialScheduler.STOP)
        self._board.progressed(claim, result)
        if result["event"] == "progress":
            self._beat(running)
            return str(TrialScheduler.CONTINUE)
        step, value, done = int(result["kimg"]), float(result["value"]), bool(result["done"])
        if step not in claim.reported:
            may_prune = not done and not claim.is_control
            if self._store.report(claim.number, value, step, may_prune=may_prune):
                self._store.prune(claim.number)
                self._board.ended(claim, "PRUNED", value)
                self._end(tune_id)
                return str(TrialScheduler.STOP)
        if done:
            self._store.complete(claim.number, value, result["repeats"])
            self._board.ended(claim, "COMPLETE", value)
            self._end(tune_id)
            self._failures = 0.0
        return str(TrialScheduler.CONTINUE)

    def on_lost(self, tune_id: str, reason: str) -> None:
        """A trial ended without a result: its actor, its node or its memory is gone."""
        if tune_id in self._running and not self.stopping():  # while stopping it is given back with the others
            try:
                self._fail(tune_id, reason, retry=True)
            except LeaseLost as error:
                self._end(tune_id)
                self._board.note(str(error))

    def stopping(self) -> bool:
        return self.stop_requested or self.fatal is not None

    # -- asked by the launcher

    def tick(self, pending: set[str]) -> None:
        """Now and then: free trials that others lost, and keep ours alive that wait for a place on the cluster."""
        now = time.monotonic()
        for tune_id in pending & self._running.keys():
            with contextlib.suppress(LeaseLost):
                self._beat(self._running[tune_id])
        if now - self._reaped >= _REAP_EVERY_S:
            self._reaped = now
            if lost := self._store.reap():
                self._board.note(f"{lost} lost trial(s) put back into the queue")

    def give_back_all(self) -> int:
        """Put our unfinished trials back into the queue; how many there were."""
        claims = [running.claim for running in self._running.values()]
        self._running.clear()
        for claim in claims:
            with contextlib.suppress(SQLAlchemyError, StorageError):  # without a database its lease expires by itself
                self._store.give_back(claim.number)
        return len(claims)

    def _beat(self, running: _Running) -> None:
        now = time.monotonic()
        if now - running.beat >= self._store.study.spec.lease.heartbeat_s / 3:
            running.beat = now
            self._store.beat(running.claim.number)

    def _fail(self, tune_id: str, reason: str, *, retry: bool, detail: str | None = None) -> None:
        claim = self._running[tune_id].claim
        self._store.fail(claim.number, reason, retry=retry, detail=detail)
        self._end(tune_id)
        self._board.failed(claim, reason)
        if self._failures > self._max_failures - 1e-6:
            self.fatal = f"{self._max_failures} trials in a row failed in this launch, the last one: {reason}"

    def _end(self, tune_id: str) -> None:
        self._running.pop(tune_id, None)
        self._asked = 0.0


class _NotPickled:
    """Ray pickles searchers and schedulers into its folder; the conductor, with its database, stays out."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "_NotPickled":
        return self


class AskOptuna(_NotPickled, Searcher):
    """Ray Tune's question "what next?" put to the conductor."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__(metric=None, mode=None)
        self._conductor = conductor

    def suggest(self, trial_id: str) -> Any:
        return self._conductor.next(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The scheduler has told already."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the database is the only truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as for `save`."""


class CarryDecisions(_NotPickled, FIFOScheduler):
    """Ray Tune's news put to the conductor, and its decision carried back."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._conductor = conductor

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._conductor.on_result(trial.trial_id, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Ray hands the last result of a trial only here."""
        self._conductor.on_result(trial.trial_id, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._conductor.on_lost(trial.trial_id, f"its worker was lost: {_cause(trial)}")


def _cause(trial: Any) -> str:
    """What Ray says of a lost actor: the last line of its error file."""
    try:
        content = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
    except OSError:
        content = ""
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    return (lines[-1] if lines else "unknown cause")[:300]
