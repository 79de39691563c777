"""Ray: where trials run. Starts a local Ray or joins a cluster, and places one actor per trial."""

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from search.errors import ClusterError
from search.spec import ResourcesSection
from search.worker import run_trial

_ASK_NODES_EVERY_S = 3.0
_ANSWER_WITHIN_S = 5.0
_LOST_AFTER_S = 15.0


class TrialActor(tune.Trainable):
    """A Ray actor that runs one trial after the other."""

    def setup(self, config: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(max(1, int(config.get("threads", 1))))
        self._results = run_trial(config["trial"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
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


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A Ray to place work on: a local one that ends with us, or the cluster at `address`.

    Raises:
        ClusterError: it cannot be reached or started.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, num_cpus=os.cpu_count(), **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RayError, RuntimeError, ValueError, OSError) as error:
        place = "a local Ray does not start" if address is None else f"no Ray cluster answers at {address}"
        first = str(error).strip().splitlines()[0]
        raise ClusterError(f"{place}: {first}; check --ray-address, or leave it out for a local Ray") from error
    try:
        yield
    finally:
        ray.shutdown()


def slots(resources: ResourcesSection) -> int:
    """How many trials fit on the cluster at once.

    Raises:
        ClusterError: not even one.
    """
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    fits = total.get("CPU", 0) / resources.cpus
    if resources.gpus > 0:
        fits = min(fits, total.get("GPU", 0) / resources.gpus)
    if fits < 1:
        raise ClusterError(
            f"a trial asks for {resources.cpus:g} CPU and {resources.gpus:g} GPU, the cluster has "
            f"{total.get('CPU', 0):g} and {total.get('GPU', 0):g}; lower resources.cpus or resources.gpus"
        )
    return min(int(fits + 1e-9), resources.max_parallel or 10**6)


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


class _Tick(tune.Callback):
    """Tells the service, after each step of Ray Tune, which trials wait for a place. Pickled without what it calls."""

    def __init__(self, tick: Callable[[set[str]], object]) -> None:
        self._tick = tick

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._tick({trial.trial_id for trial in trials if trial.status == "PENDING"})

    def __reduce__(self) -> Any:
        return (_Tick, (len,))


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


def run_all(
    searcher: Searcher,
    scheduler: TrialScheduler,
    resources: ResourcesSection,
    *,
    folder: Path,
    stop_asked: Callable[[], bool],
    tick: Callable[[set[str]], None],
    on_loss: Callable[[], None],
) -> None:
    """Run trials as `searcher` hands them out until it is finished or a stop is asked for.

    Raises:
        ClusterError: the cluster went away.
    """
    request = {"cpu": resources.cpus} | ({"gpu": resources.gpus} if resources.gpus else {})

    name = f"launch-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
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
        ),
    )
    try:
        with _watched(on_loss):
            tuner.fit()
    except RayError as error:
        raise ClusterError(f"the Ray cluster went away: {str(error).splitlines()[0]}; run the command again") from error
    finally:
        shutil.rmtree(folder / name, ignore_errors=True)  # Tune's own notes; the database has what matters
