"""The variance-preserving frame z = alpha x + sigma eps, alpha^2 + sigma^2 = 1: a schedule, predictions, DDIM.

Progressive distillation (arXiv 2202.00512) is written in it. Networks here are D(x; sigma) in the variance-exploding
frame of EDM, which is the same thing in other units: x there is z / alpha, its noise level sigma / alpha, and DDIM is
Euler's method. Time u runs from 0, the clean end, to 1.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Self

import torch
from torch import Tensor

from bdense_core.network_config import VP_BETA_D, VP_BETA_MIN

MeanType = Literal["x", "eps", "v", "both"]
"""What a network's raw output is: the image, the noise, v = alpha eps - sigma x, or image and noise stacked."""


@dataclass(frozen=True)
class Level:
    """alpha and sigma of all rows, [], or of each, [B]. Made in float64: near u = 1, alpha is a small difference."""

    alpha: Tensor
    sigma: Tensor

    @classmethod
    def of_logsnr(cls, logsnr: Tensor) -> Self:
        """Of log(alpha^2 / sigma^2)."""
        return cls(logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt())

    @classmethod
    def exploding(cls, sigma: Tensor) -> Self:
        """Of noise levels in the variance-exploding frame, 0 for clean images."""
        return cls(1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt())

    @property
    def in_exploding(self) -> Tensor:
        """The noise level in the variance-exploding frame."""
        return self.sigma / self.alpha

    @property
    def logsnr(self) -> Tensor:
        return 2 * (self.alpha.log() - self.sigma.log())

    def beside(self, images: Tensor) -> Self:
        """In the type and on the device of images [B, ...], in a shape that multiplies them."""
        shape = (-1, *[1] * (images.dim() - 1))
        return type(self)(self.alpha.to(images).reshape(shape), self.sigma.to(images).reshape(shape))


CLEAN = Level(torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))
"""Where DDIM ends: a last step to it returns the predicted image itself."""


class Schedule(ABC):
    """Levels of times u, from 0, the clean end, to 1."""

    @abstractmethod
    def at(self, u: Tensor) -> Level:
        """The levels of times u."""

    def grid(self, num_steps: int) -> list[Level]:
        """The levels that DDIM visits in N steps: u = 1, (N - 1)/N, ..., 1/N, and then `CLEAN`."""
        times = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
        return [*(self.at(u) for u in times), CLEAN]


@dataclass(frozen=True)
class Linear(Schedule):
    """DDPM's linear betas (arXiv 2006.11239) in the limit of many steps: alpha^2 = exp(-(beta_d u^2 / 2 + beta_min u)).

    arXiv 2011.13456, appendix C. At t = 1000 u it is DDPM's own schedule to within its steps.
    """

    def at(self, u: Tensor) -> Level:
        exponent = VP_BETA_D * u**2 / 2 + VP_BETA_MIN * u
        return Level((-exponent / 2).exp(), (-torch.expm1(-exponent)).sqrt())


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = cos(a u + b), sigma = sin(a u + b), with a and b such that log SNR falls from a maximum to a minimum.

    arXiv 2202.00512, section 5; the limits -20 and 20 are those of the authors' published configurations. In the
    variance-exploding frame, log SNR l is the noise level exp(-l / 2): 22,026 and 0.0000454.
    """

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0

    def at(self, u: Tensor) -> Level:
        b = math.atan(math.exp(-self.logsnr_max / 2))
        a = math.atan(math.exp(-self.logsnr_min / 2)) - b
        angle = a * u + b
        return Level(angle.cos(), angle.sin())


@dataclass(frozen=True)
class Prediction:
    """What is believed of z: image, noise and v = alpha eps - sigma x, all of one shape."""

    x: Tensor
    eps: Tensor
    v: Tensor


def predict(output: Tensor, z: Tensor, level: Level, *, mean_type: MeanType = "x", clip: bool = False) -> Prediction:
    """All three of a network's raw output at z (arXiv 2202.00512, section 4).

    Args:
        output: shaped like z; with `both` twice the channels, first the image's, then the noise's.
        clip: limit x to [-1, 1]; eps and v are then those of the clipped x.
    """
    at = level.beside(z)
    if mean_type == "x":
        x = output
    elif mean_type == "eps":
        x = (z - at.sigma * output) / at.alpha
    elif mean_type == "v":
        x = at.alpha * z - at.sigma * output
    else:
        image, noise = output.chunk(2, dim=-3)
        # alpha^2 times the image that the noise implies, written without a division by a small alpha.
        x = at.sigma**2 * image + at.alpha * (z - at.sigma * noise)
    if clip:
        x = x.clamp(-1, 1)
    eps = output if mean_type == "eps" and not clip else (z - at.alpha * x) / at.sigma
    v = output if mean_type == "v" and not clip else at.alpha * eps - at.sigma * x
    return Prediction(x, eps, v)


Denoise = Callable[[Tensor, Level], Tensor]
"""The image predicted from z [B, ...] at a level."""


def ddim(
    denoise: Denoise, z: Tensor, levels: Sequence[Level], *, clip: bool = False
) -> Iterator[tuple[Prediction, Tensor]]:
    """The deterministic sampler DDIM (arXiv 2010.02502): z' = alpha' x + sigma' eps.

    Args:
        z: at the first level, [B, ...].
        levels: falling noise.
        clip: limit each predicted image to [-1, 1]: in sampling, never in training.

    Yields:
        For each step, what was predicted at its beginning, and the state at its end.
    """
    for here, there in pairwise(levels):
        believed = predict(denoise(z, here), z, here, clip=clip)
        at = there.beside(z)
        z = at.alpha * believed.x + at.sigma * believed.eps
        yield believed, z


def of_exploding(denoise: Callable[[Tensor, Tensor], Tensor]) -> Denoise:
    """A denoiser D(x; sigma) of the variance-exploding frame in this one; sigma is [] or [B]."""

    def denoised(z: Tensor, level: Level) -> Tensor:
        return denoise(z / level.beside(z).alpha, level.in_exploding.to(z))

    return denoised
