"""Classifier-free guidance, its weight over time, and DDIM with both, on discrete timesteps.

DASH, arXiv 2606.00798, and its authors' code (spec/methods.md 3); DDIM: arXiv 2010.02502, guidance: arXiv 2207.12598.
Times are whole numbers 0 to T - 1, noisiest last; alpha bar is `alphas_cumprod`.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bdense_core import discrete
from bdense_core.discrete import DiscreteSchedule
from bdense_core.errors import BadValue
from bdense_core.networks import Denoiser, NetworkConfig
from bdense_core.precision import DTYPES, Precision

NoisePredictor = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""The noise in x [B, C, H, W] at times t [B], whole numbers, for one-hot classes [B, L]; None is the null class."""
Epsilon = Callable[[Tensor, int], Tensor]
"""The noise in x [B, C, H, W] at a time, of that shape."""


def schedule_of(config: NetworkConfig) -> DiscreteSchedule:
    """The timesteps that a network is told.

    Raises:
        BadValue: it is told something else.
    """
    if config.preconditioning not in ("cosine", "linear"):
        raise BadValue(
            f"the network's preconditioning is {config.preconditioning}, but guided sampling and DASH are for networks "
            "that predict the noise of timesteps (cosine or linear)"
        )
    return discrete.cosine() if config.preconditioning == "cosine" else discrete.linear()


def noise_predictor(network: Denoiser, precision: Precision = "float32") -> NoisePredictor:
    """A network whose U-Net predicts the noise, told the time as it is; the answer is float32."""

    def predict(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, DTYPES[precision], enabled=precision != "float32"):
            eps: Tensor = network.model(x, t.to(x.dtype), labels)
        return eps.to(x.dtype)

    return predict


def guided(eps_cond: Tensor, eps_null: Tensor, weight: float | Tensor) -> Tensor:
    """eps_null + w (eps_cond - eps_null): w = 1 is the conditional prediction itself, 0 the unconditional one."""
    return eps_null + weight * (eps_cond - eps_null)


def tag_weight(t: int, num_times: int, *, w_min: float, w_max: float, beta: float) -> float:
    """w_min + (w_max - w_min) sigmoid(beta (0.5 - t / T)), the time-aware guidance (TAG) of DASH.

    The sigmoid does not reach its ends: with 1, 4 and 5 the weight goes from 1.25 at t = 980 to 3.77 at t = 0.
    """
    return w_min + (w_max - w_min) / (1 + math.exp(-beta * (0.5 - t / num_times)))


def ddim_times(num_times: int, num_steps: int) -> tuple[int, ...]:
    """The times r, 2r, ... below T and 0, r = T // num_steps, falling.

    As the authors': if r does not divide T there are more of them than `num_steps` (30 of 1000 make 31).

    Raises:
        BadValue: no steps, or more than times.
    """
    if not 1 <= num_steps <= num_times:
        raise BadValue(f"{num_steps} sampling steps of {num_times} times; give 1 to {num_times}")
    return tuple(range(0, num_times, num_times // num_steps))[::-1]


def ddim(
    epsilon: Epsilon,
    x: Tensor,
    alphas_cumprod: Sequence[float],
    times: Sequence[int],
    *,
    clip: float | None = 1.0,
    eta: float = 0.0,
) -> Iterator[Tensor]:
    """The states that DDIM visits: `x` itself, one after each time but the last, and the image.

    The image is limited to [-clip, clip] in each step, but the noise is not computed again from it, as in the authors'
    code; progressive distillation does the opposite (spec/methods.md 2.1).

    Args:
        epsilon: asked once for each time.
        x: standard normal, [B, C, H, W].
        alphas_cumprod: alpha bar at each of the T times.
        times: falling, the last one is 0.
        clip: None: images are not limited.
        eta: 0 is deterministic, 1 draws as much noise as DDPM (eq. 16). The noise follows from the rows of `x`, so
            that an image does not depend on those beside it.
    """
    yield x
    fresh = _noise_of(x) if eta > 0 else None
    for index, t in enumerate(times):
        eps, alpha = epsilon(x, t), alphas_cumprod[t]
        image = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha + 1e-8)
        if clip is not None:
            image = image.clamp(-clip, clip)
        if index + 1 == len(times):
            yield image
            return
        before = alphas_cumprod[times[index + 1]]
        spread = eta * math.sqrt((1 - before) / (1 - alpha) * (1 - alpha / before))
        x = math.sqrt(before) * image + math.sqrt(max(1 - before - spread**2, 0.0)) * eps
        if fresh is not None:
            x = x + spread * next(fresh)
        yield x


def _noise_of(x: Tensor) -> Iterator[Tensor]:
    """Standard normal tensors like x, without end: each row's follow from that row alone."""
    rows = x.detach().cpu().float().contiguous()
    digests = (hashlib.sha256(row.numpy().tobytes()).digest() for row in rows)
    sources = [torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1) for digest in digests]
    while True:
        yield torch.stack([torch.randn(x.shape[1:], generator=source) for source in sources]).to(x)


