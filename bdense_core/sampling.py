"""Images from a network in a file: which solver on which grid, and from which noise."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdense_core import data, seeds, sigmas, solvers, vp
from bdense_core.errors import BadValue, CheckpointError
from bdense_core.guidance import GuidedSampler
from bdense_core.integrity import read_metadata
from bdense_core.networks import Denoiser
from bdense_core.precision import DTYPES, HalfDenoiser, Precision, in_precision


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A solver on a falling grid of noise levels; a student carries the one that it was trained for."""

    solver: str
    sigmas: tuple[float, ...]
    afs: bool = False
    precision: Precision = "float32"
    """What the network computes in: a student's score is that of its images in this precision."""

    @property
    def nfe(self) -> int:
        """Network calls for each image."""
        return solvers.network_calls(self.solver, len(self.sigmas), afs=self.afs)

    def prepare(self, network: Denoiser) -> HalfDenoiser:
        """The network as this sampler wants it."""
        return HalfDenoiser(in_precision(network, self.precision), network)

    def __call__(self, network: HalfDenoiser, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images in [-1, 1] from standard normal noise, both [B, C, H, W]; labels one-hot, [B, L]."""
        start = noise * self.sigmas[0]
        with torch.no_grad():
            return list(
                solvers.trajectory(
                    lambda x, t: network(x, t, labels), start, self.sigmas, solver=self.solver, afs=self.afs
                )
            )[-1]

    def bind(self, network: Denoiser) -> Callable[[Tensor, Tensor | None], Tensor]:
        """What makes images of noise and labels with this network."""
        prepared = self.prepare(network)
        return lambda noise, labels: self(prepared, noise, labels)


@dataclass(frozen=True, kw_only=True)
class DDIMSampler:
    """DDIM from noise alone to the clean end, as progressive distillation samples (arXiv 2202.00512)."""

    sigmas: tuple[float, ...]
    """Falling noise levels of the variance-exploding frame, the last of them 0."""
    clip: bool = True
    """Whether each predicted image is limited to [-1, 1]."""
    precision: Precision = "float32"
    """See `Sampler.precision`."""

    @property
    def nfe(self) -> int:
        """Network calls for each image."""
        return len(self.sigmas) - 1

    def __call__(self, network: HalfDenoiser, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images from standard normal noise, both [B, C, H, W]; labels one-hot, [B, L]."""
        levels = [vp.Level.exploding(torch.tensor(sigma, dtype=torch.float64)) for sigma in self.sigmas]
        denoise = vp.of_exploding(lambda x, sigma: network(x, sigma, labels))
        image = noise
        with torch.no_grad():  # one state at a time: all of them may be a thousand batches
            for _, state in vp.ddim(denoise, noise, levels, clip=self.clip):
                image = state
        return image

    def bind(self, network: Denoiser) -> Callable[[Tensor, Tensor | None], Tensor]:
        """What makes images of noise and labels with this network."""
        prepared = HalfDenoiser(in_precision(network, self.precision), network)
        return lambda noise, labels: self(prepared, noise, labels)

    def to_dict(self) -> dict[str, Any]:
        """What `sampler_of` reads."""
        return {"kind": "ddim", "sigmas": list(self.sigmas), "clip": self.clip, "precision": self.precision}


AnySampler = Sampler | DDIMSampler | GuidedSampler


def sampler_of(path: str) -> AnySampler | None:
    """The sampler that a student's file names; None for a teacher, which has none of its own.

    Raises:
        CheckpointError: the file is damaged, or no network of this project.
    """
    described: dict[str, Any] | None = read_metadata(path).get("about", {}).get("sampler")
    if described is None:
        return None
    try:
        if described.get("kind") == "guided":
            return GuidedSampler.from_dict(described)
        levels = tuple(float(sigma) for sigma in described["sigmas"])
        precision = described.get("precision", "float32")
        if precision not in DTYPES:
            raise ValueError(f"precision {precision!r}")
        if described.get("kind") == "ddim":
            return DDIMSampler(sigmas=levels, clip=bool(described["clip"]), precision=precision)
        return Sampler(solver=str(described["solver"]), sigmas=levels, afs=bool(described["afs"]), precision=precision)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes its sampler in a way that is not understood: {error}") from error


def teacher_sampler(solver: str = "dpmpp", num_steps: int = 12, *, sigma_min: float = 0.006) -> Sampler:
    """A sampler for a network without one of its own: EDM's polynomial grid from 80 down.

    Args:
        num_steps: steps of the solver; some ask the network twice in each.

    Raises:
        BadValue: no such solver, or no steps.
    """
    solvers.find_solver(solver)
    if num_steps < 1:
        raise BadValue(f"num_steps is {num_steps}; give 1 or more")
    return Sampler(solver=solver, sigmas=tuple(sigmas.polynomial(num_steps + 1, sigma_min=sigma_min)))


def draw(
    network: Denoiser, sampler: AnySampler, *, count: int, seed: int, label: int | None = None, batch: int = 64
) -> Iterator[Tensor]:
    """Bytes [<= batch, C, H, W], `count` images in all: those that an evaluation of this seed looks at.

    Args:
        label: one class for all; None: as an evaluation draws them, uniformly.

    Raises:
        BadValue: a class that the network does not know.
    """
    config, sample = network.config, sampler.bind(network)
    if label is not None and not 0 <= label < config.label_dim:
        known = f"labels 0 to {config.label_dim - 1}" if config.label_dim else "no labels"
        raise BadValue(f"label {label} is unknown: this network knows {known}")
    device = next(network.parameters()).device
    shape = (config.img_channels, config.img_resolution, config.img_resolution)
    for first in range(0, count, batch):
        end = min(first + batch, count)
        noise, labels = seeds.evaluation_rows(seed, first, end, shape, config.label_dim)
        if label is not None:
            labels = torch.nn.functional.one_hot(torch.full((end - first,), label), config.label_dim).float()
        yield data.to_uint8(sample(noise.to(device), None if labels is None else labels.to(device))).cpu()
