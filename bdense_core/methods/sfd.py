"""SFD (arXiv 2409.19681) and its dense form B-DENSE (arXiv 2602.15971): settings, controls and cost.

The loop itself is in `bdense_core/loops/sfd_run.py`, so that reading a study file needs no torch.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from bdense_core.errors import BadValue
from bdense_core.methods.base import Axis, Control
from bdense_core.network_config import NetworkConfig
from bdense_core.task import Event, Task, report_steps
from bdense_core.weights import PAPER_BEST, RULES, Rule, endpoint_only, log_linear, uniform

_ORDERS = {"dpmpp": (1, 3), "ipndm": (1, 4), "deis_tab": (1, 4)}
"""Of the solvers that have a choice."""
_CALLS_PER_STEP = {"heun": 2, "dpm2": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class SFD:
    """Defaults are the authors' for CIFAR-10 at NFE 2 (spec/methods.md 1.2; found in their public code)."""

    kind: Literal["sfd"] = "sfd"
    nfe: int = 2
    num_branches: int = 4
    """K: one branch for each teacher step within a student interval (the authors' M + 1)."""
    teacher_steps: int | None = None
    """Teacher steps between two student times; K must divide it. Default: K."""
    lr: float = 5e-5
    lr_drop_at: float = 0.5
    """Share of the budget after which the learning rate falls to a tenth."""
    batch: int = 128
    budget_kimg: float = 200.0
    sigma_min: float = 0.006
    """Not EDM's 0.002."""
    sigma_max: float = 80.0
    schedule: Literal["polynomial", "logsnr", "time_uniform"] = "polynomial"
    rho: float = 7.0
    """Of the polynomial and the time-uniform schedule."""
    solver: Literal["dpmpp", "ipndm", "deis_tab", "heun", "dpm2", "euler"] = "dpmpp"
    """The teacher's."""
    solver_order: int = 3
    """Of the multistep solvers; the others have one order."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the networks compute in; weights stay float32. The authors: float16, which falls back on overflow."""
    targets: Literal["float16", "float32"] = "float16"
    """How the teacher's states are kept."""

    def __post_init__(self) -> None:
        positive = {
            "nfe": self.nfe, "num_branches": self.num_branches, "lr": self.lr, "batch": self.batch,
            "budget_kimg": self.budget_kimg, "sigma_min": self.sigma_min, "rho": self.rho,
        }  # fmt: skip
        for name, value in positive.items():
            if not value > 0:
                raise BadValue(f"method.{name} must be positive, got {value}")
        if self.sigma_max <= self.sigma_min:
            raise BadValue(f"method.sigma_max ({self.sigma_max}) must exceed method.sigma_min ({self.sigma_min})")
        lowest, highest = _ORDERS.get(self.solver, (1, 4))
        if not lowest <= self.solver_order <= highest:
            raise BadValue(
                f"method.solver_order must be {lowest} to {highest} for {self.solver}, got {self.solver_order}"
            )
        if not 0 < self.lr_drop_at <= 1:
            raise BadValue(f"method.lr_drop_at must lie in (0, 1], got {self.lr_drop_at}")
        if self.steps_per_interval < 1 or self.steps_per_interval % self.num_branches:
            raise BadValue(
                f"method.num_branches ({self.num_branches}) does not divide the teacher's grid of "
                f"{self.steps_per_interval} steps per interval; choose a divisor, or another method.teacher_steps"
            )

    @property
    def steps_per_interval(self) -> int:
        """Teacher steps between two student times."""
        return self.num_branches if self.teacher_steps is None else self.teacher_steps

    @property
    def order(self) -> int | None:
        """The order that the solver is told; None for one without a choice."""
        return self.solver_order if self.solver in _ORDERS else None

    @property
    def num_steps(self) -> int:
        """Points of the student's grid. The analytic first step makes the first interval free: NFE + 2."""
        return self.nfe + 2

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(f"branch.{k + 1}" for k in range(self.num_branches))

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def needs_data(self) -> bool:
        return False

    @property
    def num_intervals(self) -> int:
        """All but the first, which the analytic step makes free."""
        return self.nfe

    @property
    def target_space(self) -> str:
        return "state"

    @property
    def num_iterations(self) -> int:
        """Batches in the budget, the last one whole."""
        return -(-round(self.budget_kimg * 1000) // self.batch)

    def steps(self, every_kimg: int) -> tuple[int, ...]:
        return report_steps(self.budget_kimg, every_kimg)

    def controls(self) -> dict[str, Control]:
        """Plain SFD, equal weights, and the first row of the paper's Table 4."""
        k = self.num_branches
        return {
            "endpoint_only": Control(weights=endpoint_only(k)),
            "uniform": Control(weights=uniform(k)),
            "paper": Control(weights=log_linear(*PAPER_BEST, k)),
        }

    def axes(self) -> dict[str, Axis]:
        return {
            "lr": Axis(about="Adam's learning rate", low=1e-5, high=1e-3, log=True),
            "lr_drop_at": Axis(about="share of the budget after which the rate falls to a tenth", low=0.25, high=1.0),
        }

    def metrics(self) -> dict[str, str]:
        return {}

    def calls_to_score(self, every_kimg: int) -> tuple[int, ...]:
        return (self.nfe,) * len(self.steps(every_kimg))

    def student_network(self, teacher: NetworkConfig) -> NetworkConfig:
        return teacher

    def forward_units(self) -> tuple[float, float]:
        """Per trajectory: every teacher step, and three for each trained interval (spec 1.5)."""
        teacher_steps = self.steps_per_interval * (self.num_steps - 1)
        return float(teacher_steps * _CALLS_PER_STEP.get(self.solver, 1)), 3.0 * self.nfe

    @property
    def rules(self) -> tuple[Rule, ...]:
        return RULES

    def cache_bytes(self, image_values: int) -> float:
        """The teacher's state at each branch time of the trained intervals."""
        return float(self.nfe * self.num_branches * image_values * (2 if self.targets == "float16" else 4))

    def run(self, task: Task) -> Generator[Event, None, None]:
        from bdense_core.loops import sfd_run

        return sfd_run.run(self, task)
