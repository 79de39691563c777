"""The one entry: a method, a task and its repeats; out come signs of life and scores."""

import dataclasses
from collections.abc import Iterator

from bdense_core.methods.base import Method
from bdense_core.task import Event, Progress, Score, Task


def distill(method: Method, task: Task, repeats: tuple[int, ...] = ()) -> Iterator[Event]:
    """Run a task on its own seed, and then on further training seeds.

    Scores follow the run of `task.seed`, so trials stay paired whatever their repeats; the last one carries the
    scores of the repeats.

    Raises:
        BDenseError: see `Method.run`.
    """
    runs = 1 + len(repeats)
    result: Score | None = None
    for event in method.run(task):
        if isinstance(event, Score) and event.done >= 1:
            result = event
        if result is None or not repeats:
            yield dataclasses.replace(event, done=event.done / runs)
    assert result is not None, "a method's last event is its score at the whole budget"
    if not repeats:
        return
    scores: list[tuple[int, int, float]] = []
    for index, seed in enumerate(repeats, start=1):
        for event in method.run(_repeat(task, seed)):
            if isinstance(event, Score):
                scores.append((seed, event.kimg, event.value))
            yield Progress(kimg=event.kimg, done=min((index + event.done) / runs, 0.999), phase=f"seed {seed}")
    yield dataclasses.replace(result, repeats=tuple(scores))


def _repeat(task: Task, seed: int) -> Task:
    """The task on another training seed: with snapshots of its own, and without the student as a result."""
    snapshots = None if task.snapshots is None else f"{task.snapshots}/seed-{seed}"
    return dataclasses.replace(task, seed=seed, snapshots=snapshots, output=None)
