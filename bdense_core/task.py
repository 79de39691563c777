"""One distillation as plain values: what to run, how to score it, and what it says on the way. No torch here."""

from dataclasses import dataclass, field

from bdense_core.files import HashedFile
from bdense_core.protocol import UINT8, Protocol
from bdense_core.weights import Rule, Schedule, Weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How a student is scored: the protocol of a Fréchet distance, and the seed of its samples."""

    features_name: str
    features: HashedFile
    reference: HashedFile
    n_samples: int
    seed: int
    batch: int
    early_samples: int | None = None
    """Samples of the scores before the last one; fewer are cheaper. None: as many. Such scores have a protocol of
    their own, and are compared with scores at the same kimg alone."""

    @property
    def protocol(self) -> Protocol:
        """What the values may be compared with."""
        return Protocol(
            features=self.features_name,
            features_sha256=self.features.sha256,
            image_preparation=UINT8,
            reference_sha256=self.reference.sha256,
            n_samples=self.n_samples,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One distillation, resolved: all that its result depends on, and where the machine keeps things."""

    weights: Weights
    seed: int
    every_kimg: int
    schedule: Schedule = ()
    """Weights that differ over time or between intervals; `weights` are then their mean, for people."""
    rule: Rule = "fixed"
    """Whether the run learns its weights, beginning with `weights`."""
    teacher: HashedFile | None
    dataset: str | None = None
    """A name or a path for `data.load`, of a method that trains on data."""
    evaluation: Evaluation | None
    evaluation_seeds: tuple[int, ...] = ()
    """Further evaluation seeds that the trained student is scored on: the spread of the metric itself."""
    num_shown: int = 0
    """Images of the trained student that come with its last score, to be looked at."""
    cache_root: str | None
    """The folder of all teacher caches; None: the teacher is asked again in each run."""
    cache_budget_gb: float | None = None
    """What all caches may take together; None: what the disk has."""
    cache_url: str | None = None
    """Where machines that share no folder find each other's shards (see `shared_cache`); None: nowhere."""
    device: str = "cpu"
    compile: bool = False
    """Whether networks go through torch.compile: minutes at the start, fewer kernels afterwards."""
    micro_batch: int | None = None
    """Rows that go through the student at once in training, where a whole batch does not fit; None: all."""
    snapshots: str | None = None
    """A folder of this run alone that keeps its state, so that an interrupted run is continued; None: none is kept.

    The files are called snapshot-*; those of repeats lie in sub-folders seed-N.
    """
    snapshots_required: bool = True
    """Whether trouble with the snapshots ends the run. If not, it goes on without, and a `Progress.note` says so."""
    snapshot_every_s: float = 120.0
    """Seconds of training that an interrupted run may lose."""
    output: str | None = None
    """Where the trained student is written, as an ordinary network; None: nowhere."""


RESUMED = "resumed"
"""The phase of a run that has just found where it was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A sign of life: the student has seen `kimg` thousand images; `done` of 1.0 of the run is behind it.

    A run that goes on from a snapshot begins with one of the phase `RESUMED`.
    """

    kimg: float
    done: float
    phase: str
    loss: float | None = None
    note: str | None = None
    """One line for people, said once: something went wrong that does not end the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The metric's value after `kimg` thousand images; lower is better. The last one is the result."""

    kimg: int
    value: float
    done: float
    surrogate: float | None = None
    """The student's distance to its teacher on fixed noise, lower is better: paired, and cheaper than the metric.
    None: not measured."""
    evaluations: tuple[float, ...] = ()
    """On the last score: the metric on each of `Task.evaluation_seeds`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """On the last score: further figures of the trained student, by the names that the method gives them."""
    samples: bytes | None = None
    """On the last score: `Task.num_shown` images on the evaluation's first noise, and the teacher's below, as a PNG."""
    shares: tuple[float, ...] = ()
    """On the last score of a run whose rule learns: the shares of the branches that it ended with, a mean over the
    trained intervals."""
    repeats: tuple[tuple[int, int, float], ...] = ()
    """Scores on further training seeds, on the last event of a trial that has such: (seed, kimg, value)."""


Event = Progress | Score


def report_steps(budget_kimg: float, every_kimg: int) -> tuple[int, ...]:
    """The strictly increasing kimg at which a run is scored; the last is the budget, rounded up."""
    end = max(1, -(-round(budget_kimg * 1000) // 1000))
    return (*range(every_kimg, end, every_kimg), end)
