"""What every distillation method fulfils. No torch here: the service reads it.

All methods are: frozen teacher -> non-negative weights on named loss terms -> student -> sampler -> distance.
"""

from collections.abc import Generator
from typing import Protocol

from bdense_core.task import Event, Task
from bdense_core.weights import Rule, Weights


class Method(Protocol):
    """A distillation method: a frozen dataclass with the settings a study file may give."""

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
    def nfe(self) -> int:
        """Network calls for each generated image."""

    @property
    def budget_kimg(self) -> float:
        """Thousands of images that the student sees."""

    def controls(self) -> dict[str, Weights]:
        """Weights that every study runs beside its search, by name."""

    def forward_units(self) -> tuple[float, float]:
        """Network evaluations for each image, (teacher's, student's); a backward pass counts as two."""

    def learning_units(self, rule: Rule) -> float:
        """What a rule that learns its weights adds to the student's, for each image; 0 for fixed weights."""

    def cache_bytes(self, image_values: int) -> float:
        """What one trajectory takes in the teacher cache; 0 without one.

        Args:
            image_values: channels times pixels of an image.
        """

    def run(self, task: Task) -> Generator[Event, None, None]:
        """Distil one student and score it as it trains; the last event is a `Score` at the whole budget.

        Raises:
            BDenseError: a damaged file, a diverging loss, or too few samples.
        """
