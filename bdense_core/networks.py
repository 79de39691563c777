"""Denoisers: a U-Net in its preconditioning, D(x; sigma) of Karras et al., arXiv 2206.00364, eq. 7.

`x` is an image plus noise of level sigma ("variance exploding"). A network that was trained on z = alpha image +
(1 - alpha^2)^0.5 noise, as DDPM and Progressive Distillation have it, is the same thing seen through z = alpha x with
alpha = 1 / (1 + sigma^2)^0.5, so it has a preconditioning too.

The one door to networks. `NetworkConfig` says what to build, `build` builds it, and a `Denoiser`
answers with the last branch or with all of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdense_core import discrete
from bdense_core.ddpm_unet import DDPMUNet
from bdense_core.errors import BadValue, ShapeMismatch
from bdense_core.network_config import VP_BETA_D, VP_BETA_MIN, VP_STEPS, Architecture, NetworkConfig, Preconditioning
from bdense_core.unets import DhariwalUNet, SongUNet, UNet

__all__ = ["Coefficients", "Denoiser", "NetworkConfig", "Preconditioning", "build", "coefficients"]


@dataclass(frozen=True)
class Coefficients:
    """c_skip, c_out, c_in and c_noise of D = c_skip x + c_out F(c_in x; c_noise), each shaped like sigma.

    `out2` is the factor of the second half of F's channels where F predicts image and noise, else None.
    """

    skip: Tensor
    out: Tensor
    scale: Tensor
    noise: Tensor
    out2: Tensor | None = None


def coefficients(preconditioning: Preconditioning, sigma: Tensor, *, sigma_data: float = 0.5) -> Coefficients:
    """The preconditioning at noise levels `sigma`.

    "edm", "vp" and "ve" are the columns of table 1 of arXiv 2206.00364. The others show the U-Net z = alpha x:

    - "x", "eps", "v": F is the image, the noise, or v = alpha noise - sigma' image with sigma' = (1 - alpha^2)^0.5;
      "both": F is image and noise, blended by sigma'^2 (arXiv 2202.00512, section 4). The U-Net is told 1000 u of the
      cosine schedule alpha = cos(pi u / 2).
    - "linear", "cosine": F is the noise, and the U-Net is told the step of that schedule of `bdense_core.discrete`.
    """
    one = torch.ones_like(sigma)
    if preconditioning in ("x", "eps", "v", "both", "linear", "cosine"):
        return _variance_preserving(preconditioning, sigma)
    if preconditioning == "vp":
        root = (VP_BETA_MIN**2 + 2 * VP_BETA_D * (1 + sigma**2).log()).sqrt()
        time = (root - VP_BETA_MIN) / VP_BETA_D
        return Coefficients(one, -sigma, 1 / (sigma**2 + 1).sqrt(), (VP_STEPS - 1) * time)
    if preconditioning == "ve":
        return Coefficients(one, sigma, one, (0.5 * sigma).log())
    total = sigma**2 + sigma_data**2
    return Coefficients(sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4)


def _variance_preserving(preconditioning: Preconditioning, sigma: Tensor) -> Coefficients:
    alpha2 = 1 / (1 + sigma**2)
    scale = alpha2.sqrt()
    if preconditioning == "linear":
        noise = discrete.linear().step_of(sigma)
    elif preconditioning == "cosine":
        noise = discrete.cosine().step_of(sigma)
    else:
        noise = 1000 * 2 / math.pi * sigma.atan()
    if preconditioning == "x":
        return Coefficients(torch.zeros_like(sigma), torch.ones_like(sigma), scale, noise)
    if preconditioning == "v":
        return Coefficients(alpha2, -sigma * scale, scale, noise)
    if preconditioning == "both":  # sigma'^2 F_x + alpha^2 (x - sigma F_eps)
        return Coefficients(alpha2, sigma**2 * alpha2, scale, noise, out2=-sigma * alpha2)
    return Coefficients(torch.ones_like(sigma), -sigma, scale, noise)


class Denoiser(nn.Module):
    """D(x; sigma): the U-Net `model` in its preconditioning (arXiv 2206.00364, eq. 7).

    Wherever they occur below: `x` is noisy images [B, C, H, W]; `sigma` their noise level, one number
    or [B]; `class_labels` one-hot rows [B, label_dim], zeros if left out; `augment_labels`
    [B, augment_dim]. All raise `ShapeMismatch` for a tensor of another shape and `BadValue` for a
    label this network cannot read. The coefficients are computed in at least float32, the U-Net runs
    in the type of its parameters; its embedding may have another than the rest (`precision.in_precision`).
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.model: UNet | DDPMUNet = _UNETS[config.architecture](config)

    @property
    def head_name(self) -> str:
        """Module path of the convolution whose output channels are K groups of `config.head_channels`."""
        return f"model.{self.model.head_name}"

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """The denoised images of the last branch, which alone samples, [B, C, H, W]."""
        return self.branches(x, sigma, class_labels, augment_labels)[:, -1]

    def branches(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """The denoised images of every branch, [B, K, C, H, W]; c_skip x is common to all."""
        raw = self.raw(x, sigma, class_labels, augment_labels)
        x, at = self._prepare(x, sigma)
        groups = raw.reshape(len(x), self.config.num_branches, -1, *x.shape[1:])  # [B, K, 1 or 2, C, H, W]
        denoised = (at.skip[:, None, None, None] * x)[:, None] + at.out[:, None, None, None, None] * groups[:, :, 0]
        if at.out2 is not None:
            denoised = denoised + at.out2[:, None, None, None, None] * groups[:, :, 1]
        return denoised

    def raw(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """The output F of the U-Net, [B, K * config.head_channels, H, W]."""
        x, at = self._prepare(x, sigma)
        dtype = self.model.get_parameter(f"{self.model.head_name}.weight").dtype
        labels = self._row("class_labels", class_labels, self.config.label_dim, x)
        if labels is None and self.config.label_dim:
            labels = x.new_zeros(len(x), self.config.label_dim)
        augment = self._row("augment_labels", augment_labels, self.config.augment_dim, x)
        raw: Tensor = self.model(
            (at.scale[:, None, None, None] * x).to(dtype),
            at.noise.expand(len(x)),
            labels,
            augment,
        )
        return raw.to(x.dtype)

    def c_noise(self, sigma: Tensor | float) -> Tensor:
        """The noise level as the U-Net is told it, [B], or [1] for a single number."""
        sigma = torch.as_tensor(sigma)
        sigma = sigma.to(torch.promote_types(sigma.dtype, torch.float32)).reshape(-1)
        return self._coefficients(sigma).noise

    def _coefficients(self, sigma: Tensor) -> Coefficients:
        return coefficients(self.config.preconditioning, sigma, sigma_data=self.config.sigma_data)

    def _prepare(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Coefficients]:
        """Checks the shapes; `x` in at least float32 and the coefficients as [B] or [1]."""
        side = self.config.img_resolution
        wanted = (self.config.img_channels, side, side)
        if x.dim() != 4 or x.shape[1:] != wanted:
            raise ShapeMismatch(
                f"x is {list(x.shape)}, but this network denoises [B, {', '.join(map(str, wanted))}]; "
                "pass images of its channels and resolution"
            )
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        if sigma.dim() > 1 or sigma.numel() not in (1, len(x)):
            raise ShapeMismatch(f"sigma is {list(sigma.shape)} for {len(x)} images; pass one number or one per image")
        return x, self._coefficients(sigma.reshape(-1))

    def _row(self, name: str, labels: Tensor | None, width: int, x: Tensor) -> Tensor | None:
        if labels is None:
            return None
        if width == 0:
            raise BadValue(f"{name} were given to a network without them; pass None")
        if labels.shape != (len(x), width):
            raise ShapeMismatch(
                f"{name} are {list(labels.shape)}, but {len(x)} images of this network need {[len(x), width]}"
            )
        return labels.to(x.device)


_UNETS: dict[Architecture, Callable[[NetworkConfig], UNet | DDPMUNet]] = {
    "song": SongUNet,
    "dhariwal": DhariwalUNet,
    "ddpm": DDPMUNet,
}


def forward_flops(config: NetworkConfig) -> int:
    """Floating-point operations of one image's forward pass, a multiplication and its addition counted as two.

    Counted on shapes alone: no weights are made.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = build(config)
        image = torch.empty(1, config.img_channels, config.img_resolution, config.img_resolution)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.raw(image, torch.ones(1))
    return int(counter.get_total_flops())


def build(config: NetworkConfig) -> Denoiser:
    """A freshly initialised network; randomness comes from torch's global generator."""
    return Denoiser(config)
