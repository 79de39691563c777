"""What runs next and what stops: Optuna's decisions carried to Ray, and Ray's news carried to the database."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from sqlalchemy.exc import SQLAlchemyError

from bdense_core.errors import BDenseError
from bdense_core.methods.base import with_settings
from search.checkpoints import Checkpoints, Sweeper
from search.errors import LeaseLost, StorageError
from search.nodes import NodeCheck
from search.placement import Places
from search.progress import Board
from search.records import Claim, count
from search.spec import mutable_values
from search.storage import StudyStore
from search.version import versions
from search.worker import payload

_ASK_AGAIN_S = 1.0
_FOLLOW_EVERY_S = 2.0
_REAP_EVERY_S = 5.0
_SWEEP_EVERY_S = 60.0
_START_WITHIN_S = 900.0
_LOOK_FOR_NODES_EVERY_S = 10.0
_OF_THE_LAST_SCORE = ("repeats", "evaluations", "samples", "shares_learned")
"""What is kept of a trial's end beside its value."""

T = TypeVar("T")
_Next = dict[str, Any] | str | None


@dataclass
class _Running:
    claim: Claim
    begun: float
    beat: float
    notes: list[str] = field(default_factory=list)
    surrogate: dict[str, float] = field(default_factory=dict)
    pace: tuple[float, float] | None = None
    """The time and the kimg of its first event: what its rate is counted from."""


