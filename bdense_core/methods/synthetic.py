"""A method without networks: its score is a known function of the weights, plus noise of a known size.

For measuring and testing the service itself: the overhead of a trial, the accounting under faults, and what
a search finds where the truth is known. The score is

    optimum + curvature (p - p*)^2 + noise z(seed, weights),   p = share of the last branch,

approached from above as the run goes on. With `Task.snapshots` an interrupted run goes on after its last score.
"""

import hashlib
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Literal

from bdense_core.errors import BadValue
from bdense_core.files import sha256_of, write_text_atomically
from bdense_core.task import RESUMED, Event, Progress, Score, Task, report_steps
from bdense_core.weights import Weights, endpoint_only, shares, uniform


@dataclass(frozen=True, kw_only=True, slots=True)
class Synthetic:
    """Settings of the known function."""

    kind: Literal["synthetic"] = "synthetic"
    num_branches: int = 4
    budget_kimg: float = 3.0
    optimum: float = 4.0
    best_share: float = 0.75
    curvature: float = 4.0
    noise: float = 0.05
    seconds: float = 0.0
    """How long a run pretends to work."""
    fail_above_share: float = 1.1
    """A run whose last share exceeds this gives a value that is not finite, as a diverging run does."""

    def __post_init__(self) -> None:
        if self.num_branches < 1 or self.budget_kimg <= 0 or self.seconds < 0 or self.noise < 0:
            raise BadValue(
                "method.num_branches and budget_kimg must be positive, method.seconds and noise not negative"
            )

    @property
    def needs_teacher(self) -> bool:
        return False

    @property
    def nfe(self) -> int:
        return 0

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(f"branch.{k + 1}" for k in range(self.num_branches))

    @property
    def target_space(self) -> str:
        return "none"

    def controls(self) -> dict[str, Weights]:
        return {"endpoint_only": endpoint_only(self.num_branches), "uniform": uniform(self.num_branches)}

    def forward_units(self) -> tuple[float, float]:
        return 0.0, 0.0

    def cache_bytes(self, image_values: int) -> float:
        return 0.0

    def truth(self, weights: Weights) -> float:
        """The score without noise."""
        return self.optimum + self.curvature * (shares(weights)[-1] - self.best_share) ** 2

    def run(self, task: Task) -> Generator[Event, None, None]:
        text = f"{task.seed}/{shares(task.weights)}".encode()
        uniform_number = (int.from_bytes(hashlib.sha256(text).digest()[:6], "big") + 0.5) / 2**48
        result = self.truth(task.weights) + self.noise * NormalDist().inv_cdf(uniform_number)
        if shares(task.weights)[-1] > self.fail_above_share:
            result = math.nan
        steps = report_steps(self.budget_kimg, task.every_kimg)
        state = _State(Path(task.snapshots), self, task) if task.snapshots else None
        behind = state.step() if state else 0
        if behind:
            yield Progress(kimg=behind, done=behind / (steps[-1] + 1), phase=RESUMED)
        for step in steps:
            if step > behind:
                yield from self._work(step, self.seconds / len(steps), steps[-1])
                if state and (note := state.keep(step)):
                    yield Progress(kimg=step, done=step / (steps[-1] + 1), phase="train", note=note)
            yield Score(kimg=step, value=result * (1 + 0.2 * (1 - step / steps[-1])), done=step / steps[-1])

    def _work(self, step: int, seconds: float, end: int) -> Iterator[Event]:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.25))
            yield Progress(kimg=step, done=step / (end + 1), phase="train")


class _State:
    """How far a run is, as an empty file that is named by the step and by what the run depends on."""

    def __init__(self, folder: Path, method: Synthetic, task: Task) -> None:
        self._folder = folder
        self._run = sha256_of([asdict(method), task.weights, task.seed, task.every_kimg])
        self._failing = False

    def step(self) -> int:
        """The last step whose score is known; 0 if there is none."""
        return max(
            (int(path.name.split("-")[1]) for path in self._folder.glob(f"snapshot-*-{self._run}.json")), default=0
        )

    def keep(self, step: int) -> str | None:
        """Remember a step; a note the first time that this fails."""
        path = self._folder / f"snapshot-{step:08d}-{self._run}.json"
        try:
            write_text_atomically(path, "{}\n")
            for old in self._folder.glob("snapshot-*.json"):
                if old.name < path.name:
                    old.unlink(missing_ok=True)
        except OSError as error:
            note = f"the state in {self._folder} cannot be written: {error.strerror}; the run goes on without"
            self._failing, told = True, self._failing
            return None if told else note
        return None
