"""The two U-Net families of EDM, in one implementation.

`SongUNet` (DDPM++ and NCSN++ of Song et al., arXiv 2011.13456) and `DhariwalUNet` (ADM of Dhariwal and
Nichol, arXiv 2105.05233) share blocks, attention and resampling; `UNet` holds what they have in common
and its two subclasses what differs. Parameter names are those of the published EDM checkpoints. Written
from the papers, and checked number by number in tests/golden.

A network may have a K-fold head: K consecutive groups of output channels, one for each branch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdense_core.errors import BadValue
from bdense_core.network_config import NetworkConfig

Resampling = Literal["up", "down"]

FOURIER_SCALE = 16.0  # arXiv 2011.13456, appendix C.2


class PositionalEmbedding(nn.Module):
    """All cosines, then all sines, of a number at `channels / 2` frequencies from 1 down to 1/10000."""

    def __init__(self, channels: int, *, endpoint: bool) -> None:
        super().__init__()
        self.num_freqs = channels // 2
        self.last = self.num_freqs - 1 if endpoint else self.num_freqs

    def forward(self, c_noise: Tensor) -> Tensor:  # [B] -> [B, channels]
        index = torch.arange(self.num_freqs, dtype=c_noise.dtype, device=c_noise.device)
        angle = torch.outer(c_noise, (1 / 10000) ** (index / self.last))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """All cosines, then all sines, of a number at random frequencies, which belong to the checkpoint."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * FOURIER_SCALE)

    def forward(self, c_noise: Tensor) -> Tensor:  # [B] -> [B, channels]
        angle = torch.outer(c_noise, 2 * math.pi * self.freqs.to(c_noise.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class Resample(nn.Module):
    """Doubles or halves the resolution with a separable low-pass filter."""

    resample_filter: Tensor

    def __init__(self, direction: Resampling, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.direction = direction
        self.register_buffer("resample_filter", _filter_2d(taps))

    def forward(self, x: Tensor) -> Tensor:
        return _resample(x, self.resample_filter, self.direction)


class ResampledConv(nn.Conv2d):
    """A resampling filter followed by a convolution."""

    resample_filter: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, direction: Resampling, taps: tuple[int, ...]
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.direction = direction
        self.register_buffer("resample_filter", _filter_2d(taps))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_resample(input, self.resample_filter, self.direction))


class ConvThenDownsample(nn.Conv2d):
    """A 3x3 convolution, then the filter: the image path of the residual encoder.

    All padding is applied before the convolution, so that at the border the filter sees convolved
    padding instead of zeros.
    """

    resample_filter: Tensor

    def __init__(self, in_channels: int, out_channels: int, taps: tuple[int, ...]) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1 + (len(taps) - 1) // 2)
        self.register_buffer("resample_filter", _filter_2d(taps))

    def forward(self, input: Tensor) -> Tensor:
        return _resample(super().forward(input), self.resample_filter, "down", padding=0)


def _filter_2d(taps: tuple[int, ...]) -> Tensor:
    """f f^T / (sum f)^2, [1, 1, taps, taps]."""
    line = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(line, line) / line.sum().square())[None, None]


def _resample(x: Tensor, kernel: Tensor, direction: Resampling, padding: int | None = None) -> Tensor:
    """Filters each channel by itself, with stride 2 downwards or, transposed, upwards."""
    channels, pad = x.shape[1], (kernel.shape[-1] - 1) // 2 if padding is None else padding
    per_channel = kernel.to(x.dtype).expand(channels, -1, -1, -1)  # [C, 1, taps, taps]
    if direction == "down":
        return functional.conv2d(x, per_channel, stride=2, padding=pad, groups=channels)
    # Upsampling puts a zero beside every pixel and row, so the filter must sum to 4.
    return functional.conv_transpose2d(x, 4 * per_channel, stride=2, padding=pad, groups=channels)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation with at least four channels a group and at most 32 groups."""
    groups = min(32, channels // 4)
    if groups < 1 or channels % groups:
        raise BadValue(
            f"a layer of {channels} channels cannot be split into {groups} equal groups; "
            "choose network.model_channels as a multiple of 32, or a multiple of 4 if it is small"
        )
    return nn.GroupNorm(groups, channels, eps=eps)


@dataclass(frozen=True, kw_only=True)
class BlockStyle:
    """What distinguishes the residual blocks of the two families."""

    emb_channels: int
    dropout: float
    eps: float  # of every group norm
    adaptive_scale: bool  # the embedding gives scale and shift after the norm, not a shift before it
    skip_scale: float  # factor after every residual addition
    channels_per_head: int | None  # None: one head
    project_resampled: bool  # a resampling block has a 1x1 convolution on its skip even if channels agree
    taps: tuple[int, ...] = (1, 1)

    def heads(self, channels: int) -> int:
        """Attention heads of a layer with that many channels; 0 where it is too narrow for one."""
        return 1 if self.channels_per_head is None else channels // self.channels_per_head


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip, told the noise level by `emb`, then perhaps attention."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        resampling: Resampling | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.style = style
        self.num_heads = style.heads(out_channels) if attention else 0
        self.norm0 = group_norm(in_channels, style.eps)
        self.conv0 = _conv(in_channels, out_channels, 3, resampling, style.taps)
        self.affine = nn.Linear(style.emb_channels, out_channels * (2 if style.adaptive_scale else 1))
        self.norm1 = group_norm(out_channels, style.eps)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip: nn.Module = nn.Identity()
        if in_channels != out_channels or (resampling and style.project_resampled):
            self.skip = _conv(in_channels, out_channels, 1, resampling, style.taps)
        elif resampling:
            self.skip = Resample(resampling, style.taps)
        if self.num_heads:
            self.norm2 = group_norm(out_channels, style.eps)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        residual = self.conv0(functional.silu(self.norm0(x)))
        told = self.affine(emb)[:, :, None, None].to(residual.dtype)  # [B, C or 2C, 1, 1]
        if self.style.adaptive_scale:
            scale, shift = told.chunk(2, dim=1)
            residual = functional.silu(torch.addcmul(shift, self.norm1(residual), scale + 1))
        else:
            residual = functional.silu(self.norm1(residual + told))
        residual = self.conv1(functional.dropout(residual, self.style.dropout, self.training))
        x = (self.skip(x) + residual) * self.style.skip_scale
        if self.num_heads:
            x = (x + self._attend(self.norm2(x))) * self.style.skip_scale
        return x

    def _attend(self, x: Tensor) -> Tensor:
        """Self-attention over pixels; channels of `qkv` are ordered (head, channel, query/key/value)."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(x).reshape(batch, self.num_heads, channels // self.num_heads, 3, height * width)
        q, k, v = qkv.permute(3, 0, 1, 4, 2)  # each [B, heads, pixels, channels per head]
        attended = functional.scaled_dot_product_attention(q, k, v)  # scores / sqrt(channels per head)
        projected: Tensor = self.proj(attended.transpose(2, 3).reshape(batch, channels, height, width))
        return projected


def _conv(
    in_channels: int, out_channels: int, kernel: int, resampling: Resampling | None, taps: tuple[int, ...]
) -> nn.Conv2d:
    if resampling is None:
        return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    return ResampledConv(in_channels, out_channels, kernel, resampling, taps)


class UNet(nn.Module):
    """An encoder that halves the resolution level by level, and a decoder that reads every encoder state.

    Layers are named as in the published checkpoints: `enc` and `dec` hold `{res}x{res}_{layer}`.
    Subclasses say where attention sits, and add their embedding, head and, if any, image paths
    (the methods below `forward`).
    """

    head_name: str

    def __init__(self, config: NetworkConfig, style: BlockStyle) -> None:
        super().__init__()
        self.config = config
        self.style = style
        self.finest, self.deepest = config.resolutions[0], config.resolutions[-1]

    def _add_layers(self, stem_channels: int) -> None:
        """Registers `enc` and `dec`; subclasses call it after their embedding, for the official order."""
        widths = [self.config.model_channels * mult for mult in self.config.channel_mult]
        levels = list(zip(self.config.resolutions, widths, strict=True))
        num_blocks, style = self.config.num_blocks, self.style
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        channels = stem_channels
        skips: list[int] = []  # channels of each stored encoder state
        for res, width in levels:
            if res == self.finest:
                self.enc[f"{res}x{res}_conv"] = nn.Conv2d(self.config.img_channels, channels, 3, padding=1)
            else:
                self.enc[f"{res}x{res}_down"] = ResidualBlock(channels, channels, style, resampling="down")
                self._register_image_input(res, channels)
            skips.append(channels)
            for i in range(num_blocks):
                attention = self._attends(res)
                self.enc[f"{res}x{res}_block{i}"] = ResidualBlock(channels, width, style, attention=attention)
                channels = width
                skips.append(channels)
        for res, width in reversed(levels):
            if res == self.deepest:
                self.dec[f"{res}x{res}_in0"] = ResidualBlock(channels, channels, style, attention=True)
                self.dec[f"{res}x{res}_in1"] = ResidualBlock(channels, channels, style)
            else:
                self.dec[f"{res}x{res}_up"] = ResidualBlock(channels, channels, style, resampling="up")
            for i in range(num_blocks + 1):
                attention = self._attends(res, last_in_decoder=i == num_blocks)
                self.dec[f"{res}x{res}_block{i}"] = ResidualBlock(
                    channels + skips.pop(), width, style, attention=attention
                )
                channels = width
            self._register_output(res, channels)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """The raw output F.

        Args:
            x: scaled noisy images, [B, C, H, W].
            c_noise: the noise level as the network is told it, [B].
            class_labels: one-hot rows, [B, label_dim]; zeros if left out.
            augment_labels: [B, augment_dim]; no term if left out.

        Returns:
            [B, K * C, H, W].
        """
        emb = self._embed(c_noise, class_labels, augment_labels)  # [B, emb_channels]
        image, skips = x, []
        for res in self.config.resolutions:
            if res == self.finest:
                x = self.enc[f"{res}x{res}_conv"](x)
            else:
                x, image = self._add_image_input(res, self.enc[f"{res}x{res}_down"](x, emb), image)
            skips.append(x)
            for i in range(self.config.num_blocks):
                x = self.enc[f"{res}x{res}_block{i}"](x, emb)
                skips.append(x)
        output: Tensor | None = None
        for res in reversed(self.config.resolutions):
            if res == self.deepest:
                x = self.dec[f"{res}x{res}_in1"](self.dec[f"{res}x{res}_in0"](x, emb), emb)
            else:
                x = self.dec[f"{res}x{res}_up"](x, emb)
            for i in range(self.config.num_blocks + 1):
                x = self.dec[f"{res}x{res}_block{i}"](torch.cat([x, skips.pop()], dim=1), emb)
            output = self._add_output(res, x, output)
        assert output is not None
        return output

    def _embed(self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _attends(self, res: int, *, last_in_decoder: bool | None = None) -> bool:
        """Whether a block has attention; `last_in_decoder` is None in the encoder."""
        return res in self.config.attn_resolutions

    def _register_image_input(self, res: int, channels: int) -> None:
        """Registers the layers that read the input image again at a coarser level."""

    def _add_image_input(self, res: int, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the image path to `x`; returns both as the next level wants them."""
        return x, image

    def _register_output(self, res: int, channels: int) -> None:
        raise NotImplementedError

    def _add_output(self, res: int, x: Tensor, output: Tensor | None) -> Tensor | None:
        """The running output after this level of the decoder; None while there is none."""
        raise NotImplementedError

    def _drop_labels(self, class_labels: Tensor) -> Tensor:
        """Labels with each row replaced by zeros at the configured rate, in training only."""
        if not self.training or self.config.label_dropout == 0:
            return class_labels
        kept = torch.rand(len(class_labels), 1, device=class_labels.device) >= self.config.label_dropout
        return class_labels * kept.to(class_labels.dtype)


class SongUNet(UNet):
    """DDPM++ and NCSN++ (arXiv 2011.13456, appendix C), with their skip and residual image paths."""

    map_noise: nn.Module

    def __init__(self, config: NetworkConfig) -> None:
        emb_channels = config.model_channels * config.channel_mult_emb
        noise_channels = config.model_channels * config.channel_mult_noise
        style = BlockStyle(
            emb_channels=emb_channels,
            dropout=config.dropout,
            eps=1e-6,
            adaptive_scale=False,
            skip_scale=math.sqrt(0.5),
            channels_per_head=None,
            project_resampled=True,
            taps=config.resample_filter,
        )
        super().__init__(config, style)
        if config.embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        if config.label_dim:
            self.map_label = nn.Linear(config.label_dim, noise_channels)
        if config.augment_dim:
            self.map_augment = nn.Linear(config.augment_dim, noise_channels, bias=False)
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        self.image_channels = config.img_channels  # of the residual image path, which widens
        self._add_layers(stem_channels=config.model_channels)
        self.head_name = f"dec.{self.finest}x{self.finest}_aux_conv"
        self._initialise()

    def _initialise(self) -> None:
        """DDPM's initialisation: fan-average uniform, no biases, residual branches that end near zero.

        The gain of `qkv` is DDPM's 0.1 / C variance, spread over one matrix of 4 C rows and columns.
        """
        gains = {"conv1": 1e-5, "proj": 1e-5, "aux_conv": 1e-5, "qkv": math.sqrt(0.2)}
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                gain = next((gain for end, gain in gains.items() if name.endswith(end)), 1.0)
                nn.init.xavier_uniform_(layer.weight, gain)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def _embed(self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        cosines, sines = self.map_noise(c_noise).chunk(2, dim=1)
        emb = torch.cat([sines, cosines], dim=1).to(self.map_layer0.weight.dtype)  # sines first here
        if class_labels is not None:
            # A one-hot row of L entries has mean square 1 / L; the factor brings it to 1.
            labels = self._drop_labels(class_labels.to(emb.dtype)) * math.sqrt(self.config.label_dim)
            emb = emb + self.map_label(labels)
        if augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        return functional.silu(self.map_layer1(functional.silu(self.map_layer0(emb))))

    def _attends(self, res: int, *, last_in_decoder: bool | None = None) -> bool:
        return res in self.config.attn_resolutions and last_in_decoder is not False

    def _register_image_input(self, res: int, channels: int) -> None:
        if self.config.encoder_type == "skip":
            self.enc[f"{res}x{res}_aux_down"] = Resample("down", self.style.taps)
            self.enc[f"{res}x{res}_aux_skip"] = nn.Conv2d(self.config.img_channels, channels, 1)
        elif self.config.encoder_type == "residual":
            self.enc[f"{res}x{res}_aux_residual"] = ConvThenDownsample(self.image_channels, channels, self.style.taps)
            self.image_channels = channels

    def _add_image_input(self, res: int, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.encoder_type == "skip":
            image = self.enc[f"{res}x{res}_aux_down"](image)
            return x + self.enc[f"{res}x{res}_aux_skip"](image), image
        if self.config.encoder_type == "residual":
            x = (x + self.enc[f"{res}x{res}_aux_residual"](image)) * math.sqrt(0.5)
            return x, x
        return x, image

    def _register_output(self, res: int, channels: int) -> None:
        if self.config.decoder_type == "skip" and res != self.deepest:
            self.dec[f"{res}x{res}_aux_up"] = Resample("up", self.style.taps)
        if self.config.decoder_type == "skip" or res == self.finest:
            self.dec[f"{res}x{res}_aux_norm"] = group_norm(channels, self.style.eps)
            self.dec[f"{res}x{res}_aux_conv"] = nn.Conv2d(channels, self.config.out_channels, 3, padding=1)

    def _add_output(self, res: int, x: Tensor, output: Tensor | None) -> Tensor | None:
        if self.config.decoder_type == "standard" and res != self.finest:
            return None
        here: Tensor = self.dec[f"{res}x{res}_aux_conv"](functional.silu(self.dec[f"{res}x{res}_aux_norm"](x)))
        if output is None:
            return here
        coarser: Tensor = self.dec[f"{res}x{res}_aux_up"](output)
        return here + coarser


class DhariwalUNet(UNet):
    """ADM (arXiv 2105.05233, section 3 and appendix B)."""

    head_name = "out_conv"

    def __init__(self, config: NetworkConfig) -> None:
        emb_channels = config.model_channels * config.channel_mult_emb
        style = BlockStyle(
            emb_channels=emb_channels,
            dropout=config.dropout,
            eps=1e-5,
            adaptive_scale=True,
            skip_scale=1.0,
            channels_per_head=64,
            project_resampled=False,
        )
        super().__init__(config, style)
        self.map_noise = PositionalEmbedding(config.model_channels, endpoint=False)
        if config.augment_dim:
            self.map_augment = nn.Linear(config.augment_dim, config.model_channels, bias=False)
        self.map_layer0 = nn.Linear(config.model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        if config.label_dim:
            self.map_label = nn.Linear(config.label_dim, emb_channels, bias=False)
        self._add_layers(stem_channels=config.model_channels * config.channel_mult[0])
        self._initialise()

    def _initialise(self) -> None:
        """ADM's initialisation: torch's own, residual branches that end at zero, labels as an embedding."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Conv2d) and name.endswith(("conv1", "proj", "out_conv")):
                nn.init.zeros_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        if self.config.label_dim:
            nn.init.normal_(self.map_label.weight)

    def _embed(self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(c_noise).to(self.map_layer0.weight.dtype)
        if augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = self.map_layer1(functional.silu(self.map_layer0(emb)))
        if class_labels is not None:
            emb = emb + self.map_label(self._drop_labels(class_labels.to(emb.dtype)))
        return functional.silu(emb)

    def _register_output(self, res: int, channels: int) -> None:
        if res == self.finest:
            self.out_norm = group_norm(channels, self.style.eps)
            self.out_conv = nn.Conv2d(channels, self.config.out_channels, 3, padding=1)

    def _add_output(self, res: int, x: Tensor, output: Tensor | None) -> Tensor | None:
        if res != self.finest:
            return None
        image: Tensor = self.out_conv(functional.silu(self.out_norm(x)))
        return image