class Conductor:
    """One launch of a study: which trials are ours, and what becomes of them."""

    def __init__(
        self,
        store: StudyStore,
        board: Board,
        places: Places,
        nodes: NodeCheck | None = None,
        *,
        cache_root: Path,
        checkpoints: Checkpoints | None,
        stop_seen: str = "",
    ) -> None:
        """
        Args:
            nodes: asks the nodes of a cluster that join while the study runs.
            stop_seen: the order to stop as it was when this launch began.
        """
        self._store = store
        self._trials = store.trials
        self._board = board
        self._places = places
        self._nodes = nodes
        self._cache_root = cache_root
        self._checkpoints = checkpoints
        self._sweeper = Sweeper(checkpoints, store.key, store.done_with) if checkpoints else None
        self._threads = int(store.study.spec.resources.cpus)  # as the places of this launch are, whatever is edited
        self._running: dict[str, _Running] = {}
        self._asked = 0.0
        self._failures = 0.0
        self._paused = False
        self._stop_seen = stop_seen
        self.stop_requested = False
        self.fatal: str | None = None
        self._chores = [
            every(_FOLLOW_EVERY_S, self._follow),
            every(_REAP_EVERY_S, self._reap),
            every(_SWEEP_EVERY_S, self._sweep),
            every(_LOOK_FOR_NODES_EVERY_S, self._ask_new_nodes),
        ]

    # -- asked by Ray

    def next(self, tune_id: str) -> _Next:
        """The configuration of the next trial; None for "not now"; `Searcher.FINISHED` for "no more"."""
        self.tick()  # with no trial at all Ray Tune asks this alone, for minutes
        finished: _Next = str(Searcher.FINISHED)
        if self.stopping():
            return finished
        if self._paused and not self._running:
            return self._or_end(self._idle, finished)
        if self._paused or time.monotonic() - self._asked < _ASK_AGAIN_S or not self._places.left(len(self._running)):
            return None
        return self._or_end(lambda: self._next(tune_id), finished)

    def _idle(self) -> _Next:
        """Nothing of ours runs, and nothing is to start now: leave the places to others, and end if all is done."""
        self._places.release_idle()
        return str(Searcher.FINISHED) if self._store.is_done() else None

    def _next(self, tune_id: str) -> _Next:
        claim = self._trials.claim()
        if claim is None:
            self._asked = time.monotonic()
            return None if self._running else self._idle()
        self._running[tune_id] = _Running(claim, time.monotonic(), time.monotonic())
        self._board.started(claim)
        study = self._store.study
        task = study.task(
            claim.weights, claim.seeds[0], cache_root=self._cache_root, schedule=claim.schedule, rule=claim.rule,
            is_search=claim.is_search,
        )  # fmt: skip
        method = with_settings(study.spec.method, claim.settings)
        location = self._checkpoints.location(self._store.key, claim.origin) if self._checkpoints else None
        return {
            "trial": payload(method, task, claim.seeds, checkpoint=location, versions=versions()),
            "threads": self._threads,
        }

    def on_result(self, tune_id: str, result: dict[str, Any]) -> str:
        """Store what a worker reports; the answer is Ray Tune's CONTINUE or STOP."""
        running = self._running.get(tune_id)
        if running is None:
            return str(TrialScheduler.STOP)
        try:
            return self._or_end(lambda: self._store_result(tune_id, running, result), str(TrialScheduler.STOP))
        except LeaseLost as error:
            self._lost(tune_id, str(error))
            return str(TrialScheduler.STOP)

    def _store_result(self, tune_id: str, running: _Running, result: dict[str, Any]) -> str:
        claim = running.claim
        if result["event"] == "unlike":  # no fault of the trial's, which is given back with the others
            self.fatal = result["reason"]
            return str(TrialScheduler.STOP)
        if result["event"] == "failed":
            retry = result.get("retry", False)
            self._fail(tune_id, result["reason"], retry=retry, detail=result.get("detail"))
            return str(TrialScheduler.STOP)
        about = self._about(running, result)
        if result["event"] == "score" and not result["done"] and int(result["kimg"]) in claim.reported:
            self._beat(running, about)  # said again by a run that goes on from its checkpoint
            return str(TrialScheduler.CONTINUE)
        self._board.progressed(claim, result)
        if result["event"] == "progress":
            self._beat(running, about)
            return str(TrialScheduler.CONTINUE)
        step, value, done = int(result["kimg"]), float(result["value"]), bool(result["done"])
        if step not in claim.reported:
            may_prune = not done and claim.is_search
            if self._trials.report(claim.number, value, step, may_prune=may_prune, **about):
                self._trials.prune(claim.number, value)
                self._board.ended(claim, "PRUNED", value)
                self._end(tune_id)
                self._failures = 0.0
                return str(TrialScheduler.STOP)
        if done:
            self._complete(tune_id, claim, result, about)
        return str(TrialScheduler.CONTINUE)

    def _complete(self, tune_id: str, claim: Claim, result: dict[str, Any], about: dict[str, Any]) -> None:
        about |= {key: result[key] for key in _OF_THE_LAST_SCORE if result.get(key)}
        if metrics := dict(result["metrics"]):
            about["metrics"] = metrics
        value = self._mean_over_seeds(claim, float(result["value"]), result["repeats"])
        self._trials.complete(claim.number, value, **about)
        self._board.ended(claim, "COMPLETE", value, violated=self._store.study.violations(metrics))
        self._end(tune_id)
        self._failures = 0.0

    def _mean_over_seeds(self, claim: Claim, value: float, repeats: list[list[float]]) -> float:
        """Of the seeds that every trial of the study runs on; a control has further ones."""
        last = max((kimg for _, kimg, _ in repeats), default=0)
        compared = set(claim.seeds[1 : len(self._store.study.trial_seeds())])
        return mean([value, *(score for seed, kimg, score in repeats if kimg == last and seed in compared)])

    def _about(self, running: _Running, result: dict[str, Any]) -> dict[str, Any]:
        """What is kept of a worker's event beside its value."""
        now, kimg = time.monotonic(), float(result["kimg"])
        if running.pace is None or kimg < running.pace[1]:  # a further training seed begins anew
            running.pace = now, kimg
        since, begin = running.pace
        progress = {key: result.get(key) for key in ("node", "pid", "kimg", "fraction", "phase", "loss")}
        progress["kimg_per_s"] = round((kimg - begin) / (now - since), 6) if kimg > begin else None
        about: dict[str, Any] = {"progress": progress}
        if result.get("surrogate") is not None:
            running.surrogate[str(result["kimg"])] = result["surrogate"]
            about["surrogate"] = running.surrogate
        if result.get("resumed") is not None:
            about["resumed_from"] = result["resumed"]
        if note := result.get("note"):
            running.notes.append(str(note))
            about["notes"] = running.notes
        return about

    def on_lost(self, tune_id: str, reason: str) -> None:
        """A trial ended without a result: its actor, its node or its memory is gone."""
        if tune_id in self._running and not self.stopping():  # while stopping it is given back with the others
            try:
                self._or_end(lambda: self._fail(tune_id, reason, retry=True), None)
            except LeaseLost as error:
                self._lost(tune_id, str(error))

    def stopping(self) -> bool:
        return self.stop_requested or self.fatal is not None

    # -- asked by the launcher

    def tick(self) -> None:
        """Now and then: follow orders, free trials that others lost, keep ours alive that wait for a place."""
        if self.stopping():
            return
        self._or_end(self._beat_for_those_that_wait, None)
        for chore in self._chores:
            if not self.stopping():
                self._or_end(chore, None)

    def _beat_for_those_that_wait(self) -> None:
        """For a place as long as it takes; for a process that starts, a while: many at once, on a slow disk."""
        late = time.monotonic() - _START_WITHIN_S
        starting = {key for key in self._places.starting() & self._running.keys() if self._running[key].begun > late}
        for tune_id in starting | (self._places.waiting() & self._running.keys()):
            try:
                self._beat(self._running[tune_id], {})
            except LeaseLost as error:
                self._kill(tune_id, str(error))

    def _follow(self) -> None:
        before = mutable_values(self._store.study)
        orders = self._store.follow()
        for key, value in mutable_values(self._store.study).items():
            if value != before.get(key):
                self._board.note(f"{key}: {before.get(key)} -> {value}, as set")
        if orders.stop != self._stop_seen:
            self._board.note("stopping, as asked by `bdense-weights stop`: running trials go back into the queue")
            self.stop_requested = True
        if orders.paused != self._paused:
            self._paused = orders.paused
            self._board.paused(orders.paused)

    def _reap(self) -> None:
        reaped = self._trials.reap()
        if reaped.lost:
            self._board.note(f"{reaped.lost} lost trial(s) put back into the queue")
        for tune_id in [key for key, running in self._running.items() if running.claim.number in reaped.ours]:
            self._kill(tune_id, "it lost its lease; its worker is stopped")
        rows = self._store.rows()
        self._board.refresh(
            rows,
            count(rows),
            trials=self._store.study.spec.budget.trials,
            slots=self._places.total(),
        )

    def _ask_new_nodes(self) -> None:
        for warning in self._nodes.run() if self._nodes else ():
            self._board.note(warning)

    def _sweep(self) -> None:
        if self._sweeper is not None:
            self._sweeper.step()

    def hurry(self) -> None:
        """Wait for no database any more."""
        self._store.database.hurry.set()

    def give_back_all(self) -> int:
        """Put our unfinished trials back into the queue; how many there were."""
        claims = [running.claim for running in self._running.values()]
        self._running.clear()
        for claim in claims:
            with contextlib.suppress(StorageError, SQLAlchemyError):  # without a database its lease expires by itself
                self._trials.give_back(claim.number)
        with contextlib.suppress(StorageError, SQLAlchemyError):
            self._sweep_at_the_end()
        return len(claims)

    def _sweep_at_the_end(self) -> None:
        """Whoever wants the launch to end waits for no storage: the next launch sweeps what this one leaves."""
        if self._sweeper is None:
            return
        if self.stopping() or self._store.database.hurry.is_set():
            self._sweeper.step()
        else:
            self._sweeper.finish()

    # -- within

    def _beat(self, running: _Running, about: dict[str, Any]) -> None:
        now = time.monotonic()
        is_due = now - running.beat >= self._store.study.spec.lease.heartbeat_s / 3
        if is_due or about.keys() & {"notes", "resumed_from"}:  # these come once
            running.beat = now
            self._trials.beat(running.claim.number, **about)

    def _fail(self, tune_id: str, reason: str, *, retry: bool, detail: str | None = None) -> None:
        claim, spec = self._running[tune_id].claim, self._store.study.spec
        again = self._trials.fail(claim.number, reason, retry=retry, detail=detail)
        self._end(tune_id)
        self._board.failed(claim, reason, retry=again)
        # A proposal that fails in each of its attempts counts once, whoever's fault it is: a full disk stays full.
        self._failures += 1 / (1 + spec.lease.max_retries) if retry else 1
        if self._failures > spec.budget.max_failures - 1e-6:
            self.fatal = f"{spec.budget.max_failures} trials in a row failed in this launch, the last one: {reason}"

    def _kill(self, tune_id: str, reason: str) -> None:
        """Stop a trial that is not ours any more: its worker is frozen, or works for nothing."""
        self._places.kill(tune_id)
        self._lost(tune_id, reason)

    def _lost(self, tune_id: str, reason: str) -> None:
        claim = self._running[tune_id].claim
        self._end(tune_id)
        self._board.lost(claim, reason)

    def _end(self, tune_id: str) -> None:
        self._running.pop(tune_id, None)
        self._asked = 0.0

    def _or_end(self, action: Callable[[], T], otherwise: T) -> T:
        """The action's result. A database that stays away, a node of other code and the like end the launch."""
        try:
            return action()
        except LeaseLost:
            raise
        except BDenseError as error:
            self.fatal = str(error)
            self.hurry()
            return otherwise


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

    def __init__(self, conductor: Conductor, places: Places) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._conductor = conductor
        self._places = places

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        self._places.attach(tune_controller)
        return self._places.next_to_start()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._conductor.on_result(trial.trial_id, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Ray hands the last result of a trial only here."""
        self._conductor.on_result(trial.trial_id, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._conductor.on_lost(trial.trial_id, f"its worker was lost: {_cause(trial)}")


def every(seconds: float, action: Callable[[], object], *, at_most: float = 1.0) -> Callable[[], None]:
    """A callable that runs `action` at most once in so many seconds, and for `at_most` such a share of the time.

    What the first time takes longer, such as imports, does not count.
    """
    due = cost = 0.0

    def now_and_then() -> None:
        nonlocal due, cost
        begin = time.monotonic()
        if begin >= due:
            action()
            end = time.monotonic()
            before, cost = cost, end - begin
            due = end + max(seconds, min(before, cost) / at_most)

    return now_and_then


def _cause(trial: Any) -> str:
    """What Ray says of a lost actor: the last line of its error file."""
    try:
        content = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
    except OSError:
        content = ""
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    return (lines[-1] if lines else "unknown cause")[:300]
