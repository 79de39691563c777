"""DASH (arXiv 2606.00798): a small student of a guided diffusion model, matched in both of its branches.

"Branch" in that paper is one of two evaluations of the one network, with a class and with the null class that
guidance subtracts; here they are loss terms. The loop is in `bdense_core/loops/dash_run.py`.
"""

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from bdense_core.errors import BadValue
from bdense_core.methods.base import Axis, Control
from bdense_core.network_config import NetworkConfig
from bdense_core.task import Event, Task, report_steps
from bdense_core.weights import Rule

NUM_TIMES = 1000
"""T of the cosine schedule that the networks are for."""
_KINDS = {
    "guidance": float | int,
    "tag": bool,
    "tag_min": float | int,
    "tag_beta": float | int,
    "sampling_steps": int,
    "eta": float | int,
    "clip": float | int | None,
}
SAMPLING = tuple(_KINDS)
"""Settings of sampling alone: one trained student serves all their values."""
_FRACTIONS = ("ema", "dropout", "label_dropout", "held_out")
_POSITIVE = (
    "lr",
    "grad_clip",
    "batch",
    "budget_kimg",
    "gamma",
    "tau",
    "student_channels",
    "student_blocks",
    "num_pairs",
)

Sampling = dict[str, float | int | bool | None]
"""Values for some of `SAMPLING`, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DASH:
    """Defaults are those of the authors' configuration for CIFAR-10 (spec/methods.md 3).

    Where their README of August differs it is said; its number of epochs (300) is taken, 15,000 kimg.
    """

    kind: Literal["dash"] = "dash"
    lr: float = 2e-4
    """1e-4 in the README. It falls as a cosine to `lr_min`, once per epoch of the data set."""
    lr_min: float = 1e-6
    weight_decay: float = 1e-3
    ema: float = 0.9995
    """What the moving average keeps in each update; 0.9990 in the README. The average is what is scored."""
    grad_clip: float = 1.0
    """The gradient's largest norm. It would give the weights' common factor a meaning: they are taken relative to
    `im`."""
    batch: int = 64
    budget_kimg: float = 15000.0
    objective: Literal["dash", "composite", "scratch"] = "dash"
    """What `im` matches: the conditional prediction; the guided one, at the guidance of sampling (inferred from the
    paper's "composite" baseline); or the true noise with labels dropped, without a teacher."""
    curriculum: Literal["uniform", "min_snr", "clipped_snr", "tirt", "tirt_tempered"] = "tirt"
    """How much each timestep counts (see `bdense_core.tirt`); `tirt` is the teacher's, frozen."""
    gamma: float = 5.0
    """The limit of the signal-to-noise ratio in all curricula but `uniform`."""
    tau: float = 1.0
    """The temperature of `tirt_tempered`."""
    dropout: float = 0.1
    label_dropout: float = 0.1
    """Of the objective `scratch` alone: the others bypass it."""
    student_channels: int = 64
    student_blocks: int = 1
    """The student is otherwise built as its teacher is."""
    max_parameters: int | None = None
    """A run whose student has more ends before it begins."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in; weights stay float32. The authors: float16 with loss scaling."""
    held_out: float = 0.1
    """Share of the data set that is not trained on: the guidance gap is measured there."""
    num_pairs: int = 10000
    """Noisy images on which the guidance gap is measured."""
    guidance: float = 4.0
    """w, 1 is none; with `tag` its upper end."""
    tag: bool = True
    """Whether guidance varies over time (`guidance.tag_weight`), as in the authors' evaluation."""
    tag_min: float = 1.0
    tag_beta: float = 5.0
    sampling_steps: int = 50
    """Of DDIM; where they do not divide 1000 there are a few more."""
    eta: float = 0.0
    clip: float | None = 1.0
    """The limit of the image in each step of sampling; None: no limit."""
    also_sampled: tuple[Sampling, ...] = ()
    """Further settings of sampling at which the trained student is scored: figures called `fd[guidance=1]`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "also_sampled", tuple(self.also_sampled))
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise BadValue(f"method.{name} must be positive, got {getattr(self, name)}")
        for name in _FRACTIONS:
            if not 0 <= getattr(self, name) < 1:
                raise BadValue(f"method.{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.lr_min <= self.lr:
            raise BadValue(f"method.lr_min must lie in [0, lr = {self.lr}], got {self.lr_min}")
        if self.weight_decay < 0:
            raise BadValue(f"method.weight_decay must not be negative, got {self.weight_decay}")
        if not 1 <= self.sampling_steps <= NUM_TIMES:
            raise BadValue(f"method.sampling_steps must be 1 to {NUM_TIMES}, got {self.sampling_steps}")
        if not 0 <= self.eta <= 1 or (self.clip is not None and not self.clip > 0):
            raise BadValue(f"method.eta must lie in [0, 1] and clip be positive or null, got {self.eta}, {self.clip}")
        for also in self.also_sampled:
            self.sampled_at(also)

    def sampled_at(self, also: Sampling) -> "DASH":
        """The method with other settings of sampling.

        Raises:
            BadValue: a name or a value that sampling does not have.
        """
        if unknown := [name for name in also if name not in SAMPLING]:
            raise BadValue(f"method.also_sampled names {', '.join(unknown)}; sampling has {', '.join(SAMPLING)}")
        for name, value in also.items():
            if not isinstance(value, _KINDS[name]) or isinstance(value, bool) != (name == "tag"):
                raise BadValue(f"method.also_sampled has {name}: {value!r}; give what method.{name} takes")
        return dataclasses.replace(self, also_sampled=(), **also)  # type: ignore[arg-type]

    @property
    def terms(self) -> tuple[str, ...]:
        """Anchor: the true noise, with the class. Unconditional: the teacher's, without. Imitation: with the class."""
        return ("an", "un", "im")

    @property
    def target_space(self) -> str:
        return "eps"

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def nfe(self) -> int:
        """Two for each step of DDIM; one where guidance is 1, which the conditional prediction is."""
        num_steps = len(range(0, NUM_TIMES, NUM_TIMES // self.sampling_steps))
        return num_steps if self.guidance == 1 and (not self.tag or self.tag_min == 1) else 2 * num_steps

    @property
    def num_intervals(self) -> int:
        return 1

    @property
    def num_iterations(self) -> int:
        """Batches in the budget, the last one whole."""
        return -(-round(self.budget_kimg * 1000) // self.batch)

    def steps(self, every_kimg: int) -> tuple[int, ...]:
        return report_steps(self.budget_kimg, every_kimg)

    def controls(self) -> dict[str, Control]:
        """The paper's baselines that need no other loop, parts left out, and the authors' own weights."""
        return {
            "scratch": Control(weights=(0.0, 0.0, 1.0), settings={"objective": "scratch"}),
            "conditional_only": Control(weights=(0.1, 0.0, 1.0)),
            "composite": Control(weights=(0.0, 0.0, 1.0), settings={"objective": "composite"}),
            "no_anchor": Control(weights=(0.0, 1.0, 1.0)),
            "authors": Control(weights=(0.1, 1.0, 1.0)),
        }

    def axes(self) -> dict[str, Axis]:
        curricula = ("uniform", "min_snr", "clipped_snr", "tirt", "tirt_tempered")
        return {
            "lr": Axis(about="AdamW's learning rate at the start", low=5e-5, high=5e-4, log=True),
            "weight_decay": Axis(about="AdamW's weight decay", low=1e-5, high=1e-1, log=True),
            "ema": Axis(about="what the moving average of the weights keeps", choices=(0.99, 0.999, 0.9995, 0.9999)),
            "gamma": Axis(about="the limit of the signal-to-noise ratio", choices=(1.0, 3.0, 5.0, 10.0)),
            "curriculum": Axis(about="how much each timestep counts", choices=curricula),
            "tau": Axis(about="the temperature of tirt_tempered", low=0.25, high=4.0, log=True),
            "dropout": Axis(about="dropout in the student", low=0.0, high=0.3),
            "student_channels": Axis(about="the student's width; see max_parameters", choices=(8, 16, 32, 64, 96, 128)),
            "student_blocks": Axis(about="the student's blocks a level", low=1, high=3, integer=True),
        }

    def metrics(self) -> dict[str, str]:
        return {
            "rho": "mean size of the student's guidance gap over the teacher's, on held-out images; 1 is the teacher's",
            "cos": "mean cosine of the student's guidance gap and the teacher's",
            "gap_mse": "mean squared difference of the two guidance gaps, a pixel's mean",
        } | {sampling_name(also): f"the metric where {_words(also)}" for also in self.also_sampled}

    def calls_to_score(self, every_kimg: int) -> tuple[int, ...]:
        further = sum(self.sampled_at(also).nfe for also in self.also_sampled)
        return (*(self.nfe for _ in self.steps(every_kimg)[:-1]), self.nfe + further)

    def student_network(self, teacher: NetworkConfig) -> NetworkConfig:
        """The teacher's at the method's size; labels are dropped only where there is no teacher to match."""
        return dataclasses.replace(
            teacher,
            model_channels=self.student_channels,
            num_blocks=self.student_blocks,
            dropout=self.dropout,
            label_dropout=self.label_dropout if self.objective == "scratch" else 0.0,
        )

    def forward_units(self) -> tuple[float, float]:
        """Per image: both predictions of the teacher, and both of the student with their gradients."""
        return (0.0, 3.0) if self.objective == "scratch" else (2.0, 6.0)

    @property
    def rules(self) -> tuple[Rule, ...]:
        return ()

    def cache_bytes(self, image_values: int) -> float:
        """The teacher is asked again in each run: its two predictions are as large as the image, and cheap."""
        return 0.0

    def run(self, task: Task) -> Generator[Event, None, None]:
        from bdense_core.loops import dash_run

        return dash_run.run(self, task)


def sampling_name(also: Sampling) -> str:
    """What the metric at other settings of sampling is called, `fd[guidance=1,tag=false]`."""
    return f"fd[{_words(also)}]"


def _words(also: Sampling) -> str:
    return ",".join(f"{name}={_word(value)}" for name, value in also.items())


def _word(value: float | bool | None) -> str:
    return {True: "true", False: "false", None: "none"}[value] if isinstance(value, bool | None) else f"{value:g}"
