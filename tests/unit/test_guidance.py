import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from bdense_core import discrete, guidance
from bdense_core.checkpoints import save_network
from bdense_core.errors import BadValue, CheckpointError
from bdense_core.guidance import GuidedSampler, ddim, ddim_times, guided, tag_weight
from bdense_core.networks import NetworkConfig, build
from bdense_core.sampling import draw, sampler_of
from bdense_core.seeds import evaluation_rows

SHARES = discrete.cosine().alphas_cumprod.tolist()
MEAN, STD = 0.2, 0.5
CONFIG = NetworkConfig.ddpm(
    img_resolution=8, img_channels=1, label_dim=3, preconditioning="cosine", model_channels=8, channel_mult=[1],
    num_blocks=1, attn_resolutions=[], norm_groups=4, dropout=0.0,
)  # fmt: skip


def gaussian(x, t):
    """The exact noise of data from N(0.2, 0.5^2) in every pixel."""
    share = SHARES[t]
    return math.sqrt(1 - share) * (x - math.sqrt(share) * MEAN) / (share * STD**2 + 1 - share)


def walked(x, num_steps=50, **settings):
    *_, image = ddim(gaussian, x, SHARES, ddim_times(1000, num_steps), **settings)
    return image


def noise(count=4, seed=0):
    return torch.randn(count, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    return build(CONFIG).eval()


def test_guidance_of_1_is_the_conditional_prediction_and_of_0_the_other():
    cond, null = noise(seed=1), noise(seed=2)
    assert torch.equal(guided(cond, null, 0.0), null)
    assert torch.allclose(guided(cond, null, 1.0), cond, atol=1e-15)
    assert torch.allclose(guided(cond, null, 3.0) - cond, 2 * (cond - null), atol=1e-14)


def test_time_aware_guidance_does_not_reach_its_ends():
    """The values of spec/methods.md 3."""
    found = [tag_weight(t, 1000, w_min=1.0, w_max=4.0, beta=5.0) for t in (0, 500, 980)]
    assert found == pytest.approx([3.77, 2.5, 1.25], abs=0.005)


def test_times_fall_to_0_and_are_more_than_asked_where_they_do_not_fit():
    assert ddim_times(1000, 50) == tuple(range(980, -20, -20))
    assert len(ddim_times(1000, 30)) == 31
    assert ddim_times(1000, 1) == (0,)
    with pytest.raises(BadValue, match="1001 sampling steps of 1000"):
        ddim_times(1000, 1001)


def test_ddim_carries_noise_to_the_data_of_a_gaussian():
    """Whose probability flow is a line: the image is the mean and 0.5 times the noise; twice the steps, half the
    error."""
    x, errors = noise(), []
    for num_steps in (50, 100, 200):
        errors.append((walked(x, num_steps, clip=None) - (MEAN + STD * x)).abs().max().item())
    assert errors[2] < 0.02
    assert 1.5 < errors[0] / errors[1] < 2.6
    assert 1.5 < errors[1] / errors[2] < 2.6


def test_images_are_limited_in_each_step():
    x = 4 * noise()
    assert walked(x, clip=None).abs().max() > 1.2
    assert walked(x, clip=0.7).abs().max() == pytest.approx(0.7)


def test_with_eta_images_have_the_data_s_spread_and_other_noise_than_they_began_with():
    x = noise(500)
    image = walked(x, 200, clip=None, eta=1.0)
    assert image.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert image.std().item() == pytest.approx(STD, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([x.flatten(), image.flatten()]))[0, 1].item()) < 0.1


def test_with_eta_an_image_follows_from_its_own_noise_alone():
    x = noise(3)
    together = walked(x, 10, eta=0.5)
    assert torch.equal(together[1:2], walked(x[1:2], 10, eta=0.5))
    assert not torch.equal(together, walked(x, 10))


@pytest.mark.parametrize(
    ("settings", "nfe"),
    [
        ({"num_steps": 5, "guidance": 4.0, "tag_min": 1.0}, 10),
        ({"num_steps": 5, "guidance": 2.0}, 10),
        ({"num_steps": 5}, 5),
        ({"num_steps": 5, "guidance": 1.0, "tag_min": 1.0}, 5),
        ({"num_steps": 30}, 31),
    ],
)
def test_nfe_counts_the_network_calls_for_an_image(monkeypatch, settings, nfe):
    calls = []

    def predict(x, t, labels):
        calls.append(labels is not None)
        return x / 2

    monkeypatch.setattr(guidance, "noise_predictor", lambda asked, precision: predict)
    sampler = GuidedSampler(**settings)
    sampler.bind(SimpleNamespace(config=CONFIG))(noise(2), torch.eye(3)[:2])
    assert sampler.nfe == len(calls) == nfe
    assert sum(calls) == len(ddim_times(1000, settings["num_steps"]))


def test_without_labels_the_image_is_unconditional_whatever_the_guidance():
    net, x = network(), noise(2).float().repeat(1, 1, 2, 2)
    images = [GuidedSampler(num_steps=4, guidance=w).bind(net)(x, None) for w in (1.0, 4.0)]
    no_class = GuidedSampler(num_steps=4, guidance=0.0).bind(net)(x, torch.eye(3)[:2])
    assert torch.equal(*images)
    assert torch.equal(images[0], no_class)


def test_a_network_that_is_not_told_timesteps_is_refused():
    other = build(dataclasses.replace(CONFIG, preconditioning="edm"))
    with pytest.raises(BadValue, match="preconditioning is edm"):
        GuidedSampler(num_steps=4).bind(other)(noise(1), None)


def test_a_file_s_sampler_draws_the_images_of_its_seed(tmp_path):
    sampler = GuidedSampler(num_steps=4, guidance=3.0, tag_min=1.0, clip=None)
    save_network(network(), tmp_path / "student.safetensors", {"sampler": sampler.to_dict()})
    found = sampler_of(str(tmp_path / "student.safetensors"))
    assert found == sampler
    images = torch.cat(list(draw(network(), found, count=5, seed=3, batch=2)))
    direct = sampler.bind(network())(*evaluation_rows(3, 0, 5, (1, 8, 8), 3))
    assert images.dtype == torch.uint8
    assert ((images.float() / 127.5 - 1) - direct.clamp(-1, 1)).abs().max() <= 1 / 127.5


@pytest.mark.parametrize(
    "wrong", [{"num_steps": "4"}, {"num_steps": 4.0}, {"guidance": True}, {"precision": "int4"}, {"w": 1}]
)
def test_a_sampler_that_is_not_understood_is_one_line(tmp_path, wrong):
    described = GuidedSampler(num_steps=4).to_dict() | wrong
    save_network(network(), tmp_path / "student.safetensors", {"sampler": described})
    with pytest.raises(CheckpointError, match="describes its sampler in a way that is not understood"):
        sampler_of(str(tmp_path / "student.safetensors"))
