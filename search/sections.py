"""The sections of a study file that every method shares, each checked by itself."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from bdense_core.errors import BadValue
from search.settings import mask


class Section(BaseModel):
    """A part of a study file: unknown keys are refused, and nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EvaluationSection(Section):
    """How students are scored. All trials of a study share the samples' noise."""

    features: str = "digits"
    """A feature network: shipped, in the models folder, or a path. Its name makes the metric's: `fd-NAME`, or `fid`."""
    reference: str | None = None
    """Reference statistics, named likewise; default: those called as the features."""
    n_samples: int = Field(default=2000, ge=2)
    """Samples of each student; values of unlike numbers are not compared."""
    seed: int = 0
    """Of the samples' noise."""
    batch: int = Field(default=500, ge=1)
    """Samples that are made at once."""
    early_samples: int | None = Field(default=None, ge=2)
    """Samples of the scores before the last one, which may prune; default: as many as the last one's."""


class BudgetSection(Section):
    """How much is run."""

    trials: int = Field(default=12, ge=0)
    """Searched trials that end COMPLETE or PRUNED; controls come on top."""
    every_kimg: int = Field(default=2, ge=1)
    """A trial is scored, and may be pruned, each time its student has seen this many thousand images."""
    max_failures: int = Field(default=10, ge=1)
    """A launch gives up after so many failed trials: something is wrong with all of them."""


class SamplerSection(Section):
    """Who proposes. A key that a kind has no use for is ignored, so that `--set sampler.kind=` is all it takes."""

    kind: Literal["tpe", "gp", "cmaes", "qmc", "random", "grid"] = "tpe"
    startup_trials: int = Field(default=6, ge=0)
    """For `tpe`, `gp` and `cmaes`: ended trials, controls among them, before the sampler learns; random until then."""
    grid_points: int = Field(default=5, ge=2)
    """For `grid`: points along each searched axis, evenly spaced, both ends among them."""
    seed: int = 0
    """Of the proposals."""


class PrunerSection(Section):
    """Who stops a hopeless trial, judged on its intermediate scores. A key that a kind has no use for is ignored.

    Controls are never stopped.
    """

    kind: Literal["median", "percentile", "successive_halving", "hyperband", "none"] = "median"
    by: Literal["metric", "surrogate"] = "metric"
    """What trials are judged by on the way: the metric, or the student's distance to its teacher on fixed noise."""
    percentile: float = Field(default=50.0, gt=0, lt=100)
    """For `percentile`: trials worse than this share of the earlier ones stop."""
    startup_trials: int = Field(default=5, ge=0)
    """For `median` and `percentile`: finished trials before any is stopped."""
    warmup_kimg: int = Field(default=0, ge=0)
    """For `median` and `percentile`: no trial is stopped before it."""
    min_resource_kimg: int = Field(default=1, ge=1)
    """For `successive_halving` and `hyperband`: the first rung."""
    reduction_factor: int = Field(default=3, ge=2)
    """For the same: one trial in so many passes a rung, and each rung is so many times the one before it."""


class SeedsSection(Section):
    """Training seeds. Every trial uses the first; trials of one seed share noise, data order and targets."""

    training: int = Field(default=0, ge=0)
    """The first one; where more are wanted, those after it."""
    per_trial: int = Field(default=1, ge=1, le=100)
    """Seeds that each searched trial runs on; its value is their mean."""
    control_repeats: int = Field(default=2, ge=1, le=100)
    """Seeds that each control runs on: their spread is the study's noise floor. Its value is the mean of the first
    `per_trial`, as a trial's."""
    evaluation_repeats: int = Field(default=2, ge=1, le=100)
    """Evaluation seeds that each control is scored on in the end: the spread of the metric itself."""


class ResourcesSection(Section):
    """What one trial takes on a Ray node."""

    cpus: float = Field(default=1.0, gt=0)
    gpus: float = Field(default=0.0, ge=0)
    """A part of a GPU is possible; 0 trains on the CPU."""
    compile: bool = False
    """Whether networks go through torch.compile."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Images that go through the student at once in training, where a whole batch does not fit the device."""
    max_parallel: int | None = Field(default=None, ge=1)
    """Trials that one launcher runs at once; default: as many as there is room for."""


def _check_place(url: str | None, key: str) -> None:
    """Refuse what names no place, and a password, which the stored study would show."""
    if url is None:
        return
    if "://" not in url and not Path(url).is_absolute():
        raise BadValue(f"{key} {url!r} is neither a full path nor a URL; begin it with / or PROTOCOL://")
    if "://" in url and mask(url) != url:
        raise BadValue(
            f"{key} {mask(url)} holds a password, which a study file must not; leave it to the driver's own "
            "configuration on each node"
        )


