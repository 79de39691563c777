"""Runs one resolved trial and yields plain results. Knows no Optuna and no database."""

import logging
import math
import os
import socket
import time
import traceback
from base64 import b64encode
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from typing import Any

from pydantic import TypeAdapter

from bdense_core import assets
from bdense_core.distill import distill
from bdense_core.errors import BDenseError, CacheError
from bdense_core.methods import AnyMethod
from bdense_core.methods.base import Method
from bdense_core.task import RESUMED, Event, Progress, Task
from search.checkpoints import LocalState, local_state
from search.version import differences, versions

logger = logging.getLogger(__name__)

SIGN_OF_LIFE_S = 1.0
"""How long a worker may stay silent while it makes progress."""

_TASK: TypeAdapter[Task] = TypeAdapter(Task)
_METHOD: TypeAdapter[AnyMethod] = TypeAdapter(AnyMethod)


def payload(
    method: Method,
    task: Task,
    seeds: tuple[int, ...],
    *,
    checkpoint: str | None = None,
    versions: dict[str, str] | None = None,
) -> dict[str, Any]:
    """A trial as plain values, for the way to a worker.

    Args:
        seeds: the task's own, and those of its repeats.
        checkpoint: where its state is kept, a `Checkpoints.location`; None: nowhere.
        versions: the launcher's, which the worker's must equal; None: any will do.
    """
    return {
        "method": _METHOD.dump_python(method),  # type: ignore[arg-type]
        "task": asdict(task),
        "seeds": list(seeds),
        "checkpoint": checkpoint,
        "versions": versions,
    }


def run_trial(description: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """Results of one trial: `progress`, `score`, and at the end a `score` or a `failed` that is `done`.

    Each carries `node` and `pid`. One may carry a `note`, one line for people; the first of a trial that goes on
    from a checkpoint carries `resumed`, the kimg that were behind it. Whatever goes wrong inside a trial is a result
    with its reason, so that the worker lives on. Closing it keeps the trial's state.
    """
    node = socket.gethostname()
    with closing(_results(description, node)) as results:
        for result in results:
            yield {**result, "node": node, "pid": os.getpid()}


def _results(description: dict[str, Any], node: str) -> Generator[dict[str, Any], None, None]:
    # Asked here, and not only by the launcher: a trial may start on a node that has just joined.
    expected = description.get("versions")
    if expected is not None and (different := differences(versions(), expected, whose="the launcher")):
        reason = f"{node} has {different}; install the same code and packages on all nodes, and restart Ray there"
        yield {"event": "unlike", "reason": reason, "done": True}
        return
    try:
        method = _METHOD.validate_python(description["method"])
        task = _with_own_assets(_TASK.validate_python(description["task"]))
        with local_state(description.get("checkpoint")) as state:
            if state.folder is not None:
                task = replace(task, snapshots=str(state.folder), snapshots_required=False)
            yield from _events(method, task, tuple(description["seeds"][1:]), state)
    except BDenseError as error:
        retry = isinstance(error, CacheError)  # the machine's fault, not the proposal's
        yield {"event": "failed", "reason": f"{type(error).__name__}: {error}", "retry": retry, "done": True}
    except Exception as error:
        if _device_is_lost(error):
            raise  # nothing works in this process any more: Ray starts another, and the trial is tried again
        logger.exception("a trial failed")
        detail = traceback.format_exc(limit=-4)
        yield {
            "event": "failed",
            "reason": _reason(error),
            "detail": detail,
            "retry": isinstance(error, (OSError, MemoryError)) or type(error).__name__ == "OutOfMemoryError",
            "done": True,
        }


def _with_own_assets(task: Task) -> Task:
    """The task with what comes with the package read from where it is installed on this node."""
    at = task.evaluation
    return replace(
        task,
        teacher=task.teacher and assets.here(task.teacher),
        evaluation=at and replace(at, features=assets.here(at.features), reference=assets.here(at.reference)),
    )


def _device_is_lost(error: Exception) -> bool:
    """Whether CUDA itself has failed, which it does for good; a full memory is no such failure."""
    return "CUDA error" in str(error) and "out of memory" not in str(error)


def _reason(error: Exception) -> str:
    """One line, with advice where the GPU's memory was too small."""
    first = (str(error).strip().splitlines() or [""])[0]
    if type(error).__name__ == "OutOfMemoryError":
        return f"the GPU's memory is full ({first}); lower resources.micro_batch or evaluation.batch"
    return f"{type(error).__name__}: {first}"


def _events(
    method: Method, task: Task, repeats: tuple[int, ...], state: LocalState
) -> Generator[dict[str, Any], None, None]:
    spoke = -math.inf
    with _warnings("bdense_core.shared_cache") as warned, closing(distill(method, task, repeats)) as events:
        for event in events:
            result = _result(event)
            state.finished = result["done"]
            notes = [_note(event), state.follow(), *warned]
            warned.clear()
            if note := "; ".join(filter(None, notes)):
                result["note"] = note
            elif (
                result["event"] == "progress" and "resumed" not in result and time.monotonic() - spoke < SIGN_OF_LIFE_S
            ):
                continue
            spoke = time.monotonic()
            yield result
            if result["done"]:
                return


@contextmanager
def _warnings(logger_name: str) -> Iterator[list[str]]:
    """What is warned of while the block runs: nobody reads a worker's log."""
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    source = logging.getLogger(logger_name)
    source.addHandler(handler)
    try:
        yield warned
    finally:
        source.removeHandler(handler)


def _note(event: Event) -> str | None:
    """What an event has to say to people."""
    if isinstance(event, Progress):
        return event.note
    wrong = [f"{name} is {value}" for name, value in event.metrics.items() if not math.isfinite(value)]
    return f"not kept, as no number: {', '.join(wrong)}" if wrong else None


def _result(event: Event) -> dict[str, Any]:
    where = {"kimg": event.kimg, "fraction": event.done}
    if isinstance(event, Progress):
        resumed = {"resumed": event.kimg} if event.phase == RESUMED else {}
        return {"event": "progress", "phase": event.phase, "loss": event.loss, "done": False, **where, **resumed}
    if not math.isfinite(event.value):
        reason = f"the metric is {event.value} after {event.kimg} kimg; lower method.lr or change the weights"
        return {"event": "failed", "reason": reason, "done": True}
    return {
        "event": "score",
        "value": event.value,
        "surrogate": event.surrogate,
        "repeats": [list(score) for score in event.repeats],
        "evaluations": list(event.evaluations),
        # in pairs: Ray Tune takes a dictionary in a result apart
        "metrics": [[name, float(value)] for name, value in event.metrics.items() if math.isfinite(value)],
        "shares_learned": list(event.shares),
        "samples": b64encode(event.samples).decode() if event.samples else None,
        "done": event.done >= 1,
        **where,
    }
