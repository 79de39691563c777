"""The one entry: a method, a task and its repeats; out come signs of life and scores."""

import dataclasses
from collections.abc import Generator
from contextlib import closing

from bdense_core.methods.base import Method
from bdense_core.task import Event, Progress, Score, Task


def distill(method: Method, task: Task, repeats: tuple[int, ...] = ()) -> Generator[Event, None, None]:
    """Run a task on its own seed, and then on further training seeds.

    Scores follow the run of `task.seed`, so trials stay paired whatever their repeats; the last one carries the
    scores of the repeats. Closing it closes the run that is under way, which keeps its state.

    Raises:
        BDenseError: see `Method.run`.
    """
    runs = 1 + len(repeats)
    result: Score | None = None
    with closing(method.run(task)) as events:
        for event in events:
            if isinstance(event, Score) and event.done >= 1:
                result = event
            if result is None or not repeats:
                yield dataclasses.replace(event, done=event.done / runs)
    assert result is not None, "a method's last event is its score at the whole budget"
    if not repeats:
        return
    scores: list[tuple[int, int, float]] = []
    for index, seed in enumerate(repeats, start=1):
        with closing(method.run(_repeat(task, seed))) as events:
            for event in events:
                note = None
                if isinstance(event, Score):
                    scores.append((seed, event.kimg, event.value))
                else:
                    note = event.note
                done = min((index + event.done) / runs, 0.999)
                yield Progress(kimg=event.kimg, done=done, phase=f"seed {seed}", note=note)
    yield dataclasses.replace(result, repeats=tuple(scores))


def _repeat(task: Task, seed: int) -> Task:
    """The task on another training seed: with snapshots of its own, and without anything but its scores as a result."""
    snapshots = None if task.snapshots is None else f"{task.snapshots}/seed-{seed}"
    return dataclasses.replace(task, seed=seed, snapshots=snapshots, output=None, evaluation_seeds=(), num_shown=0)
