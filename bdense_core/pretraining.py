"""Training of a teacher from data: the denoising loss of EDM, arXiv 2206.00364, section 5 and table 1."""

import copy
import logging
import math
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from bdense_core import seeds
from bdense_core.branches import freeze
from bdense_core.devices import check_device, place
from bdense_core.errors import BadValue, CheckpointError, ShapeMismatch, TrainingDiverged
from bdense_core.networks import Denoiser, NetworkConfig, build
from bdense_core.precision import Trainee
from bdense_core.snapshots import Snapshot, Snapshots
from bdense_core.task import Progress

log = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16"]
SNAPSHOT_EVERY_S = 120.0
"""Seconds of training that may be lost, whatever `snapshot_every_kimg` says."""
_PROGRESS_EVERY = 8
"""Iterations between two signs of life, and two looks at the loss."""
_POSITIVE = ("budget_kimg", "batch", "lr", "warmup_kimg", "snapshot_every_kimg")
_LATER: dict[str, Any] = {"flip": False, "precision": "float32"}
"""Settings that came after the first files were made, with the values that say nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretraining:
    """Settings of a teacher's training; noise levels are EDM's, the rest is sized for small data.

    Attributes:
        flip: mirror each drawn image with a chance of one half, for pictures that have no left and right.
        precision: what the U-Net computes in; weights, preconditioning and loss are float32 in any case.
        snapshot_every_kimg: images between two snapshots; the result does not depend on it.

    Raises:
        BadValue: a number that is not positive, or an unknown precision.
    """

    seed: int = 0
    budget_kimg: float = 500.0
    batch: int = 128
    lr: float = 2e-3
    warmup_kimg: float = 10.0
    ema_halflife_kimg: float = 20.0
    p_mean: float = -1.2
    p_std: float = 1.2
    flip: bool = False
    precision: Precision = "float32"
    snapshot_every_kimg: float = 50.0

    def __post_init__(self) -> None:
        for key in _POSITIVE:
            if not 0 < getattr(self, key) < math.inf:
                raise BadValue(f"the teacher's {key} is {getattr(self, key)!r}; give a positive number")
        if self.precision not in get_args(Precision):
            raise BadValue(
                f"the teacher's precision is {self.precision!r}; choose one of {', '.join(get_args(Precision))}"
            )

    @property
    def num_iterations(self) -> int:
        return -(-round(self.budget_kimg * 1000) // self.batch)

    def to_dict(self) -> dict[str, Any]:
        """The settings that the result depends on, as plain JSON values.

        Those that came later are left out where they change nothing: older files stay reproducible to the byte.
        """
        values = {key: value for key, value in asdict(self).items() if key != "snapshot_every_kimg"}
        return {key: value for key, value in values.items() if key not in _LATER or value != _LATER[key]}


def preset(images: Tensor, label_dim: int, channels: int) -> NetworkConfig:
    """A DDPM++ of the images' size; with 128 channels that of EDM at 32x32 and at 64x64 (augmentation aside).

    The resolution is halved until it is 8 or less, and at least twice, while it is even. Attention is where 9 to 16
    pixels a side are left, and in the middle. Images of at most 16x16 get one block a level instead of four, and no
    dropout: such a network is far from learning its data by heart.

    Args:
        images: [N, C, S, S].
        label_dim: number of classes, 0 for an unconditional network.
        channels: `model_channels`; coarser levels have twice as many.

    Raises:
        ShapeMismatch: the images are not square, or no images.
        BadValue: numbers no network can be built from.
    """
    if images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise ShapeMismatch(f"the images are {list(images.shape)}, but a teacher wants square ones, [N, C, S, S]")
    side = images.shape[2]
    small = side <= 16
    levels = [side]
    while levels[-1] % 2 == 0 and (levels[-1] > 8 or len(levels) < 3):
        levels.append(levels[-1] // 2)
    finest = 2 if 16 < side <= 32 else 1
    return NetworkConfig.ddpmpp(
        img_resolution=side,
        img_channels=images.shape[1],
        label_dim=label_dim,
        model_channels=channels,
        channel_mult=(finest, *[2] * (len(levels) - 1)),
        channel_mult_emb=2 if small else 4,
        num_blocks=1 if small else 4,
        attn_resolutions=tuple(level for level in levels if 8 < level <= 16),
        dropout=0.0 if small else 0.1,
    )


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, table 1."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def denoising_loss(
    network: Denoiser,
    images: Tensor,
    noise: Tensor,
    sigma: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    """Weighted squared error of the denoised image, mean over pixels and batch: eq. 8 with table 1.

    Args:
        images: clean, [B, C, H, W].
        noise: standard normal, of the same shape.
        sigma: noise levels, [B].
        labels: one-hot, [B, L], for a class-conditional network.
    """
    denoised = network(images + sigma.view(-1, 1, 1, 1) * noise, sigma, labels)
    error = (denoised - images).square().mean(dim=(1, 2, 3))
    loss: Tensor = (loss_weight(sigma, network.config.sigma_data) * error).mean()
    return loss


def pretrain(
    images: Tensor,
    labels: Tensor,
    config: NetworkConfig,
    settings: Pretraining,
    *,
    device: str = "cpu",
    snapshots: Snapshots | None = None,
) -> Generator[Progress, None, Denoiser]:
    """Train a teacher on `images`; returns the moving average of its weights, frozen.

    With `snapshots` the training goes on from the latest one, and on the CPU ends with the same weights bit for bit
    as if it had never been interrupted. One is also kept of the end: whoever has stored the network clears them.
    torch's own generators are seeded and used here, but what happens between two events does not matter.

    Args:
        images: [N, C, H, W] in [-1, 1].
        labels: classes, whole numbers, [N]; unused by an unconditional network.
        snapshots: of this training alone: its identity holds what the images are, `config.to_dict()`,
            `settings.to_dict()` and the kind of device.

    Yields:
        A sign of life every few iterations, with the loss of the last batch.

    Raises:
        ShapeMismatch: images of another size than the network's, or another number of labels.
        BadValue: no images, labels the network does not know, or a device that is not there.
        CheckpointError: a snapshot cannot be written, or is another training's.
        TrainingDiverged: a loss that is not finite.
    """
    _check(images, labels, config)
    training = _Training(config, settings, check_device(device))
    if snapshots is not None and (found := snapshots.latest()) is not None:
        training.restore(found)
        log.info("the teacher's training goes on at %.1f of %g kimg", training.kimg, settings.budget_kimg)
    end, kept_at = settings.num_iterations, time.monotonic()
    snapshot_every = max(1, round(settings.snapshot_every_kimg * 1000 / settings.batch))
    while training.iteration < end:
        loss = training.step(images, labels)
        due = snapshots is not None and (
            training.iteration % snapshot_every == 0
            or training.iteration == end
            or time.monotonic() - kept_at > SNAPSHOT_EVERY_S
        )
        if due or training.iteration % _PROGRESS_EVERY == 1 or training.iteration == end:
            training.check(loss)
        if snapshots is not None and due:
            snapshots.save(training.iteration, *training.state())
            kept_at = time.monotonic()
        if training.iteration % _PROGRESS_EVERY == 1 or training.iteration == end:
            generators = _generators(training.device)
            try:
                done = training.iteration / end
                yield Progress(kimg=training.kimg, done=done, phase="teacher", loss=training.last_loss)
            except GeneratorExit:  # whoever closes the training may want to go on later
                _set_generators(generators, training.device)
                if snapshots is not None:
                    snapshots.save(training.iteration, *training.state())
                raise
            _set_generators(generators, training.device)
    return training.average


class _Training:
    """All that changes while a teacher is trained: what a snapshot holds."""

    def __init__(self, config: NetworkConfig, settings: Pretraining, device: torch.device) -> None:
        torch.manual_seed(seeds.derive(settings.seed, "teacher", "weights"))  # dropout too continues from here
        self.settings = settings
        self.device = device
        network = place(build(config), device).train()
        self.average = freeze(copy.deepcopy(network))
        self.trainee = Trainee(network, torch.optim.Adam(network.parameters(), lr=settings.lr), settings.precision)
        self.draws = seeds.generator(settings.seed, "teacher", "draws")
        self.iteration = 0
        self.last_loss: float | None = None

    @property
    def kimg(self) -> float:
        """How many thousand images were seen."""
        return self.iteration * self.settings.batch / 1000

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One iteration; returns its loss, not yet looked at."""
        settings = self.settings
        clean, noise, sigma, classes = self._draw(images, labels)
        trainee = self.trainee
        trainee.optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (self.kimg + 1e-3) / settings.warmup_kimg)
        trainee.begin()
        loss = denoising_loss(trainee.network, clean, noise, sigma, classes)
        trainee.backward(loss)
        trainee.step()
        # As EDM's: early on the half-life is a twentieth of what was seen, so that the start is forgotten.
        halflife = min(settings.ema_halflife_kimg, self.kimg / 20)
        keep = 0.5 ** (settings.batch / 1000 / max(halflife, 1e-8))
        with torch.no_grad():  # buffers never change here
            torch._foreach_lerp_(list(self.average.parameters()), list(trainee.student.parameters()), 1 - keep)
        self.iteration += 1
        return loss.detach()

    def _draw(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """A batch: clean images and noise [B, C, H, W], noise levels [B], one-hot classes [B, L].

        All numbers are drawn on the CPU, in this order: they are the same on any device.
        """
        settings, num_classes = self.settings, self.average.config.label_dim
        rows = torch.randint(len(images), (settings.batch,), generator=self.draws)
        clean = images[rows]
        noise = torch.randn(clean.shape, generator=self.draws)
        sigma = (torch.randn(settings.batch, generator=self.draws) * settings.p_std + settings.p_mean).exp()
        if settings.flip:
            mirrored = torch.rand(settings.batch, generator=self.draws) < 0.5
            clean = torch.where(mirrored[:, None, None, None], clean.flip(-1), clean)
        classes = functional.one_hot(labels[rows], num_classes).float().to(self.device) if num_classes else None
        return clean.to(self.device), noise.to(self.device), sigma.to(self.device), classes

    def check(self, loss: Tensor) -> None:
        """Look at the last iteration's loss.

        Raises:
            TrainingDiverged: it is not finite.
        """
        value = loss.item()
        if not math.isfinite(value):
            before = (self.iteration - 1) * self.settings.batch / 1000
            raise TrainingDiverged(kimg=before, interval=None, last_finite_loss=self.last_loss)
        self.last_loss = value

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and values of a snapshot."""
        tensors = self.trainee.state()
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        tensors |= {f"generators.{name}": tensor for name, tensor in _generators(self.device).items()}
        return tensors | {"generators.draws": self.draws.get_state()}, {"last_loss": self.last_loss}

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to the state in a snapshot.

        Raises:
            CheckpointError: it is no state of this training.
        """
        try:
            self.trainee.restore(snapshot.tensors)
            self.average.load_state_dict(_below("average.", snapshot.tensors))
            generators = _below("generators.", snapshot.tensors)
            self.draws.set_state(generators["draws"])
            _set_generators(generators, self.device)
            self.iteration, self.last_loss = snapshot.step, snapshot.values["last_loss"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the snapshot of step {snapshot.step} is of another training: {str(error).splitlines()[0]}; choose "
                "another folder for this one's"
            ) from error


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _generators(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's own generators, which dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_generators(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _check(images: Tensor, labels: Tensor, config: NetworkConfig) -> None:
    side = config.img_resolution
    wanted = [config.img_channels, side, side]
    if images.dim() != 4 or list(images.shape[1:]) != wanted:
        raise ShapeMismatch(
            f"the images are {list(images.shape)}, but the network is for [N, {', '.join(map(str, wanted))}]; "
            "give it their img_channels and img_resolution"
        )
    if len(images) == 0:
        raise BadValue("there are no images to train on; give at least one")
    if config.label_dim == 0:
        return
    if labels.shape != (len(images),):
        raise ShapeMismatch(f"the labels are {list(labels.shape)}, but there are {len(images)} images; give one each")
    unknown = sorted(set(labels[(labels < 0) | (labels >= config.label_dim)].tolist()))
    if unknown:
        raise BadValue(
            f"unknown labels {', '.join(map(str, unknown[:5]))}{', ...' if len(unknown) > 5 else ''}; the network "
            f"knows 0 to {config.label_dim - 1}: raise label_dim, or leave these images out"
        )
