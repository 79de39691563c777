"""Diffusion in T discrete steps: the linear schedule of DDPM and the cosine schedule of improved DDPM, in float64.

Step t keeps a share ab_t of the image's power: x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps. Divided by sqrt(ab_t) that
is x_0 plus noise of level sigma_t = sqrt((1 - ab_t) / ab_t), the sigma of the rest of this library.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from bdense_core.errors import BadValue

NUM_STEPS = 1000
SNR_FLOOR = 1e-8
"""Keeps the signal-to-noise ratio finite, as DASH has it (spec/methods.md 3)."""


@dataclass(frozen=True, eq=False)
class DiscreteSchedule:
    """What follows from the variances `betas` that T steps add; all are [T] in float64, on the CPU.

    On the CPU by name in the functions below, since what they make is kept: who asks first may be at work on shapes
    alone, on the device "meta".

    Raises:
        BadValue: the betas are not numbers between 0 and 1.
    """

    betas: Tensor

    def __post_init__(self) -> None:
        if self.betas.dim() != 1 or len(self.betas) < 2 or not bool(((self.betas > 0) & (self.betas < 1)).all()):
            raise BadValue("betas must be at least two numbers between 0 and 1; check the schedule's limits")

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """ab_t, the share of the image's power that is left."""
        return (1 - self.betas).cumprod(0)

    @property
    def alphas_cumprod_prev(self) -> Tensor:
        """ab_{t-1}, and 1 before the first step."""
        return torch.cat([torch.ones_like(self.betas[:1]), self.alphas_cumprod[:-1]])

    @cached_property
    def snr(self) -> Tensor:
        """ab / (1 - ab + 1e-8)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod + SNR_FLOOR)

    @cached_property
    def sigmas(self) -> Tensor:
        """Noise levels sigma_t, rising."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    def step_of(self, sigma: Tensor) -> Tensor:
        """The step whose noise level is `sigma`, as a number in [0, T - 1].

        Between steps ln sigma is interpolated, beyond the ends it is the end. On a step's own level it is that step,
        to rounding. Shape and type are those of `sigma`.
        """
        levels = self.sigmas.log().to(sigma.device)
        wanted = sigma.double().log()
        above = torch.searchsorted(levels, wanted).clamp(1, self.num_steps - 1)
        below = above - 1
        part = (wanted - levels[below]) / (levels[above] - levels[below])
        return (below + part.clamp(0, 1)).to(sigma.dtype)


@cache
def linear(num_steps: int = NUM_STEPS, *, beta_min: float = 1e-4, beta_max: float = 0.02) -> DiscreteSchedule:
    """Betas that rise linearly (arXiv 2006.11239, section 4)."""
    return DiscreteSchedule(torch.linspace(beta_min, beta_max, num_steps, dtype=torch.float64, device="cpu"))


@cache
def cosine(
    num_steps: int = NUM_STEPS, *, s: float = 0.008, beta_min: float = 1e-4, beta_max: float = 0.9999
) -> DiscreteSchedule:
    """ab_t that falls as cos^2 of time (arXiv 2102.09672, eq. 17), its betas kept in [beta_min, beta_max].

    The limits are DASH's: at 1,000 steps the lower one holds for the first 13, so ab_t is not the closed form there.
    """
    time = torch.arange(num_steps + 1, dtype=torch.float64, device="cpu") / num_steps
    share = ((time + s) / (1 + s) * math.pi / 2).cos().square()
    return DiscreteSchedule((1 - share[1:] / share[:-1]).clamp(beta_min, beta_max))
