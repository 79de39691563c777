"""Feature statistics, their files, and the Frechet distance between two of them.

A distance is comparable only with another of the same `Protocol` (spec/fid.md). Only Inception features
make an FID; with others the distance is named after them, such as `fd-digits`.
"""

import hashlib
import json
import logging
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from scipy.linalg import LinAlgError, eigh, eigvalsh
from torch import Tensor

from bdense_core.errors import EvaluationError, ShapeMismatch
from bdense_core.files import write_bytes_atomically

log = logging.getLogger(__name__)

_FILE_FORMAT = "bdense-statistics-1"
_UNREADABLE = (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for npz files that are missing, damaged, pickled, or of another kind."""


# --- statistics -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of the features of a set of images.

    Attributes:
        mean: [d], float64.
        covariance: [d, d], float64, divisor n - 1.
        n_samples: how many images.
        features: name of the feature network.
    """

    mean: Tensor
    covariance: Tensor
    n_samples: int
    features: str

    def __post_init__(self) -> None:
        width = self.mean.numel()
        if self.mean.shape != (width,) or self.covariance.shape != (width, width):
            raise ShapeMismatch(
                f"mean is {list(self.mean.shape)} and covariance {list(self.covariance.shape)}; "
                "they must be [d] and [d, d]"
            )
        if self.n_samples < 2:
            raise EvaluationError(f"statistics of {self.n_samples} images have no covariance; give 2 or more")


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, kept in float64.

    Batches are merged by their means and centred squares (Chan et al., 1979), so that nothing is lost
    where the mean is large beside the spread. It works on the device of the features it is given.
    """

    def __init__(self, features: str) -> None:
        self.features = features
        self.n_samples = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._squares = torch.zeros(0, 0, dtype=torch.float64)  # sum of (f - mean)(f - mean)^T

    def update(self, features: Tensor) -> None:
        """Adds a batch of features, [B, d].

        Raises:
            ShapeMismatch: not a matrix, or another width than before.
            EvaluationError: a feature that is not finite.
        """
        if features.dim() != 2:
            raise ShapeMismatch(f"features are {list(features.shape)}; give [images, width]")
        if len(features) == 0:
            return
        features = features.detach().to(torch.float64)
        if not bool(features.isfinite().all()):
            bad = int((~features.isfinite()).any(dim=1).sum())
            raise EvaluationError(
                f"{bad} of {len(features)} images have {self.features} features that are not finite "
                f"(after {self.n_samples} good ones); the images are probably not finite either"
            )
        mean = features.mean(dim=0)
        centred = features - mean
        self._merge(len(features), mean, centred.T @ centred)

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds what another accumulator has seen, such as another worker's.

        Raises:
            EvaluationError: it has seen other features.
            ShapeMismatch: its width differs.
        """
        if other.features != self.features:
            raise EvaluationError(f"cannot merge {other.features} features into {self.features} features")
        if other.n_samples:
            self._merge(other.n_samples, other._mean, other._squares)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if self.n_samples == 0:
            self.n_samples, self._mean, self._squares = count, mean.clone(), squares.clone()
            return
        if mean.shape != self._mean.shape:
            raise ShapeMismatch(f"features have width {len(mean)}, but {len(self._mean)} before; use one network")
        total = self.n_samples + count
        mean, squares = mean.to(self._mean.device), squares.to(self._mean.device)
        apart = mean - self._mean
        self._squares += squares + torch.outer(apart, apart) * (self.n_samples * count / total)
        self._mean += apart * (count / total)
        self.n_samples = total

    def finish(self) -> Statistics:
        """The statistics of everything seen so far, on the CPU.

        Raises:
            EvaluationError: fewer than two images.
        """
        covariance = self._squares.cpu() / max(self.n_samples - 1, 1)
        return Statistics(self._mean.cpu().clone(), covariance, self.n_samples, self.features)


def statistics_of(features: Tensor, name: str) -> Statistics:
    """Mean and covariance of features held in one tensor, [n, d]."""
    seen = FeatureStatistics(name)
    seen.update(features)
    return seen.finish()


# --- files ----------------------------------------------------------------------------------------------


def save_statistics(statistics: Statistics, path: Path) -> str:
    """Writes a safetensors file, whole or not at all, and returns its sha256.

    Equal statistics give equal bytes.
    """
    # One metadata entry: safetensors keeps no order among several, and the hash must not vary.
    note = json.dumps({"format": _FILE_FORMAT, "features": statistics.features, "n_samples": statistics.n_samples})
    tensors = {"mean": statistics.mean.contiguous(), "covariance": statistics.covariance.contiguous()}
    content = save(tensors, metadata={"bdense": note})
    write_bytes_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def load_statistics(path: Path, *, sha256: str | None = None) -> Statistics:
    """Reads a file of `save_statistics`.

    Args:
        sha256: what the file must hash to; unchecked if left out.

    Raises:
        EvaluationError: missing, altered, or not such a file.
    """
    try:
        content = path.read_bytes()
    except OSError as cause:
        raise EvaluationError(f"statistics {path} cannot be read ({cause}); compute or fetch them first") from cause
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise EvaluationError(f"statistics {path} hash to {found}, not {sha256}; fetch the file again")
    try:
        tensors = load(content)
        note = json.loads(_metadata(content)["bdense"])
        if note["format"] != _FILE_FORMAT:
            raise EvaluationError(f"statistics {path} have format {note['format']}; this version reads {_FILE_FORMAT}")
        return Statistics(tensors["mean"], tensors["covariance"], int(note["n_samples"]), str(note["features"]))
    except (SafetensorError, KeyError, ValueError) as cause:
        raise EvaluationError(f"{path} is not a statistics file ({cause}); compute it again") from cause


def _metadata(content: bytes) -> dict[str, str]:
    """The free text of a safetensors file: its header is a length of 8 bytes, then JSON."""
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return metadata


def statistics_from_npz(path: Path, *, features: str, n_samples: int) -> Statistics:
    """Reads reference statistics as EDM and clean-fid publish them: an npz file with `mu` [d] and `sigma` [d, d].

    Args:
        features: identity of the feature network they were made with; the file does not say.
        n_samples: how many images they were made of; the file does not say either.

    Raises:
        EvaluationError: missing, damaged, or no mean and covariance.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {key: np.asarray(arrays[key]) for key in ("mu", "sigma")}
    except _UNREADABLE as cause:
        raise EvaluationError(
            f"{path} cannot be read as statistics with mu and sigma ({cause}); fetch the file again"
        ) from cause
    if problem := _problem_of(found["mu"], found["sigma"]):
        raise EvaluationError(f"{path} holds no mean and covariance: {problem}; fetch the file again")
    mean, covariance = (torch.from_numpy(array.astype(np.float64)) for array in found.values())
    return Statistics(mean, covariance, n_samples, features)


def _problem_of(mean: np.ndarray, covariance: np.ndarray) -> str | None:
    """Why two arrays are no mean and covariance, or None."""
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        return f"mu is {mean.dtype} and sigma {covariance.dtype}, not floating-point numbers"
    if mean.ndim != 1 or mean.size == 0 or covariance.shape != 2 * mean.shape:
        return f"mu is {list(mean.shape)} and sigma {list(covariance.shape)}, not [d] and [d, d]"
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        return "a value is not finite"
    variances = covariance.diagonal()
    if (variances < 0).any():
        return f"the variance {variances.min():.6g} is negative"
    # Single precision keeps seven digits; what is farther apart than its rounding is not symmetric.
    if np.abs(covariance - covariance.T).max() > 1e-6 * variances.max():
        return "sigma is not symmetric"
    return None


# --- the distance ---------------------------------------------------------------------------------------


def frechet_distance(x: Statistics, y: Statistics) -> float:
    """|mean_x - mean_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)), in float64.

    Dowson and Landau, 1982; by symmetric eigenproblems, never the root of a general matrix (spec/fid.md). With no more
    images than features the covariance is singular and the distance biased; that is logged.

    Raises:
        EvaluationError: other feature networks, or statistics that are not finite.
        ShapeMismatch: other widths.
    """
    if x.features != y.features:
        raise EvaluationError(f"{x.features} and {y.features} features cannot be compared; use one network")
    if x.mean.shape != y.mean.shape:
        raise ShapeMismatch(f"statistics have widths {len(x.mean)} and {len(y.mean)}; use one feature network")
    for side in (x, y):
        if not bool(side.mean.isfinite().all() and side.covariance.isfinite().all()):
            raise EvaluationError(f"statistics of {side.n_samples} {side.features} features are not finite")
        if side.n_samples <= len(side.mean):
            log.warning(
                "covariance of %d images in %d %s features is singular; compare this distance only with "
                "others of the same number of images",
                side.n_samples,
                len(side.mean),
                side.features,
            )
    apart = (x.mean.double() - y.mean.double()).square().sum()
    overlap = _overlap(x.covariance, y.covariance)
    return max(0.0, float(apart + x.covariance.trace() + y.covariance.trace()) - 2 * overlap)


def _overlap(x: Tensor, y: Tensor) -> float:
    """tr (S_x S_y)^(1/2), the sum of the roots of the eigenvalues of S_x S_y.

    They are those of the symmetric A^T S_x A for any A with A A^T = S_y. LAPACK's solver of S_x S_y v = l v takes the
    Cholesky factor; where that exists, A A^T is S_y to its last digits, however small the eigenvalues. For an S_y
    without full rank it may not exist, and A is V L^(1/2) with S_y = V L V^T.
    """
    try:
        # For eigenvalues alone "gv" is faster than the default, "gvd".
        values = eigh(
            _symmetric(x),
            _symmetric(y),
            type=2,
            eigvals_only=True,
            driver="gv",
            overwrite_a=True,
            overwrite_b=True,
            check_finite=False,
        )
    except LinAlgError:
        squares, vectors = eigh(_symmetric(y), overwrite_a=True, check_finite=False)
        factor = vectors * np.sqrt(squares.clip(min=0))
        values = eigvalsh(factor.T @ _symmetric(x) @ factor, overwrite_a=True, check_finite=False)
    # Rounding makes zero eigenvalues slightly negative.
    return float(np.sqrt(values.clip(min=0)).sum())


def _symmetric(covariance: Tensor) -> np.ndarray:
    """A covariance for LAPACK, which reads one triangle only; a copy in its order, so that it need not make one."""
    matrix: np.ndarray = covariance.double().numpy()
    symmetric: np.ndarray = (matrix + matrix.T) / 2
    return symmetric.T
