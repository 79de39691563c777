"""Ray: where trials run. Starts a local Ray or joins a cluster, and places one actor per trial.

What Ray Tune does not offer is reached through its controller, and only here: see `Places`.
"""

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its types leave it out
from ray.air._internal import usage as air_usage
from ray.exceptions import AuthenticationError, RayError
from ray.train.constants import _get_ray_train_session_dir
from ray.tune.error import TuneError
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from search.errors import ClusterError
from search.room import Room
from search.sections import ResourcesSection
from search.worker import run_trial

# For statistics of use, which are off, Ray Tune imports every tracker that is installed.
air_usage.tag_callbacks = lambda callbacks: False

STOP_WITHIN_S = 30
"""How long an interrupted worker may take for its step and its checkpoint before it is killed."""

_ASK_NODES_EVERY_S = 3.0
_ANSWER_WITHIN_S = 5.0
_LOST_AFTER_S = 15.0
_RELEASE_WITHIN_S = 1.0
_MOST_TRIALS = 400
"""Ray Tune's memory of trials is cut to about this many."""


class TrialActor(tune.Trainable):
    """A Ray actor that runs one trial after the other."""

    def setup(self, config: dict[str, Any]) -> None:
        _use_threads(int(config.get("threads", 1)))
        self._results = run_trial(config["trial"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        with contextlib.suppress(Exception):  # the trial that was stopped has ended; the next one is not to blame
            self._results.close()
        self._results = run_trial(new_config["trial"])
        return True

    def step(self) -> dict[str, Any]:
        return next(self._results)

    def cleanup(self) -> None:
        self._results.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: what a trial needs to go on is the service's own business."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, as for `save_checkpoint`."""


def _use_threads(count: int) -> None:
    """Without importing torch, which is more than half of a worker's memory where a method has no networks."""
    count = max(1, count)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(count)  # what torch reads when it is imported
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)


@contextlib.contextmanager
def cluster(address: str | None, *, num_cpus: int | None = None) -> Iterator[None]:
    """A Ray to place work on: a local one that ends with us, or the cluster at `address`.

    Args:
        num_cpus: what a local Ray takes itself to have; None: the machine's.

    Raises:
        ClusterError: it cannot be reached or started.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # it repeats at the end which trials failed
    if address is not None:
        _check_token(address)
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, num_cpus=num_cpus or os.cpu_count(), **quiet)
        else:
            ray.init(address=address, **quiet)
    except Exception as error:  # Ray's own for a node that starts too slowly is a bare Exception
        raise ClusterError(_why_not(address, error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_token(address: str) -> None:
    """Whether a cluster lets us in: `ray.init` asks it again and again, for minutes, without a word.

    Raises:
        ClusterError: it does not.
    """
    try:
        GcsClient(address=address)
    except AuthenticationError as error:
        raise ClusterError(
            f"the Ray cluster at {address} does not take this token, or wants one; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN (or ~/.ray/auth_token) as on its machines"
        ) from error
    except (RayError, OSError, RuntimeError, ValueError):
        return  # `ray.init` says what else is wrong


def _why_not(address: str | None, error: Exception) -> str:
    if address is None:
        return f"a local Ray does not start: {_first_line(error)}; its logs are in /tmp/ray/session_latest/logs"
    if "Version mismatch" in str(error):
        return f"the Ray cluster at {address} runs other versions: {' '.join(str(error).split())}; install the same"
    return (
        f"cannot join the Ray cluster at {address}: {_first_line(error)}; check that this machine is a node of it: one "
        f"that only launches becomes one by `ray start --address={address} --num-cpus=0 --num-gpus=0`"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Places:
    """The places on the cluster that Ray Tune holds for our trials, and its trials in them.

    Ray Tune shows its controller to the scheduler alone, which passes it on with `attach` at each step; until then
    no place is held.
    """

    def __init__(self, resources: ResourcesSection) -> None:
        self._room = Room(resources)
        self._controller: Any = None

    def attach(self, tune_controller: Any) -> None:
        """What Ray Tune hands to `TrialScheduler.choose_trial_to_run`."""
        if self._controller is None:
            self._controller = getattr(tune_controller, "_tune_controller", tune_controller)
            self._controller._actor_force_cleanup_timeout = STOP_WITHIN_S  # Ray Tune's own is 10 s, for all cases
        self._forget_ended()

    def _forget_ended(self) -> None:
        """Ray Tune keeps every trial that it ever ran and walks through all of them at each step."""
        controller = self._controller
        ended = [t for t in controller._trials if t.is_finished()] if len(controller._trials) > _MOST_TRIALS else []
        old = set(ended[: -_MOST_TRIALS // 2])  # the newest may have an actor that is still being put away
        if old:
            controller._trials[:] = [t for t in controller._trials if t not in old]
            for kept in (controller._stopped_trials, controller._failed_trials, controller._trials_to_cache):
                kept.difference_update(old)

    def next_to_start(self) -> Any:
        """The oldest of Ray Tune's trials that has no actor, not even one that is starting; None if all have.

        An actor that has become free goes to it. Ray Tune's own order would give it to a trial whose actor is just
        starting, throw that one away, and start another: where trials are short, it hardly comes to anything else.
        """
        without = self._controller._pending_trials - self._controller._trial_to_actor.keys()
        return next((trial for trial in self._controller._trials if trial in without), None)

    def total(self) -> int:
        """As `Room.total`."""
        return self._room.total()

    def left(self, ours: int) -> int:
        """How many more trials could start now, `ours` being those that run or wait for a place."""
        return self._room.left(ours=ours, held=self._num_held())

    def waiting(self) -> set[str]:
        """The trials that wait for a place; one whose actor is starting does not."""
        if self._controller is None:
            return set()
        return {trial.trial_id for trial in self._controller._pending_trials if self._actor_of(trial) is None}

    def starting(self) -> set[str]:
        """The trials that have a place and whose actor is not there yet: a process starts, imports, reads."""
        if self._controller is None:
            return set()
        return {trial.trial_id for trial in self._controller._pending_trials} - self.waiting()

    def kill(self, tune_id: str) -> None:
        """End a trial and its process at once, even one that is frozen, and free its place. Nothing if it has ended.

        Ray Tune tells the scheduler of it by `on_trial_error` (`on_trial_remove` if it waited for a place).
        """
        trial = self._controller and self._controller.get_trial(tune_id)
        if trial is None or trial.is_finished():
            return
        actor = self._actor_of(trial)
        if actor is not None:
            ray.kill(actor)
            return
        if trial in self._controller._staged_trials:
            self._controller._unstage_trial_with_resources(trial)
        self._controller.stop_trial(trial)

    def release_idle(self) -> None:
        """Give back places without a trial: Ray Tune keeps one for the next trial, which another launcher may need."""
        if self._controller is None:
            return
        self._controller._cleanup_cached_actors(force_all=True)
        # With no trial at all Ray Tune only asks the searcher again and again, and would not see actors end.
        until = time.monotonic() + _RELEASE_WITHIN_S
        while self._is_empty() and self._controller._stopping_actors and time.monotonic() < until:
            self._controller._actor_manager.next(timeout=0.1)

    def _is_empty(self) -> bool:
        return not self._controller._pending_trials and not self._controller._running_trials

    def _num_held(self) -> int:
        if self._controller is None:
            return 0
        live = self._controller._actor_manager._live_actors_to_ray_actors_resources
        return len(live) - len(live.keys() & self._controller._stopping_actors.keys())

    def _actor_of(self, trial: Any) -> Any:
        """The Ray actor of a trial, starting or started; None if it has no place yet."""
        tracked = self._controller._trial_to_actor.get(trial)
        live = self._controller._actor_manager._live_actors_to_ray_actors_resources
        return live[tracked][0] if tracked in live else None


class _StopWhen(tune.Stopper):
    """Ends the whole run when asked to."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._asked()

    def __reduce__(self) -> Any:
        return (_StopWhen, (bool,))


class _Tick(TrialProgressCallback):
    """Tells the service of each step of Ray Tune. Pickled without what it calls.

    It stands where Ray Tune puts a callback of its own, which tells of results and keeps every trial in memory.
    """

    def __init__(self, tick: Callable[[], object]) -> None:
        super().__init__()
        self._tick = tick

    def on_trial_result(self, *_: Any, **info: Any) -> None:
        """Nothing, as for the other two: the scheduler is told."""

    def on_trial_error(self, *_: Any, **info: Any) -> None:
        """Nothing."""

    def on_trial_complete(self, *_: Any, **info: Any) -> None:
        """Nothing."""

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._tick()

    def __reduce__(self) -> Any:
        return (_Tick, (bool,))


@contextlib.contextmanager
def _watched(on_loss: Callable[[], None]) -> Iterator[None]:
    """Call `on_loss` from another thread once no node of the cluster answers: Ray Tune itself would wait for ever."""
    ended = threading.Event()

    def watch() -> None:
        silent_since = time.monotonic()
        while not ended.wait(_ASK_NODES_EVERY_S):
            if _any_node_alive():
                silent_since = time.monotonic()
            elif time.monotonic() - silent_since > _LOST_AFTER_S and not ended.is_set():
                on_loss()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _any_node_alive() -> bool:
    """Whether the cluster answers within a while and has a living node."""
    answer: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever a dying cluster raises means: no answer
            answer.append(any(node["Alive"] for node in ray.nodes()))  # type: ignore[no-untyped-call]

    question = threading.Thread(target=ask, daemon=True)
    question.start()
    question.join(_ANSWER_WITHIN_S)
    return bool(answer) and answer[0]


def _of_the_disk(error: OSError | TuneError) -> OSError | None:
    """What a disk said, such as one that is full; None if it is something else, such as the database's end.

    What is raised where Ray Tune handles an event it hands on as the context of an error of its own.
    """
    from search.database import is_outage  # not above: workers import this module, and need no database

    cause = error.__context__ if isinstance(error, TuneError) else error
    return cause if isinstance(cause, OSError) and not is_outage(cause) else None


def _why_it_ended(error: OSError, folder: Path) -> str:
    where = f" ({error.filename})" if error.filename else ""
    temporary = Path(_get_ray_train_session_dir()).parents[1]
    return (
        f"Ray Tune cannot go on: {error.strerror or _first_line(error)}{where}; it makes small files for each trial: "
        f"see that there is space in Ray's temporary folder {temporary} and in {folder}, and that both can be written "
        "to, then run the command again"
    )


def run_all(
    searcher: Searcher,
    scheduler: TrialScheduler,
    resources: ResourcesSection,
    *,
    folder: Path,
    stop_asked: Callable[[], bool],
    tick: Callable[[], None],
    on_loss: Callable[[], None],
) -> None:
    """Run trials as `searcher` hands them out until it is finished or a stop is asked for.

    Raises:
        ClusterError: the cluster went away, or this machine takes none of the files that Ray Tune makes.
    """
    request = {"cpu": resources.cpus} | ({"gpu": resources.gpus} if resources.gpus else {})

    name = f"launch-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        tuner = tune.Tuner(
            tune.with_resources(TrialActor, request),
            tune_config=tune.TuneConfig(search_alg=searcher, scheduler=scheduler, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name=name,
                storage_path=str(folder),
                verbose=0,
                stop=_StopWhen(stop_asked),
                callbacks=[_Tick(tick)],
                failure_config=tune.FailureConfig(max_failures=0),
                # By default a trial fails at its very end on a node that does not see this launcher's folder.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        with _watched(on_loss):
            tuner.fit()
    except RayError as error:
        raise ClusterError(f"the Ray cluster went away: {_first_line(error)}; run the command again") from error
    except (OSError, TuneError) as error:
        cause = _of_the_disk(error)
        if cause is None:
            raise
        raise ClusterError(_why_it_ended(cause, folder)) from error
    finally:
        shutil.rmtree(folder / name, ignore_errors=True)  # Tune's own notes; the database has what matters
