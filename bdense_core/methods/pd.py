"""Progressive distillation (arXiv 2202.00512) and its dense form B-DENSE (arXiv 2602.15971): settings and cost.

The loop itself is in `bdense_core/loops/pd_run.py`, so that reading a study file needs no torch.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, get_args

from bdense_core.errors import BadValue
from bdense_core.methods.base import Axis, Control
from bdense_core.network_config import NetworkConfig
from bdense_core.task import Event, Task
from bdense_core.weights import Rule, endpoint_only, uniform

Weighting = Literal["constant", "snr", "snr_trunc", "v_mse"]
"""Of the squared error of the image: 1, SNR (the error of the noise), max(SNR, 1), or SNR + 1 (the error of v)."""
_POSITIVE = ("start_steps", "nfe", "num_branches", "lr", "batch", "budget_kimg", "clip_norm")


@dataclass(frozen=True, kw_only=True, slots=True)
class PD:
    """Defaults are those of B-DENSE's Table 1 where they are known, else PD's own for CIFAR-10 (spec 1, 2.1)."""

    kind: Literal["pd"] = "pd"
    start_steps: int = 1024
    """DDIM steps of the first teacher."""
    nfe: int = 128
    """Steps of the last student; each stage divides the number by `teacher_steps`."""
    teacher_steps: int = 2
    """Steps of the teacher for each of its student; at least 2."""
    num_branches: int = 2
    """K, which divides `teacher_steps`; 1 is plain PD."""
    lr: float = 2e-4
    lr_decay: Literal["linear", "none"] = "linear"
    """Within each stage: to 0, or not at all."""
    batch: int = 128
    budget_kimg: float = 19200.0
    """Of all stages together: 50,000 batches each."""
    weighting: Weighting = "snr_trunc"
    """Of the squared error of the image: 1, SNR (the error of the noise), max(SNR, 1), or SNR + 1 (the error of v)."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """What the norm of all gradients is limited to."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """The noise levels of times: PD's own, or DDPM's, which has no limits to set."""
    logsnr_min: float = -20.0
    """Of the cosine schedule; a teacher trained up to noise level s in EDM's units knows -2 ln s: -8.76 for 80."""
    logsnr_max: float = 20.0
    flip: bool = False
    """Whether images are mirrored at random; the authors do so for CIFAR-10, not for digits."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in; weights stay float32. In float16 the gradients of losses that are means over
    pixels would vanish without loss scaling."""
    targets: Literal["float16", "float32"] = "float16"
    """How the first stage's targets are kept."""
    untrained: bool = False
    """Whether nothing is trained: the first teacher itself, at each stage's number of steps."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise BadValue(f"method.{name} must be positive, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise BadValue(f"method.weight_decay must not be negative, got {self.weight_decay}")
        if self.logsnr_max <= self.logsnr_min:
            raise BadValue(f"method.logsnr_max ({self.logsnr_max}) must exceed method.logsnr_min ({self.logsnr_min})")
        if self.teacher_steps < 2 or self.teacher_steps % self.num_branches:
            raise BadValue(
                f"method.num_branches ({self.num_branches}) must divide method.teacher_steps, which is at least 2, got "
                f"{self.teacher_steps}"
            )
        if not self.stage_steps or self.stage_steps[-1] != self.nfe:
            raise BadValue(
                f"method.nfe ({self.nfe}) is not reached from method.start_steps ({self.start_steps}): each stage "
                f"divides by method.teacher_steps ({self.teacher_steps}); choose one of "
                f"{', '.join(map(str, self.stage_steps)) or 'none: start_steps is not divisible'}"
            )
        if self.budget_kimg % self.num_stages or self.stage_kimg * 1000 < self.batch:
            raise BadValue(
                f"method.budget_kimg ({self.budget_kimg:g}) must give each of {self.num_stages} stages the same whole "
                f"number of kimg, and a batch ({self.batch}) at least"
            )

    @property
    def stage_steps(self) -> tuple[int, ...]:
        """Steps of each stage's student: 512, 256, 128 from 1024 to 128."""
        found, steps = [], self.start_steps
        while steps > self.nfe and steps % self.teacher_steps == 0:
            steps //= self.teacher_steps
            found.append(steps)
        return tuple(found)

    @property
    def num_stages(self) -> int:
        return len(self.stage_steps)

    @property
    def stage_kimg(self) -> int:
        """Thousands of images that the student of a stage sees."""
        return int(self.budget_kimg // self.num_stages)

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """The number of batches after which each stage ends, counted from the run's first one."""
        return tuple(-(-self.stage_kimg * 1000 * number // self.batch) for number in range(1, self.num_stages + 1))

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(f"branch.{k + 1}" for k in range(self.num_branches))

    @property
    def target_space(self) -> str:
        """What a branch is taught is an image; how errors count at each noise level is `weighting`'s."""
        return "x"

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def num_intervals(self) -> int:
        return 1

    def steps(self, every_kimg: int) -> tuple[int, ...]:
        """The ends of the stages: only there is a student what its number of steps says."""
        return tuple(self.stage_kimg * number for number in range(1, self.num_stages + 1))

    def controls(self) -> dict[str, Control]:
        """Plain PD, equal weights (the paper's own choice), and the teacher at the students' numbers of steps.

        The last is what a student is before it is trained, too. Without it nobody knows whether distilling helps:
        the paper's own table may be above it (spec 1.4).
        """
        k = self.num_branches
        return {
            "endpoint_only": Control(weights=endpoint_only(k)),
            "uniform": Control(weights=uniform(k)),
            "teacher": Control(weights=endpoint_only(k), settings={"untrained": True}, is_trained=False),
        }

    def axes(self) -> dict[str, Axis]:
        return {
            "lr": Axis(about="the learning rate at the start of each stage", low=1e-5, high=2e-3, log=True),
            "weighting": Axis(about="how the error counts at each noise level", choices=get_args(Weighting)),
            "weight_decay": Axis(about="of the optimizer", low=1e-5, high=1e-1, log=True),
        }

    def metrics(self) -> dict[str, str]:
        return {
            f"fd@{steps}": f"the metric after the stage whose student makes {steps} steps" for steps in self.stage_steps
        }

    def calls_to_score(self, every_kimg: int) -> tuple[int, ...]:
        return self.stage_steps

    def student_network(self, teacher: NetworkConfig) -> NetworkConfig:
        return teacher

    def forward_units(self) -> tuple[float, float]:
        """Per image: the teacher's steps, and three for the student.

        Trials share the former in the first stage; from then on the teacher is the run's own, and counts as its
        student does.
        """
        if self.untrained:
            return 0.0, 0.0
        shared = self.teacher_steps / self.num_stages
        return shared, 3.0 + self.teacher_steps - shared

    @property
    def rules(self) -> tuple[Rule, ...]:
        return ()

    def cache_bytes(self, image_values: int) -> float:
        """A target for each branch, of the first stage's images alone: the others' teachers are the run's own."""
        if self.untrained:
            return 0.0
        return self.num_branches * image_values * (2 if self.targets == "float16" else 4) / self.num_stages

    def run(self, task: Task) -> Generator[Event, None, None]:
        from bdense_core.loops import pd_run

        return pd_run.run(self, task)
