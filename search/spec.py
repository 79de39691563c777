"""What a study is: the sections of its file, and the resolved study that everything else works with."""

import difflib
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from bdense_core import assets
from bdense_core.errors import BadValue, ConfigError, UnknownKey
from bdense_core.files import HashedFile, sha256_of
from bdense_core.methods import AnyMethod
from bdense_core.methods.base import Axis
from bdense_core.network_config import NetworkConfig
from bdense_core.task import Evaluation, Task
from bdense_core.weights import Rule, Schedule, Weights, checked, uniform
from search import constraints, tuning
from search.constraints import Constraint
from search.records import ARM, CONTROL, Params
from search.sections import (
    Arm,
    BudgetSection,
    CacheSection,
    CheckpointSection,
    ComparisonSection,
    EvaluationSection,
    LeaseSection,
    PrunerSection,
    ResourcesSection,
    SamplerSection,
    Section,
    SeedsSection,
)
from search.space import Axes, LogLinear, SearchSpace, family_of, free_axes


def _or_nothing(section: Any) -> Any:
    """An empty section of a file is a section with nothing in it."""
    return {} if section is None else section


LONGEST_NAME = 80
"""Characters of a study's name."""


class StudySpec(Section):
    """One study file."""

    name: str = Field(pattern=rf"^[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}$")
    """What the study is called in its database: letters, digits, `.`, `_` and `-`."""
    description: str = ""
    dataset: str = "digits"
    """What the teacher was trained on, to notice a teacher of something else; and what a method trains on that needs
    data: a known name, or a path relative to the study file."""
    method: Annotated[AnyMethod, Field(discriminator="kind")]
    teacher: str | None = None
    """A teacher: shipped, in the models folder, or a path relative to the study file."""
    evaluation: EvaluationSection | None = None
    space: SearchSpace = LogLinear()
    tune: Annotated[dict[str, Any], BeforeValidator(_or_nothing)] = Field(default_factory=dict)
    """Settings of the method that are searched beside the weights, by their names: a range [low, high] or a list of
    choices, or nothing for all that the method allows, which then stands here."""
    constraints: Annotated[dict[str, Constraint], BeforeValidator(_or_nothing)] = Field(default_factory=dict)
    """Bounds of the method's further figures: a trial that misses one is never the best."""
    budget: BudgetSection = BudgetSection()
    sampler: SamplerSection = SamplerSection()
    pruner: PrunerSection = PrunerSection()
    seeds: SeedsSection = SeedsSection()
    resources: ResourcesSection = ResourcesSection()
    cache: CacheSection = CacheSection()
    checkpoints: CheckpointSection = CheckpointSection()
    lease: LeaseSection = LeaseSection()
    experimental: tuple[Literal["gate", "meta"], ...] = ()
    """Rules that learn their weights in training, run beside the controls."""
    comparison: ComparisonSection | None = None
    """Written by `bdense-weights confirm` and `transfer`; it grows when they are asked for more."""

    def model_post_init(self, _context: object) -> None:
        if self.tune:  # what is not said is the method's, as long as this study lives: another version may say other
            object.__setattr__(self, "tune", tuning.narrowed(self.method, self.tune, self.axes))
        constraints.check(self.constraints, self.method.metrics())
        if unknown := [rule for rule in self.experimental if rule not in self.method.rules]:
            raise BadValue(
                f"experimental names {', '.join(unknown)}, but the method {self.method.kind} learns its weights by "
                f"{' or '.join(self.method.rules) or 'no rule'}; leave it out"
            )

    @property
    def num_intervals(self) -> int:
        """Trained intervals of the student: what a `Schedule` may tell apart."""
        return self.method.num_intervals

    @property
    def axes(self) -> Axes:
        """Name and range of each parameter of a proposal that its weights come from."""
        return self.space.axes(len(self.method.terms), self.num_intervals)

    @property
    def tuned(self) -> dict[str, Axis]:
        """The method's settings that are searched beside the weights."""
        return tuning.resolved(self.method, self.tune)

    @property
    def searched(self) -> dict[str, Axis]:
        """All that is searched, weights first: axes of more than one point."""
        weights = {
            name: Axis(about="of the weights", low=low, high=high) for name, (low, high) in free_axes(self.axes).items()
        }
        return weights | self.tuned

    @property
    def steps(self) -> tuple[int, ...]:
        """The kimg at which a trial is scored."""
        return self.method.steps(self.budget.every_kimg)


EDITABLE = (
    "description",
    "budget.trials",
    "budget.max_failures",
    "resources.cpus",
    "resources.gpus",
    "resources.max_parallel",
    "cache",
    "checkpoints",
    "lease",
)
"""Keys that people may change in a study that exists: they touch no result. (Gaining or losing GPUs does.)"""
MUTABLE = ("comparison", *EDITABLE)
"""Keys that may change between two launches of one study."""

