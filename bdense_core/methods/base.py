"""What every distillation method fulfils. No torch here: the service reads it.

All methods are: frozen teacher -> non-negative weights on named loss terms -> student -> sampler -> figures.
"""

import dataclasses
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from bdense_core.errors import BadValue, UnknownKey
from bdense_core.network_config import NetworkConfig
from bdense_core.task import Event, Task
from bdense_core.weights import Rule, Weights

Settings = Mapping[str, Any]
"""Other values for some of a method's settings: numbers, text or truth values, by the names of its fields."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """What every study runs beside its search."""

    weights: Weights
    settings: Settings = field(default_factory=dict)
    is_trained: bool = True
    """Whether the training seed matters. If not, its spread over training seeds says nothing of theirs."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting that a study may search beside the weights: a range, or some choices."""

    about: str
    """What it is, in one line for people."""
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    integer: bool = False
    choices: tuple[float | int | str | bool, ...] = ()
    """If there are any, they take the place of the range."""


class Method(Protocol):
    """A distillation method: a frozen dataclass with the settings that a study file may give."""

    @property
    def kind(self) -> str: ...

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms that weights apply to; the last is the primary one."""

    @property
    def target_space(self) -> str:
        """The space of the losses: "state", "x", "v" or "eps". Weights do not transfer between spaces."""

    @property
    def needs_teacher(self) -> bool:
        """Whether a study must name a teacher and an evaluation."""

    @property
    def needs_data(self) -> bool:
        """Whether it trains on the study's data set."""

    @property
    def nfe(self) -> int:
        """Network calls for each generated image."""

    @property
    def num_intervals(self) -> int:
        """Trained parts of the student's trajectory whose weights a `Schedule` may tell apart; at least 1."""

    @property
    def budget_kimg(self) -> float:
        """Thousands of images that the student sees."""

    def steps(self, every_kimg: int) -> tuple[int, ...]:
        """The strictly increasing kimg at which a run is scored; the last is the budget, rounded up.

        Args:
            every_kimg: how often, where the method has no places of its own for it.
        """

    def controls(self) -> dict[str, Control]:
        """What every study runs beside its search, by name."""

    def axes(self) -> dict[str, Axis]:
        """The settings that may be searched, by the names of their fields. None is of sampling alone."""

    def metrics(self) -> dict[str, str]:
        """The figures on a run's last score beside the metric, and what each is, in one line for people."""

    def calls_to_score(self, every_kimg: int) -> tuple[int, ...]:
        """Network calls for each image that is scored, at each of `steps`.

        Those before the last are the metric's alone, so they are the NFE of that score; the last has all `metrics`.
        """

    def student_network(self, teacher: NetworkConfig) -> NetworkConfig:
        """The student's network, up to its heads, beside that of a teacher: what a plan counts its work by."""

    def forward_units(self) -> tuple[float, float]:
        """Network evaluations for each image, (teacher's, student's); a backward pass counts as two."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules by which a run can learn its weights; a study may have them run under `experimental`."""

    def cache_bytes(self, image_values: int) -> float:
        """What the teacher cache takes for each image of the budget; 0 without one.

        Args:
            image_values: channels times pixels of an image.
        """

    def run(self, task: Task) -> Generator[Event, None, None]:
        """Distil one student and score it as it trains; the last event is a `Score` at the whole budget.

        Raises:
            BDenseError: a damaged file, a diverging loss, or too few samples.
        """


AMethod = TypeVar("AMethod", bound=Method)


def with_settings(method: AMethod, settings: Settings) -> AMethod:
    """The method with other values for some of its settings.

    Raises:
        UnknownKey: a setting that it does not have.
        BadValue: a value that it refuses.
    """
    if not settings:
        return method
    names = {found.name for found in dataclasses.fields(method)}  # type: ignore[arg-type]
    for name in settings:
        if name not in names or name == "kind":
            raise UnknownKey(f"the method {method.kind} has no setting {name}; it has {', '.join(sorted(names))}")
    try:
        return dataclasses.replace(method, **settings)  # type: ignore[type-var]
    except TypeError as error:
        raise BadValue(f"the method {method.kind} refuses {dict(settings)}: {error}") from error
