"""The U-Net of DDPM (Ho et al., arXiv 2006.11239, appendix B), with the class embedding of DASH (arXiv 2606.00798).

Parameter names are those of DASH's code and of the published PyTorch form of DDPM's weights. Written from descriptions
in formulas, and checked number by number in tests/golden. Layers start as torch draws them, as DASH's do.

A network may have a K-fold head: K consecutive groups of output channels, one for each branch.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdense_core.network_config import NetworkConfig

NORM_EPS = 1e-6


class DDPMUNet(nn.Module):
    """DDPM's U-Net; it is called as `bdense_core.unets.UNet` is.

    The class embedding has one row more than there are classes: the last is the null token, which stands for an absent
    label. In training each sample's label is replaced by it at the rate `config.label_dropout`. (DASH's code drops the
    labels of a whole batch at once.) Who wants every label heard while dropout stays on, as in DASH's distillation,
    builds the network with a `label_dropout` of 0.
    """

    head_name = "conv_out"

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        width, num_blocks = config.model_channels, config.num_blocks
        self.temb = TimeEmbedding(width, width * config.channel_mult_emb)
        if config.label_dim:
            self.class_embed = nn.Embedding(config.label_dim + 1, width * config.channel_mult_emb)
        self.conv_in = nn.Conv2d(config.img_channels, width, 3, padding=1)
        levels = [(res, width * mult) for res, mult in zip(config.resolutions, config.channel_mult, strict=True)]
        channels, skips = width, [width]  # `skips`: channels of each state that the decoder reads
        self.down = nn.ModuleList()
        for res, out in levels:
            last = res == config.resolutions[-1]
            self.down.append(Down(config, res, [channels, *[out] * (num_blocks - 1)], out, last=last))
            skips += [out] * (num_blocks if last else num_blocks + 1)
            channels = out
        self.mid = Middle(config, channels)
        self.up = nn.ModuleList()  # finest first, as `down`
        for res, out in reversed(levels):
            inputs = [before + skips.pop() for before in (channels, *[out] * num_blocks)]
            self.up.insert(0, Up(config, res, inputs, out, last=res == config.img_resolution))
            channels = out
        self.norm_out = _norm(config, channels)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

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
            class_labels: one-hot rows, [B, label_dim]; a row of zeros, and leaving them out, means the null token.
            augment_labels: None; this family has no augmentation.

        Returns:
            [B, K * config.head_channels, H, W].
        """
        temb = self._embed(c_noise, class_labels)  # [B, emb_channels]
        x = self.conv_in(x)
        skips = [x]
        for down in self.down:
            skips += down(skips[-1], temb)
        x = self.mid(skips[-1], temb)
        for up in reversed(self.up):
            x = up(x, temb, skips)
        image: Tensor = self.conv_out(functional.silu(self.norm_out(x)))
        return image

    def _embed(self, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        temb: Tensor = self.temb(c_noise)
        if not self.config.label_dim:
            return temb
        if class_labels is None:
            class_labels = temb.new_zeros(len(temb), self.config.label_dim)
        class_labels = self._drop_labels(class_labels.to(temb.dtype))
        rows = torch.cat([class_labels, 1 - class_labels.sum(1, keepdim=True)], dim=1)  # [B, classes + null]
        return temb + rows @ self.class_embed.weight

    def _drop_labels(self, class_labels: Tensor) -> Tensor:
        if not self.training or self.config.label_dropout == 0:
            return class_labels
        kept = torch.rand(len(class_labels), 1, device=class_labels.device) >= self.config.label_dropout
        return class_labels * kept.to(class_labels.dtype)


def time_features(c_noise: Tensor, channels: int) -> Tensor:
    """All sines, then all cosines, of a number at `channels / 2` frequencies from 1 down to 1/10000; [B, channels]."""
    half = channels // 2
    index = torch.arange(half, dtype=c_noise.dtype, device=c_noise.device)
    angle = torch.outer(c_noise, (index * (-math.log(10000) / (half - 1))).exp())
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """Two linear layers on the time features. No activation after the second: every block applies its own."""

    def __init__(self, channels: int, emb_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.dense = nn.ModuleList([nn.Linear(channels, emb_channels), nn.Linear(emb_channels, emb_channels)])

    def forward(self, c_noise: Tensor) -> Tensor:  # [B] -> [B, emb_channels]
        features = time_features(c_noise, self.channels).to(next(self.parameters()).dtype)
        embedded: Tensor = self.dense[1](functional.silu(self.dense[0](features)))
        return embedded


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where `config.attn_resolutions` has it."""

    def __init__(self, config: NetworkConfig, res: int, inputs: list[int], out: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(config, channels, out) for channels in inputs)
        self.attn = nn.ModuleList(Attention(config, out) for _ in inputs if res in config.attn_resolutions)

    def step(self, i: int, x: Tensor, temb: Tensor) -> Tensor:
        """`x` after block `i` and its attention."""
        x = self.block[i](x, temb)
        return self.attn[i](x) if self.attn else x


class Down(Level):
    """One level of the encoder; all but the last end by halving the resolution."""

    def __init__(self, config: NetworkConfig, res: int, inputs: list[int], out: int, *, last: bool) -> None:
        super().__init__(config, res, inputs, out)
        self.downsample = None if last else Downsample(out)

    def forward(self, x: Tensor, temb: Tensor) -> list[Tensor]:
        """Every state on the way, for the decoder to read."""
        states = [x]
        for i in range(len(self.block)):
            states.append(self.step(i, states[-1], temb))
        if self.downsample is not None:
            states.append(self.downsample(states[-1]))
        return states[1:]


class Up(Level):
    """One level of the decoder; all but the last end by doubling the resolution."""

    def __init__(self, config: NetworkConfig, res: int, inputs: list[int], out: int, *, last: bool) -> None:
        super().__init__(config, res, inputs, out)
        self.upsample = None if last else Upsample(out)

    def forward(self, x: Tensor, temb: Tensor, skips: list[Tensor]) -> Tensor:
        """Reads, and takes off the end of `skips`, one encoder state for each block."""
        for i in range(len(self.block)):
            x = self.step(i, torch.cat([x, skips.pop()], dim=1), temb)
        return x if self.upsample is None else self.upsample(x)


class Middle(nn.Module):
    """Two blocks at the coarsest resolution, with attention between them."""

    def __init__(self, config: NetworkConfig, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(config, channels, channels)
        self.attn_1 = Attention(config, channels)
        self.block_2 = ResidualBlock(config, channels, channels)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x, temb)), temb)
        return out


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip, told noise level and label by `temb` between them."""

    def __init__(self, config: NetworkConfig, channels: int, out: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm1 = _norm(config, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.temb_proj = nn.Linear(config.model_channels * config.channel_mult_emb, out)
        self.norm2 = _norm(config, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        residual = self.conv1(functional.silu(self.norm1(x)))
        residual = residual + self.temb_proj(functional.silu(temb))[:, :, None, None].to(residual.dtype)
        residual = functional.silu(self.norm2(residual))
        residual = self.conv2(functional.dropout(residual, self.dropout, self.training))
        total: Tensor = self.nin_shortcut(x) + residual
        return total


class Attention(nn.Module):
    """Self-attention over pixels with one head, added to its input."""

    def __init__(self, config: NetworkConfig, channels: int) -> None:
        super().__init__()
        self.norm = _norm(config, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))  # [B, 1, pixels, C]
        attended = functional.scaled_dot_product_attention(q, k, v)  # scores / sqrt(C)
        projected: Tensor = self.proj_out(attended[:, 0].mT.reshape(x.shape))
        return x + projected


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution; the one row and column of padding are at the far ends."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.conv(functional.pad(x, (0, 1, 0, 1)))
        return halved


class Upsample(nn.Module):
    """Doubles the resolution by repeating pixels, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))
        return doubled


def _norm(config: NetworkConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=NORM_EPS)