_NUM_SHOWN = 16
"""Images of a student that are kept to be looked at; searched trials keep none."""

_MEANT: dict[str, dict[str, Any]] = {"sfd": {"targets": "float32"}}
"""What a study meant, by method, that was stored before these settings existed."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A resolved study: the specification, and the files it names with their hashes."""

    spec: StudySpec
    teacher: HashedFile | None
    evaluation: Evaluation | None
    dataset: str | None = None
    """The data set of a method that trains on one: a known name, or a full path."""
    missing: tuple[str, ...] = field(default=(), compare=False)
    """What is not on this machine, and how to get it; empty unless it was asked to be tolerated."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def metric(self) -> str:
        """What the values are called."""
        if self.evaluation:
            return self.evaluation.protocol.metric
        return f"{self.spec.method.kind}-score"

    @property
    def num_branches(self) -> int:
        return len(self.spec.method.terms)

    @property
    def steps(self) -> tuple[int, ...]:
        """The kimg at which a trial is scored."""
        return self.spec.steps

    @property
    def early_is_other(self) -> bool:
        """Whether scores on the way, which pruned trials end with, are of other samples than final ones.

        Of other numbers of them, or of students that make theirs in other numbers of steps.
        """
        if set(self._nfe_early.values()) - {self.spec.method.nfe}:
            return True
        return self.evaluation is not None and self.evaluation.early_samples not in (None, self.evaluation.n_samples)

    def nfe_at(self, step: int) -> int:
        """Network calls for each image that the metric at this kimg is of; at the end they are the method's."""
        return self._nfe_early.get(step, self.spec.method.nfe)

    @cached_property
    def _nfe_early(self) -> dict[int, int]:
        """`nfe_at` all steps but the last, where a method's calls are those of further figures, too."""
        calls = self.spec.method.calls_to_score(self.spec.budget.every_kimg)
        return dict(zip(self.steps[:-1], calls[:-1], strict=True))

    @property
    def num_intervals(self) -> int:
        """Trained intervals of the student: what a `Schedule` may tell apart."""
        return self.spec.num_intervals

    def controls(self) -> dict[str, Arm]:
        """What every search runs beside its trials, by name. In a comparison rules that learn are candidates.

        What is tuned has the study's own value in them, where a control has no other.
        """
        tuned = {name: value for name in self.spec.tune if (value := getattr(self.spec.method, name)) is not None}
        arms = {
            name: Arm(
                name=name, weights=checked(control.weights), settings=tuned | dict(control.settings),
                is_trained=control.is_trained, is_control=True,
            )
            for name, control in self.spec.method.controls().items()
        }  # fmt: skip
        begin = uniform(self.num_branches)
        for rule in self.spec.experimental:
            arms[rule] = Arm(name=rule, weights=begin, settings=tuned, rule=rule)
        return arms

    def settings_of(self, params: Params) -> dict[str, Any]:
        """The part of a proposal's parameters that are settings of the method."""
        return {name: params[name] for name in self.spec.tune}

    def params_of(self, arm: Arm, *, within_ranges: bool = True) -> Params | None:
        """The proposal that an arm is, or None where the search does not hold it; without ranges, it may lie outside.

        So a control that could have been proposed becomes known to the sampler. One that is not trained, or has
        settings that are not tuned, could not.
        """
        tuned = self.spec.tuned
        if arm.schedule or arm.rule != "fixed" or not arm.is_trained or not arm.settings.keys() <= tuned.keys():
            return None
        weights = self.spec.space.params_of(arm.weights, self.num_intervals, within_ranges=within_ranges)
        is_held = all(tuning.holds(axis, arm.settings.get(name)) for name, axis in tuned.items())
        return None if weights is None or (within_ranges and not is_held) else {**weights, **arm.settings}

    def excesses(self, metrics: dict[str, float]) -> list[float]:
        """By how much a trial with these figures misses each bound of the constraints; it keeps one at 0 or less."""
        return constraints.excesses(self.spec.constraints, metrics)

    def violations(self, metrics: dict[str, float]) -> tuple[str, ...]:
        """The study's constraints that a trial with these figures does not keep."""
        return constraints.violated(self.spec.constraints, metrics)

    def trial_seeds(self) -> tuple[int, ...]:
        """Training seeds of a searched trial."""
        return self._seeds(self.spec.seeds.per_trial)

    def control_seeds(self) -> tuple[int, ...]:
        """Training seeds of a control: a searched trial's and more."""
        return self._seeds(max(self.spec.seeds.control_repeats, self.spec.seeds.per_trial))

    def all_seeds(self) -> tuple[int, ...]:
        """Training seeds of whatever the study runs."""
        return self.spec.comparison.seeds if self.spec.comparison else self.control_seeds()

    def fixed_runs(self) -> tuple[tuple[str, tuple[int, ...], Arm], ...]:
        """What the study runs beside its search: role, training seeds and weighting of each trial.

        A comparison goes seed by seed, so that what is compared is paired from early on.
        """
        if self.spec.comparison is None:
            return tuple((CONTROL + name, self.control_seeds(), arm) for name, arm in self.controls().items())
        seeds, arms = self.spec.comparison.seeds, self.spec.comparison.arms
        return tuple((ARM + arm.name, (seed,), arm) for seed in seeds for arm in arms)

    def _seeds(self, count: int) -> tuple[int, ...]:
        return tuple(self.spec.seeds.training + i for i in range(count))

    def cache_bytes(self, network: NetworkConfig) -> float:
        """What the teacher caches take, one for each training seed; nothing if they are switched off."""
        if not self.spec.cache.enabled:
            return 0.0
        row = self.spec.method.cache_bytes(network.img_channels * network.img_resolution**2)
        return row * self.spec.method.budget_kimg * 1000 * len(self.all_seeds())

    def protocol_hash(self) -> str:
        """What the study's values may be compared with: only values of the same hash."""
        if self.evaluation is None:
            return sha256_of({"metric": self.metric})[:16]
        return self.evaluation.protocol.hash()[:16]

    def edited(self, values: dict[str, Any]) -> "Study":
        """The study with other values for some dotted keys.

        Raises:
            ConfigError: what is wrong with them.
        """
        spec = self.spec.model_dump(mode="json")
        for key, value in values.items():
            *parents, last = key.split(".")
            section = spec
            for parent in parents:
                section = section.setdefault(parent, {})
                if not isinstance(section, dict):
                    raise BadValue(f"{key}: {parent} is a value, not a section")
            section[last] = value
        return replace(self, spec=validate(spec, "the edited study"))

    def task(
        self, weights: Weights, seed: int, *, cache_root: Path, schedule: Schedule = (), rule: Rule = "fixed",
        is_search: bool = True,
    ) -> Task:  # fmt: skip
        """One distillation of this study, on the device that its resources name.

        In a comparison each training seed has an evaluation seed of its own, so that intervals cover both noises.
        """
        evaluation, further = (
            self.evaluation,
            0 if is_search or self.spec.comparison else self.spec.seeds.evaluation_repeats,
        )
        if evaluation is not None and self.spec.comparison is not None:
            evaluation = replace(evaluation, seed=evaluation.seed + seed)
        return Task(
            weights=weights,
            schedule=schedule,
            rule=rule,
            seed=seed,
            every_kimg=self.spec.budget.every_kimg,
            teacher=self.teacher,
            dataset=self.dataset,
            evaluation=evaluation,
            evaluation_seeds=tuple((evaluation.seed if evaluation else 0) + i for i in range(1, further)),
            num_shown=0 if is_search else _NUM_SHOWN,
            cache_root=str(cache_root) if self.spec.cache.enabled else None,
            cache_budget_gb=self.spec.cache.budget_gb,
            cache_url=self.spec.cache.url,
            device="cuda" if self.spec.resources.gpus > 0 else "cpu",
            compile=self.spec.resources.compile,
            micro_batch=self.spec.resources.micro_batch,
            snapshot_every_s=self.spec.checkpoints.every_s,
        )

    def to_dict(self) -> dict[str, Any]:
        """All values, JSON-able: what is stored with the study and with every export."""
        files = {
            "teacher": asdict(self.teacher) if self.teacher else None,
            "evaluation": asdict(self.evaluation) if self.evaluation else None,
        } | ({"dataset": {"path": self.dataset}} if self.dataset else {})  # a path is this machine's affair
        return {**self.spec.model_dump(mode="json"), "files": files}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Study":
        """The study that `to_dict` described.

        Raises:
            ConfigError: it was stored by an incompatible version.
        """
        files = stored.get("files", {})
        meant = _MEANT.get(_dig(stored, "method", "kind"), {})
        stored = stored | {"method": meant | stored.get("method", {})}
        teacher, evaluation = files.get("teacher"), files.get("evaluation")
        return cls(
            spec=validate(
                {key: value for key, value in stored.items() if key != "files"},
                f"the stored study {stored.get('name')!r}",
            ),
            teacher=assets.here(HashedFile(**teacher)) if teacher else None,
            evaluation=Evaluation(
                **{
                    **evaluation,
                    "features": assets.here(HashedFile(**evaluation["features"])),
                    "reference": assets.here(HashedFile(**evaluation["reference"])),
                }
            )
            if evaluation
            else None,
            dataset=(files.get("dataset") or {}).get("path"),
        )

    def identity(self) -> dict[str, Any]:
        """What results depend on: the resolved study without its name, machine paths and `MUTABLE` keys."""
        return identity_of(self.to_dict())

    def sha256(self) -> str:
        return sha256_of(self.identity())


