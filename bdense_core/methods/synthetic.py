"""A method without networks: its score is a known function of the weights, plus noise of a known size.

For measuring and testing the service itself: the overhead of a trial, the accounting under faults, and what
a search finds where the truth is known. The score is

    optimum + curvature ((p - p*)^2 + (shift - best_shift)^2) + 0.5 [flavour is bitter]
        + noise z(seed, weights) + evaluation_noise z'(evaluation seed, weights),

p being the share of the last branch, approached from above as the run goes on; its surrogate is the same without
noise. With `Task.snapshots` an interrupted run goes on after its last score.

Two uses for what is claimed from noisy scores: with `curvature: 0` all weightings are equal, and whatever a search
prefers is noise; with a curvature, two weightings have a real gap of curvature times the difference of their
(p - p*)^2, to be set against the noise. By default endpoint only (p = 1) lies 0.25 above the best, uniform weights
(p = 1/4) 1.0, and one run's noise is 0.05.
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
from bdense_core.methods.base import Axis, Control
from bdense_core.network_config import NetworkConfig
from bdense_core.task import RESUMED, Event, Progress, Score, Task, report_steps
from bdense_core.weights import RULES, Rule, Weights, endpoint_only, shares, uniform


@dataclass(frozen=True, kw_only=True, slots=True)
class Synthetic:
    """Settings of the known function."""

    kind: Literal["synthetic"] = "synthetic"
    num_branches: int = 4
    budget_kimg: float = 3.0
    optimum: float = 4.0
    best_share: float = 0.75
    curvature: float = 4.0
    """0: no weighting is better than another."""
    noise: float = 0.05
    """Standard deviation of a score over training seeds, and over weightings on one seed."""
    evaluation_noise: float = 0.0
    """Standard deviation over evaluation seeds. There is no `Evaluation` here: a score's own seed counts as 0."""
    shift: float = 0.0
    """A setting that may be searched beside the weights."""
    best_shift: float = 0.0
    flavour: Literal["plain", "bitter"] = "plain"
    """Another one."""
    seconds: float = 0.0
    """How long a run pretends to work."""
    fail_above_share: float = 1.1
    """A run whose last share exceeds this gives a value that is not finite, as a diverging run does."""

    def __post_init__(self) -> None:
        if self.num_branches < 1 or self.budget_kimg <= 0:
            raise BadValue("method.num_branches and method.budget_kimg must be positive")
        if min(self.seconds, self.noise, self.evaluation_noise, self.curvature) < 0:
            raise BadValue("method.seconds, noise, evaluation_noise and curvature must not be negative")

    @property
    def needs_teacher(self) -> bool:
        return False

    @property
    def needs_data(self) -> bool:
        return False

    @property
    def nfe(self) -> int:
        return 0

    @property
    def num_intervals(self) -> int:
        return 1

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(f"branch.{k + 1}" for k in range(self.num_branches))

    @property
    def target_space(self) -> str:
        return "none"

    def steps(self, every_kimg: int) -> tuple[int, ...]:
        return report_steps(self.budget_kimg, every_kimg)

    def controls(self) -> dict[str, Control]:
        return {
            "endpoint_only": Control(weights=endpoint_only(self.num_branches)),
            "uniform": Control(weights=uniform(self.num_branches)),
        }

    def axes(self) -> dict[str, Axis]:
        return {
            "shift": Axis(about="how far a parabola's argument is moved", low=0.0, high=1.0),
            "flavour": Axis(about="bitter costs 0.5", choices=("plain", "bitter")),
        }

    def metrics(self) -> dict[str, str]:
        return {"balance": "the share of all branches but the last"}

    def calls_to_score(self, every_kimg: int) -> tuple[int, ...]:
        return (0,) * len(self.steps(every_kimg))

    def student_network(self, teacher: NetworkConfig) -> NetworkConfig:
        return teacher

    def forward_units(self) -> tuple[float, float]:
        return 0.0, 0.0

    @property
    def rules(self) -> tuple[Rule, ...]:
        return RULES

    def cache_bytes(self, image_values: int) -> float:
        return 0.0

    def truth(self, weights: Weights) -> float:
        """The score without noise."""
        bend = (shares(weights)[-1] - self.best_share) ** 2 + (self.shift - self.best_shift) ** 2
        return self.optimum + self.curvature * bend + (0.5 if self.flavour == "bitter" else 0.0)

    def run(self, task: Task) -> Generator[Event, None, None]:
        truth = self.truth(task.weights) if shares(task.weights)[-1] <= self.fail_above_share else math.nan
        trained = truth + self.noise * _normal(f"{task.seed}/{_weighting(task)}")
        result, *evaluations = (
            trained + self.evaluation_noise * _normal(f"evaluation {seed}/{_weighting(task)}")
            for seed in (0, *task.evaluation_seeds)
        )
        steps = self.steps(task.every_kimg)
        balance = {"balance": 1 - shares(task.weights)[-1]}
        state = _State(Path(task.snapshots), self, task) if task.snapshots else None
        behind = state.step() if state else 0
        if behind:
            yield Progress(kimg=behind, done=behind / (steps[-1] + 1), phase=RESUMED)
        for step in steps:
            if step > behind:
                yield from self._work(step, self.seconds / len(steps), steps[-1])
                if state and (note := state.keep(step)):
                    yield Progress(kimg=step, done=step / (steps[-1] + 1), phase="train", note=note)
            excess = 1 + 0.2 * (1 - step / steps[-1])
            is_last = step == steps[-1]
            yield Score(
                kimg=step,
                value=result * excess,
                done=step / steps[-1],
                surrogate=truth * excess,
                evaluations=tuple(evaluations) if is_last else (),
                metrics=balance if is_last else {},
            )

    def _work(self, step: int, seconds: float, end: int) -> Iterator[Event]:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.25))
            yield Progress(kimg=step, done=step / (end + 1), phase="train")


def _weighting(task: Task) -> str:
    """What noise knows of a weighting."""
    learned = f"/{task.schedule}/{task.rule}" if task.schedule or task.rule != "fixed" else ""
    return f"{shares(task.weights)}{learned}"


def _normal(key: str) -> float:
    """A standard normal number that a text stands for."""
    uniform_number = (int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") + 0.5) / 2**48
    return NormalDist().inv_cdf(uniform_number)


class _State:
    """How far a run is, as an empty file that is named by the step and by what the run depends on."""

    def __init__(self, folder: Path, method: Synthetic, task: Task) -> None:
        self._folder = folder
        self._run = sha256_of([asdict(method), _weighting(task), task.seed, task.every_kimg])
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
