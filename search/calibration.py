"""Measures how fast this device works on a study, by short runs of the study's own method.

The runs are real ones: `distill` on the study's teacher, features, batches, precision and compilation, at the smallest
budget that the method accepts. What each piece of work took is read off the run's signs of life, so that nothing here
needs to know which method it is, and whatever a method does beside its networks (noise, targets, its optimizer,
features) is in the figure of the phase that does it. A piece that comes for the first time is slower, and other
programs disturb single ones: the median of pieces of one kind counts.
"""

import contextlib
import datetime
import logging
import math
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from statistics import median_low

import torch

from bdense_core.distill import distill
from bdense_core.errors import BadValue, BDenseError
from bdense_core.methods.base import AMethod, Method, with_settings
from bdense_core.task import Event, Progress, Score, Task
from bdense_core.weights import uniform
from search.errors import MissingFile
from search.logs import say
from search.settings import Settings
from search.spec import Study
from search.throughput import Seconds, Throughput, device_name, keep, threads

AT_LEAST_S = 5.0
"""Short runs are repeated until this has passed."""
_KIMG = 1.0
"""Of a run whose training is measured."""
_MOST_CALLS = 32768
"""Network evaluations of a batch whose scoring is measured: where samples take many calls, it has fewer samples than
the study's own."""
_BATCHES = 3
"""Batches of samples that are scored; the first one, slower than the others, is left out."""


def calibrate(study: Study, settings: Settings, *, at_least_s: float = AT_LEAST_S) -> Throughput:
    """Measure the seconds of one network evaluation on this device, and keep them in `settings.throughput`.

    A method that asks its teacher within an iteration has no time of its own for that: it is part of training.

    Args:
        at_least_s: how long to go on; networks that take longer for one short run have just one.

    Raises:
        BadValue: the method has no networks, or the device is not there.
        MissingFile: a file of the study is not there.
        BDenseError: the short run failed, or the result cannot be written.
    """
    method = study.spec.method
    if study.missing:
        raise MissingFile(f"--calibrate runs the study for a moment, and it lacks files: {'; '.join(study.missing)}")
    if not method.needs_teacher or method.forward_units() == (0.0, 0.0):
        raise BadValue(f"the method {method.kind} trains no network; leave --calibrate out")
    task = _task(study, settings)
    device = device_name(study)
    say(
        f"calibrating on {device or task.device}: short runs of the study's own method, a quarter of a minute or so; "
        "more where networks are large"
    )
    found: list[Seconds] = []
    begin = time.perf_counter()
    try:
        with _threads(threads(study)), _quiet():
            while not found or time.perf_counter() - begin < at_least_s:
                found.append(_training(method, task) | _scoring(method, task))
    except torch.OutOfMemoryError as error:
        raise BDenseError(
            f"the study does not fit into the memory of {device}: {str(error).splitlines()[0]}; lower "
            "resources.micro_batch or evaluation.batch"
        ) from error
    assert device is not None, "the run has found the device"
    throughput = Throughput(
        seconds={name: median_low(one[name] for one in found) for name in found[0]},
        device=device,
        measured=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    try:
        path = keep(study, throughput, settings)
    except OSError as error:
        raise BDenseError(f"the throughput cannot be kept in {settings.throughput}: {error.strerror}") from error
    say(f"calibrated in {time.perf_counter() - begin:.0f} s; kept in {path}")
    return throughput


def _task(study: Study, settings: Settings) -> Task:
    """A trial's, that keeps nothing anywhere."""
    task = study.task(uniform(study.num_branches), study.spec.seeds.training, cache_root=settings.cache)
    return replace(task, cache_root=None)


def _training(method: Method, task: Task) -> Seconds:
    """Of the teacher, where it is asked before an iteration, and of training.

    A run's parts between two scores count apart: in progressive distillation their iterations differ.
    """
    short = _shortest(method, _KIMG)
    last = len(short.steps(task.every_kimg)) - 1
    pieces: dict[tuple[str, int], list[float]] = defaultdict(list)
    part, images = 0, 0.0
    with closing(_timed(short, _scored_on(task, num_batches=1, batch=2))) as events:
        for event, seconds in events:
            if isinstance(event, Score):
                part += 1
            elif event.phase != "evaluation":
                pieces["student_training" if event.phase == "train" else "teacher_cache", part].append(seconds)
                images = event.kimg * 1000
            elif part == last:
                break
    whole = {"teacher_cache": 0.0, "student_training": 0.0}
    for (name, _), durations in pieces.items():
        whole[name] += median_low(durations) * len(durations)
    teacher, student = short.forward_units()
    return {
        "teacher_cache": whole["teacher_cache"] / (teacher * images) if teacher else 0.0,
        "student_training": whole["student_training"] / (student * images),
    }


def _scoring(method: Method, task: Task) -> Seconds:
    """Of a sample's network calls, its features among them."""
    assert task.evaluation is not None
    short = _shortest(method, 0.001)
    first, *later = short.calls_to_score(task.every_kimg)
    calls = first if later else short.nfe  # those of the last score are of further figures, too
    batch = max(1, min(task.evaluation.batch, _MOST_CALLS // calls))
    durations: list[float] = []
    with closing(_timed(short, _scored_on(task, num_batches=_BATCHES, batch=batch))) as events:
        for event, seconds in events:
            if isinstance(event, Progress) and event.phase == "evaluation":
                durations.append(seconds)
            if len(durations) == _BATCHES:
                break
    return {"student_scoring": median_low(durations[1:]) / (batch * calls)}


def _timed(method: Method, task: Task) -> Generator[tuple[Event, float], None, None]:
    """The events of a run, and the seconds that each took to come. Closing it ends the run."""
    with closing(distill(method, task)) as events:
        begin = time.perf_counter()
        for event in events:
            yield event, time.perf_counter() - begin
            begin = time.perf_counter()


def _scored_on(task: Task, *, num_batches: int, batch: int) -> Task:
    assert task.evaluation is not None
    evaluation = replace(task.evaluation, n_samples=num_batches * batch, batch=batch, early_samples=None)
    return replace(task, evaluation=evaluation)


def _shortest(method: AMethod, kimg: float) -> AMethod:
    """The method at a budget of so many kimg, or at the next whole number of them that it accepts."""
    for budget in (kimg, *range(1, math.ceil(method.budget_kimg))):
        with contextlib.suppress(BadValue):
            return with_settings(method, {"budget_kimg": float(budget)})
    return method


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many as a trial has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about the short run itself, such as a distance of two images."""
    library = logging.getLogger("bdense_core")
    before = library.level
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(before)
