"""What a Denoiser makes of a raw output, against the authors' of progressive distillation (shared/vectors/pd)."""

import pytest
import torch
from torch import nn

from bdense_core.networks import NetworkConfig, build
from tests.golden import pd

pytestmark = pytest.mark.golden


class Fixed(nn.Module):
    """Stands for the U-Net: gives one stored output."""

    head_name = "conv_out"

    def __init__(self, output):
        super().__init__()
        self.output = output
        self.conv_out = nn.Conv2d(1, 1, 1, dtype=output.dtype)

    def forward(self, x, c_noise, class_labels, augment_labels):
        return self.output


@pytest.mark.files("pd/predictions.safetensors")
def test_every_kind_of_raw_output_becomes_the_stored_image(path):
    stored = pd.read(path, torch.float64)
    kinds = {case["mean_type"] for case in stored.cases if "mean_type" in case}
    assert kinds
    logsnr, z, raw = stored["logsnr"], stored["z"], stored["raw"]
    sigma = (-logsnr / 2).exp()
    for kind in kinds:
        denoiser = build(
            NetworkConfig.ddpm(
                img_resolution=z.shape[-1],
                img_channels=z.shape[1],
                preconditioning=kind,
                model_channels=4,
                channel_mult=[1],
                num_blocks=1,
                attn_resolutions=[],
                norm_groups=2,
            )
        )
        denoiser.model = Fixed(torch.cat([raw, stored["raw2"]], dim=1) if kind == "both" else raw)
        image = denoiser(z * (1 + sigma**2).sqrt()[:, None, None, None], sigma)
        stored.check(f"{kind}.noclip.x", image, ill_conditioned=kind == "eps")