class CacheSection(Section):
    """The teacher's trajectories, computed once for all trials."""

    enabled: bool = True
    """Without it every trial asks the teacher again: up to three times the work, and no disk."""
    budget_gb: float | None = Field(default=None, gt=0)
    """What all caches of the machine may take together; checked before one is filled."""
    url: str | None = None
    """An fsspec URL where nodes that share no BDENSE_HOME find each other's shards; each keeps its own copy."""

    def model_post_init(self, _context: object) -> None:
        _check_place(self.url, "cache.url")


class LeaseSection(Section):
    """When a trial counts as lost, and how often it is tried again."""

    heartbeat_s: int = Field(default=15, ge=1)
    """A trial that gets on is heard of at least so often."""
    grace_s: int = Field(default=180, ge=2)
    """A trial that was not heard of for so long is lost, and queued again."""
    max_retries: int = Field(default=2, ge=0)
    outage_s: int = Field(default=900, ge=0)
    """How long a launcher waits for a database that does not answer."""

    def model_post_init(self, _context: object) -> None:
        if self.grace_s <= 2 * self.heartbeat_s:
            raise BadValue(
                f"lease.grace_s ({self.grace_s}) must exceed twice lease.heartbeat_s ({self.heartbeat_s}), "
                "or healthy trials count as lost"
            )


class CheckpointSection(Section):
    """The state of running trials, which a trial that is tried again goes on from."""

    enabled: bool = True
    url: str | None = None
    """A path or an fsspec URL that all nodes can read and write; default: the launcher's BDENSE_HOME/checkpoints."""
    every_s: float = Field(default=120.0, ge=0)
    """Seconds of training that an interrupted trial may lose."""

    def model_post_init(self, _context: object) -> None:
        _check_place(self.url, "checkpoints.url")


Setting = StrictBool | StrictInt | StrictFloat | StrictStr
"""A value of a method's setting, which stays of its kind."""


class Arm(Section):
    """A weighting, with settings of its own, that a comparison runs on all of its seeds."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,80}$")
    weights: tuple[float, ...]
    settings: dict[str, Setting] = {}
    """Values of the method's settings that take the place of the study's."""
    is_trained: bool = True
    """Whether the training seed matters; if not, it is no evidence of training noise."""
    schedule: tuple[tuple[tuple[float, ...], ...], ...] = ()
    rule: Literal["fixed", "gate", "meta"] = "fixed"
    is_control: bool = False
    trial: int | None = None
    """The searched trial that it comes from."""
    source_value: float | None = None
    """Its score in the search that it comes from: the best ones were picked for it, so it flatters them."""
    confirmed_value: float | None = None
    """Its mean over the fresh seeds of that study's confirmation. None where it has not run on all of them."""


class ComparisonSection(Section):
    """Fixed weightings, each on the same fresh seeds, instead of a search: what `confirm` and `transfer` run."""

    kind: Literal["confirm", "transfer"]
    of: str
    """The study whose weightings these are."""
    of_created: str
    """When that study was made: another one of its name is another one."""
    target: str
    """The study whose settings they run with; for a confirmation that very one."""
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    """Training seeds, none of which the search has seen; each has an evaluation seed of its own as well."""
    widened: int = 0
    """How often arms or seeds were added once it had begun: whoever looks before asking for more has more chances."""

    def model_post_init(self, _context: object) -> None:
        for what, values in (("arms", [arm.name for arm in self.arms]), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise BadValue(f"two {what} of a comparison are called the same: {', '.join(map(str, values))}")

    def joined(self, wanted: "ComparisonSection") -> "ComparisonSection":
        """This comparison with the arms and seeds of another one that it lacks.

        Raises:
            BadValue: the other one means something else by the same names.
        """
        mine, theirs = ((part.kind, part.of, part.of_created, part.target) for part in (self, wanted))
        if mine != theirs:
            raise BadValue(f"it compares weightings of {self.of!r} as it was made on {self.of_created}, not these")
        known = {arm.name: arm for arm in self.arms}
        for arm in wanted.arms:
            same = known.get(arm.name, arm)
            if any(
                getattr(same, key) != getattr(arm, key)
                for key in ("weights", "settings", "is_trained", "schedule", "rule")
            ):
                raise BadValue(f"it has other weights or settings called {arm.name}")
        confirmed = {arm.name: arm.confirmed_value for arm in wanted.arms}
        if all(confirmed.get(arm.name, arm.confirmed_value) == arm.confirmed_value for arm in self.arms):
            arms = self.arms
        else:  # a confirmation that has gone on since: means over other seeds are not beside these
            arms = tuple(arm.model_copy(update={"confirmed_value": confirmed.get(arm.name)}) for arm in self.arms)
        new_arms = tuple(arm for arm in wanted.arms if arm.name not in known)
        seeds = (*self.seeds, *(seed for seed in wanted.seeds if seed not in self.seeds))
        widened = self.widened + bool(new_arms or len(seeds) > len(self.seeds))
        return self.model_copy(update={"arms": (*arms, *new_arms), "seeds": seeds, "widened": widened})
