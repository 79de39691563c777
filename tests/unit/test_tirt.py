import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdense_core import discrete, tirt

SNR = discrete.cosine().snr
ZEROS = torch.zeros(1000, dtype=torch.float64)


def test_the_noisy_end_is_almost_unsupervised_at_gamma_5():
    """The measured values of spec/methods.md 3."""
    shares = tirt.batch_weights(tirt.tirt(SNR, ZEROS, gamma=5.0))
    assert shares[:255].tolist() == pytest.approx([2.5] * 255, rel=0.01)
    assert shares[[800, 950]].tolist() == pytest.approx([0.05, 0.003], rel=0.1)


def test_min_snr_is_the_clipped_one_divided_by_the_snr():
    assert torch.allclose(tirt.min_snr(SNR, gamma=5.0) * SNR, tirt.clipped_snr(SNR, gamma=5.0), rtol=1e-12)


def test_a_hot_curriculum_is_the_clipped_snr_and_a_cold_one_chooses():
    logits = torch.linspace(-3, 3, 1000, dtype=torch.float64)
    hot, cold = (tirt.tirt(SNR, logits, gamma=5.0, tau=tau) for tau in (1e9, 1e-3))
    assert torch.allclose(2 * hot, tirt.clipped_snr(SNR, gamma=5.0), rtol=1e-6)
    assert cold[:400].max() < 1e-100
    assert torch.equal(cold[600:], tirt.clipped_snr(SNR, gamma=5.0)[600:])


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_the_weights_of_a_batch_have_the_mean_1(omega):
    assert tirt.batch_weights(torch.tensor(omega, dtype=torch.float64)).mean().item() == pytest.approx(1)


def test_importances_of_nearly_nothing_do_not_explode():
    assert tirt.batch_weights(torch.tensor([1e-12, 3e-12])).tolist() == pytest.approx([1e-4, 3e-4])


def test_learning_lowers_the_logits_of_timesteps_whose_loss_is_above_the_weighted_mean():
    """The gradient's closed form, with s = sigmoid(lambda): w_t (1 - s_t) (L_t - mean) / B."""
    losses = torch.tensor([0.1, 0.5, 1.0, 4.0], dtype=torch.float64)
    snr, logits = SNR[[100, 300, 500, 700]], torch.tensor([0.0, 1.0, -1.0, 0.3], dtype=torch.float64)
    logits.requires_grad_()
    weights = tirt.batch_weights(tirt.tirt(snr, logits, gamma=5.0))
    mean = (losses * weights).mean()
    mean.backward()
    expected = weights * (1 - logits.sigmoid()) * (losses - mean) / 4
    assert logits.grad.tolist() == pytest.approx(expected.tolist())
    assert [math.copysign(1, slope) for slope in logits.grad.tolist()] == [-1, 1, 1, 1]
