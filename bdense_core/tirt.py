"""TIRT, timestep-importance rebalanced training: how much the loss of each timestep counts.

DASH, arXiv 2606.00798, and its authors' code. A curriculum is one importance omega_t for each of the T timesteps; the
weights of a batch are those of its timesteps over their mean *in that batch*, so each batch counts the same, and one
and the same timestep counts differently in different batches. TIRT's logits are learned with the teacher and frozen
for the student.

Which way it works, as the formulas have it (spec/methods.md 3):

- min(SNR, gamma) multiplies the squared error of the *noise*. The weights that Min-SNR (arXiv 2303.09556) derives for
  that error are min(SNR, gamma) / SNR; here they are `min_snr`, and the other form is `clipped_snr`. With gamma 5 on
  the cosine schedule the latter gives 2.5 times the mean to all t below about 260, 0.05 at t = 800 and 0.003 at
  t = 950: the noisy end, where guidance decides what the image will be, is almost unsupervised.
- Learning *lowers* the logits of hard timesteps. As the mean of the weights is fixed, the weighted loss falls when
  weight moves from timesteps whose loss is above the weighted mean to those below it: the derivative with respect to
  a logit has the sign of the difference. So the learned logits favour what is easy already.
"""

from torch import Tensor

_LEAST_MEAN = 1e-8


def clipped_snr(snr: Tensor, *, gamma: float) -> Tensor:
    """omega_t = min(SNR_t, gamma): what TIRT is before it has learned, up to a factor. [T]."""
    return snr.clamp(max=gamma)


def min_snr(snr: Tensor, *, gamma: float) -> Tensor:
    """omega_t = min(SNR_t, gamma) / SNR_t, Min-SNR-gamma for the error of the noise (arXiv 2303.09556, eq. 4). [T]."""
    return (gamma / snr).clamp(max=1.0)


def tirt(snr: Tensor, logits: Tensor, *, gamma: float, tau: float = 1.0) -> Tensor:
    """omega_t = min(SNR_t, gamma) sigmoid(lambda_t / tau).

    Args:
        snr: of each timestep, [T].
        logits: lambda, [T]; all 0 before training.
        tau: 1 is the authors' form. Tempering is ours (inferred): above 1 the logits count less, towards
            `clipped_snr`, below 1 more.
    """
    return clipped_snr(snr, gamma=gamma) * (logits / tau).sigmoid()


def batch_weights(omega: Tensor) -> Tensor:
    """Importances of a batch's timesteps over their mean, which the gradient flows through; both [B]."""
    return omega / omega.mean().clamp(min=_LEAST_MEAN)