def identity_of(resolved: dict[str, Any]) -> dict[str, Any]:
    """The flat dotted form of a resolved study, less all that no result depends on."""
    ignored = ("name", "teacher", "evaluation.features", "evaluation.reference", *MUTABLE)
    kept = {
        key: value
        for key, value in flatten(resolved).items()
        if not any(key == prefix or key.startswith(prefix + ".") for prefix in ignored)
        and not key.endswith(".path")
        and value != {}  # a section with nothing in it
    }
    return kept | {"device": "cuda" if _dig(resolved, "resources", "gpus") else "cpu"}


def mutable_values(study: Study) -> dict[str, Any]:
    """The keys that may change in a study that exists, dotted, with their values."""
    flat = flatten(study.spec.model_dump(mode="json"))
    return {
        key: value for key, value in flat.items() if any(key == name or key.startswith(name + ".") for name in MUTABLE)
    }


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One line for each key of the identities of two resolved studies that differs."""
    old, new = identity_of(stored), identity_of(wanted)
    return [
        f"{key}: stored {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def validate(values: dict[str, Any], source: str) -> StudySpec:
    """A specification from plain values.

    Raises:
        ConfigError: the first thing that is wrong with them, in words for people; `source` says where it stands.
    """
    try:
        return StudySpec.model_validate(values)
    except ValidationError as error:
        raise _readable(error, values, source) from error


def _readable(error: ValidationError, values: dict[str, Any], source: str) -> ConfigError:
    """The first complaint of pydantic in our words: which key, what is wrong, what is known."""
    complaint = error.errors()[0]
    kind, family = _dig(values, "method", "kind"), family_of(values.get("space"))
    parts = [str(part) for part in complaint["loc"]]
    if len(parts) > 1 and (parts[0], parts[1]) in (("method", kind), ("space", family)):
        del parts[1]
    if parts[:2] == ["space", "u"]:  # whether it is one range or one for each axis
        del parts[2:3]
    key = ".".join(parts)
    if complaint["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = known_keys(kind, family)
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        return UnknownKey(f"unknown key {key} in {source}; did you mean {nearest[0]}?")
    if complaint["type"] == "missing":
        return BadValue(f"{source} lacks the key {key}; add it")
    if complaint["type"] == "union_tag_invalid":
        named = f"space.family {family!r}" if key == "space" else f"method.kind {kind!r}"
        return BadValue(f"{source}: unknown {named}; known: {complaint['ctx']['expected_tags']}")
    if complaint["type"] == "union_tag_not_found":
        return BadValue(f"{source} lacks the key method.kind; add it, for example `kind: sfd`")
    return BadValue(f"{key} in {source}: {complaint['msg']}; got {complaint['input']!r}")


def _dig(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def known_keys(*kinds: str | None) -> list[str]:
    """Every dotted key that a study file may have, with the settings of the method and the family named, or of all."""
    return sorted(_keys_of(StudySpec, "", kinds))


def _keys_of(model: Any, prefix: str, kinds: tuple[str | None, ...]) -> set[str]:
    keys = set()
    for name, annotation in typing.get_type_hints(model).items():
        if name.startswith("model_"):
            continue
        if typing.get_origin(annotation) is dict and _is_section(named := typing.get_args(annotation)[1]):
            keys |= _keys_of(named, f"{prefix}{name}.NAME.", kinds)
        sections = [t for t in _members(annotation) if _is_section(t)]
        if len(sections) > 1 and any(_kind_of(t) in kinds for t in sections):
            sections = [t for t in sections if _kind_of(t) in kinds]
        if not sections or type(None) in _members(annotation):
            keys.add(prefix + name)
        for section in sections:
            keys |= _keys_of(section, f"{prefix}{name}.", kinds)
    return keys


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _is_section(candidate: Any) -> bool:
    return isinstance(candidate, type) and (issubclass(candidate, BaseModel) or is_dataclass(candidate))


def _kind_of(section: Any) -> Any:
    """The name of a method or of a family of weights."""
    if is_dataclass(section):
        return next((f.default for f in fields(section) if f.name == "kind"), None)
    return section.model_fields["family"].default if "family" in section.model_fields else None


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