@dataclass(frozen=True, kw_only=True)
class GuidedSampler:
    """DDIM with guidance; the sampler of a student of DASH (see `sampling.Sampler` for the others)."""

    num_steps: int
    guidance: float = 1.0
    """w; with time-aware guidance its upper end."""
    tag_min: float | None = None
    """The lower end of time-aware guidance; None: w is the same at all times."""
    tag_beta: float = 5.0
    eta: float = 0.0
    clip: float | None = 1.0
    precision: Precision = "float32"

    @property
    def nfe(self) -> int:
        """Network calls for each image: where guidance is 1 the unconditional prediction is not asked."""
        num_times = len(ddim_times(discrete.NUM_STEPS, self.num_steps))
        return num_times if self.guidance == 1 and self.tag_min in (None, 1) else 2 * num_times

    def weight(self, t: int) -> float:
        """w at a time."""
        if self.tag_min is None:
            return self.guidance
        return tag_weight(t, discrete.NUM_STEPS, w_min=self.tag_min, w_max=self.guidance, beta=self.tag_beta)

    def walk(self, network: Denoiser, noise: Tensor, labels: Tensor | None = None) -> Iterator[Tensor]:
        """The states on the way from noise to image, see `ddim`.

        Args:
            noise: standard normal, [B, C, H, W].
            labels: one-hot, [B, L]; without them the image is unconditional.

        Raises:
            BadValue: a network that is not told timesteps.
        """
        schedule, predict = schedule_of(network.config), noise_predictor(network, self.precision)

        def epsilon(x: Tensor, t: int) -> Tensor:
            at, w = torch.full((len(x),), t, device=x.device), self.weight(t)
            eps = predict(x, at, labels)
            return eps if labels is None or w == 1 else guided(eps, predict(x, at, None), w)

        times = ddim_times(schedule.num_steps, self.num_steps)
        yield from ddim(epsilon, noise, schedule.alphas_cumprod.tolist(), times, clip=self.clip, eta=self.eta)

    def bind(self, network: Denoiser) -> Callable[[Tensor, Tensor | None], Tensor]:
        """What makes images in [-1, 1] of noise and labels with this network."""

        @torch.no_grad()
        def sample(noise: Tensor, labels: Tensor | None) -> Tensor:
            image = noise
            for state in self.walk(network, noise, labels):
                image = state
            return image

        return sample

    def to_dict(self) -> dict[str, Any]:
        """Its description in a network's file, as plain JSON values."""
        return {"kind": "guided", **asdict(self)}

    @classmethod
    def from_dict(cls, described: dict[str, Any]) -> "GuidedSampler":
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: it is no such description.
        """
        values = {key: value for key, value in described.items() if key != "kind"}
        numbers = [value for key, value in values.items() if key != "precision" and value is not None]
        if not all(type(value) in (int, float) for value in numbers) or type(values["num_steps"]) is not int:
            raise ValueError("its settings are no numbers")
        if values.get("precision", "float32") not in DTYPES:
            raise ValueError(f"precision {values['precision']!r}")
        return cls(**values)
