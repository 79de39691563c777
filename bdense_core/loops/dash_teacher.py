"""Training of a teacher for DASH (arXiv 2606.00798): a class-conditional DDPM, and with it the curriculum of TIRT."""

import logging
import math
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdense_core import seeds, tirt
from bdense_core.devices import check_device, place
from bdense_core.discrete import DiscreteSchedule
from bdense_core.errors import BadValue, TrainingDiverged
from bdense_core.guidance import NoisePredictor, noise_predictor, schedule_of
from bdense_core.loops.dash import Batch, noised, pixel_mse
from bdense_core.loops.dash_data import Examples
from bdense_core.loops.dash_learner import Learner, cosine_rate
from bdense_core.network_config import NetworkConfig
from bdense_core.networks import Denoiser, build
from bdense_core.snapshots import Snapshots
from bdense_core.task import Progress

log = logging.getLogger(__name__)

_SNAPSHOT_EVERY_S = 120.0
_PROGRESS_EVERY = 8
"""Iterations between two signs of life."""
_POSITIVE = ("budget_kimg", "batch", "lr", "grad_clip", "gamma")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherTraining:
    """Defaults are the authors' for CIFAR-10, 500 epochs of 50,000 images (spec/methods.md 3).

    Raises:
        BadValue: a number out of its range.
    """

    seed: int = 0
    budget_kimg: float = 25000.0
    batch: int = 64
    lr: float = 2e-4
    lr_min: float = 1e-6
    weight_decay: float = 0.01
    """Of the network and of the logits."""
    ema: float = 0.9999
    grad_clip: float = 1.0
    gamma: float = 5.0
    held_out: float = 0.1

    def __post_init__(self) -> None:
        for key in _POSITIVE:
            if not 0 < getattr(self, key) < math.inf:
                raise BadValue(f"the teacher's {key} is {getattr(self, key)!r}; give a positive number")

    @property
    def num_iterations(self) -> int:
        return -(-round(self.budget_kimg * 1000) // self.batch)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self)


def preset(images: Tensor, label_dim: int, channels: int) -> NetworkConfig:
    """The authors' network for images of this size: with 128 channels at 32x32 their teacher, 35.75M parameters.

    Images of at most 16x16 get one block at each of two levels, groups of four channels, and no dropout.

    Args:
        images: [N, C, S, S].
        label_dim: number of classes.
        channels: `model_channels`.

    Raises:
        BadValue: numbers no network can be built from.
    """
    small = images.shape[2] <= 16
    return NetworkConfig.ddpm(
        img_resolution=images.shape[2],
        img_channels=images.shape[1],
        label_dim=label_dim,
        preconditioning="cosine",
        model_channels=channels,
        channel_mult=(1, 1) if small else (1, 2, 2, 2),
        num_blocks=1 if small else 2,
        attn_resolutions=() if small else (16,),  # the middle blocks have attention anyway
        norm_groups=max(1, channels // 4) if small else 32,
        dropout=0.0 if small else 0.1,
        label_dropout=0.1,
    )


@dataclass(frozen=True)
class Teacher:
    """What comes out: a frozen network, and the logits that go with it into its file (`about["tirt"]`)."""

    network: Denoiser
    tirt: list[float]


def denoising_errors(network: NoisePredictor, batch: Batch, schedule: DiscreteSchedule) -> Tensor:
    """Squared error of the predicted noise, a mean over pixels, [B]."""
    return pixel_mse(network(noised(schedule, batch), batch.t, batch.labels), batch.noise)


def tirt_loss(errors: Tensor, t: Tensor, logits: Tensor, schedule: DiscreteSchedule, *, gamma: float) -> Tensor:
    """The mean of the errors [B] weighted by TIRT, whose gradient flows through the mean of the weights."""
    omega = tirt.tirt(schedule.snr.to(logits), logits, gamma=gamma)
    return (errors * tirt.batch_weights(omega[t])).mean()


def pretrain(
    images: Tensor,
    labels: Tensor,
    config: NetworkConfig,
    settings: TeacherTraining,
    *,
    device: str = "cpu",
    snapshots: Snapshots | None = None,
) -> Generator[Progress, None, Teacher]:
    """Train a teacher and its curriculum together; returns the moving average of the weights.

    Labels are dropped as `config.label_dropout` says, sample by sample (the authors': a batch at once). With
    `snapshots` the training goes on from the latest one, on the CPU bit for bit.

    Args:
        images: [N, C, H, W] in [-1, 1].
        labels: classes, whole numbers, [N].
        config: one that is told timesteps: preconditioning "cosine" or "linear".
        snapshots: of this training alone: its identity holds what the images are, the network, `settings.to_dict()`
            and the kind of device.

    Yields:
        A sign of life every few iterations, with the loss of the last batch.

    Raises:
        BDenseError: data that do not fit the network, a snapshot of another training, or a loss that is not finite.
    """
    training = _Training(images, labels, config, settings, check_device(device))
    found = snapshots.latest() if snapshots else None
    if found is not None:
        training.learner.restore(found.tensors)
        training.iteration, training.last_loss = found.step, found.values["last_loss"]
        log.info("the teacher's training goes on at %.1f of %g kimg", training.kimg, settings.budget_kimg)
    end, kept_at = settings.num_iterations, time.monotonic()
    while training.iteration < end:
        training.step()
        ended = training.iteration == end
        if snapshots and (ended or time.monotonic() - kept_at > _SNAPSHOT_EVERY_S):
            snapshots.save(training.iteration, training.learner.state(), {"last_loss": training.last_loss})
            kept_at = time.monotonic()
        if ended or training.iteration % _PROGRESS_EVERY == 1:
            done = training.iteration / end
            yield Progress(kimg=training.kimg, done=done, phase="teacher", loss=training.last_loss)
    return training.result()


class _Training:
    """All that changes while a teacher is trained."""

    def __init__(
        self, images: Tensor, labels: Tensor, config: NetworkConfig, settings: TeacherTraining, device: torch.device
    ) -> None:
        self._settings = settings
        self._schedule = schedule_of(config)
        self._examples = Examples(images, labels, config, held_out=settings.held_out, device=device)
        torch.manual_seed(seeds.derive(settings.seed, "teacher", "weights"))
        network = place(build(config), device).train()
        self._logits = nn.Parameter(torch.zeros(self._schedule.num_steps, device=device))
        self.learner = Learner(
            network,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            ema=settings.ema,
            grad_clip=settings.grad_clip,
            logits=self._logits,
        )
        self.iteration = 0
        self.last_loss: float | None = None

    @property
    def kimg(self) -> float:
        return self.iteration * self._settings.batch / 1000

    def step(self) -> None:
        """One iteration.

        Raises:
            TrainingDiverged: its loss is not finite.
        """
        settings = self._settings
        # Dropout depends on the iteration alone: nothing to keep for a training that goes on elsewhere.
        torch.manual_seed(seeds.derive(settings.seed, "dropout", self.iteration))
        batch = self._examples.batch(
            settings.seed, self.iteration, size=settings.batch, num_times=self._schedule.num_steps
        )
        epoch = self._examples.epoch(self.iteration * settings.batch)
        num_epochs = self._examples.epoch(settings.num_iterations * settings.batch - 1) + 1
        errors = denoising_errors(noise_predictor(self.learner.network), batch, self._schedule)
        loss = tirt_loss(errors, batch.t, self._logits, self._schedule, gamma=settings.gamma)
        loss.backward()  # type: ignore[no-untyped-call]
        self.learner.step(cosine_rate(settings.lr, settings.lr_min, epoch, num_epochs))
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingDiverged(kimg=self.kimg, interval=None, last_finite_loss=self.last_loss)
        self.iteration += 1
        self.last_loss = value

    def result(self) -> Teacher:
        return Teacher(self.learner.average, self._logits.detach().cpu().tolist())
