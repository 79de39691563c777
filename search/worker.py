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
        logger.exception("a trial failed")
        detail = traceback.format_exc(limit=-4)
        yield {
            "event": "failed",
            "reason": f"{type(error).__name__}: {error}",
            "detail": detail,
            "retry": isinstance(error, (OSError, MemoryError)),
            "done": True,
        }


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
