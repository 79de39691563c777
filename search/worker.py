"""Runs one resolved trial and yields plain results. Knows no Optuna and no database."""

import logging
import math
import time
import traceback
from collections.abc import Generator, Iterator
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from bdense_core.distill import distill
from bdense_core.errors import BDenseError, CacheError
from bdense_core.methods import AnyMethod
from bdense_core.methods.base import Method
from bdense_core.task import Progress, Task

logger = logging.getLogger(__name__)

SIGN_OF_LIFE_S = 1.0
"""How long a worker may stay silent while it makes progress."""

_TASK: TypeAdapter[Task] = TypeAdapter(Task)
_METHOD: TypeAdapter[AnyMethod] = TypeAdapter(AnyMethod)


def payload(method: Method, task: Task, seeds: tuple[int, ...]) -> dict[str, Any]:
    """A trial as plain values, for the way to a worker."""
    return {"method": _METHOD.dump_python(method), "task": asdict(task), "seeds": list(seeds)}  # type: ignore[arg-type]


def run_trial(description: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """Results of one trial: `progress`, `score`, and at the end a `score` or a `failed` that is `done`.

    Whatever goes wrong inside a trial is a result with its reason, so that the worker lives on.
    """
    try:
        method = _METHOD.validate_python(description["method"])
        task = _TASK.validate_python(description["task"])
        yield from _events(method, task, tuple(description["seeds"][1:]))
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


def _device_is_lost(error: Exception) -> bool:
    """Whether CUDA itself has failed, which it does for good; a full memory is no such failure."""
    return "CUDA error" in str(error) and "out of memory" not in str(error)


def _reason(error: Exception) -> str:
    """One line, with advice where the GPU's memory was too small."""
    first = (str(error).strip().splitlines() or [""])[0]
    if type(error).__name__ == "OutOfMemoryError":
        return f"the GPU's memory is full ({first}); lower resources.micro_batch or evaluation.batch"
    return f"{type(error).__name__}: {first}"


def _events(method: Method, task: Task, repeats: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    spoke = -math.inf
    for event in distill(method, task, repeats):
        result: dict[str, Any]
        if isinstance(event, Progress):
            if time.monotonic() - spoke < SIGN_OF_LIFE_S:
                continue
            result = {"event": "progress", "phase": event.phase, "loss": event.loss, "done": False}
        elif not math.isfinite(event.value):
            reason = f"the metric is {event.value} after {event.kimg} kimg; lower method.lr or change the weights"
            yield {"event": "failed", "reason": reason, "done": True}
            return
        else:
            final = event.done >= 1
            result = {"event": "score", "value": event.value, "repeats": list(event.repeats), "done": final}
        spoke = time.monotonic()
        yield {**result, "kimg": event.kimg, "fraction": event.done}
