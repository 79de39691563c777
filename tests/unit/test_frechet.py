import hashlib
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bdense_core.errors import EvaluationError, ShapeMismatch
from bdense_core.frechet import (
    FeatureStatistics,
    Statistics,
    frechet_distance,
    load_statistics,
    save_statistics,
    statistics_from_npz,
    statistics_of,
)
from bdense_core.protocol import Protocol, require_same_protocol


def gaussian(mean, covariance, n_samples=1000, features="digits"):
    return Statistics(
        torch.tensor(mean, dtype=torch.float64),
        torch.tensor(covariance, dtype=torch.float64),
        n_samples,
        features,
    )


def features(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distance_of_diagonal_gaussians_is_the_closed_form():
    x = gaussian([0.0, 1.0], [[4.0, 0.0], [0.0, 9.0]])
    y = gaussian([3.0, 5.0], [[1.0, 0.0], [0.0, 25.0]])
    # by hand: 3^2 + 4^2 + (2 - 1)^2 + (3 - 5)^2
    assert frechet_distance(x, y) == pytest.approx(30.0, rel=1e-12)


def test_distance_of_gaussians_that_do_not_commute():
    # by hand: tr of the root of a 2x2 product P is sqrt(tr P + 2 sqrt(det P)); P = S_x S_y
    x = gaussian([0.0, 0.0], [[2.0, 1.0], [1.0, 2.0]])
    y = gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 3.0]])
    assert frechet_distance(x, y) == pytest.approx(8 - 2 * math.sqrt(8 + 2 * math.sqrt(9)), rel=1e-12)


def test_distance_is_symmetric_and_zero_to_itself():
    x, y = statistics_of(features(50, 8), "digits"), statistics_of(2 * features(60, 8, 1), "digits")
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-12)
    assert 0 <= frechet_distance(x, x) < 1e-12


def with_decades(n, d, decades, seed):
    """Features whose standard deviations fall over so many decades, along random axes."""
    axes, _ = torch.linalg.qr(features(d, d, seed + 100))
    return features(n, d, seed) * torch.logspace(0, -decades, d, dtype=torch.float64) @ axes


def distance_by_singular_values(x, y):
    """From the features: tr (S_x S_y)^(1/2) is the sum of the singular values of X Y^T, and no root is taken."""
    centred = [(f - f.mean(0)) / math.sqrt(len(f) - 1) for f in (x, y)]
    overlap = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    return float(apart + sum(f.square().sum() for f in centred) - 2 * overlap)


@pytest.mark.parametrize(
    ("num_x", "num_y", "decades", "tolerance"),
    [
        (90, 80, 2, 1e-12),
        (90, 80, 6, 1e-12),  # variances down to 1e-12: nearly singular
        (90, 80, 7.5, 1e-11),  # down to 1e-15: at the edge of what float64 tells from 0
        (90, 80, 9, 1e-7),  # beyond it; roots of rounding errors of 1e-16 are 1e-8
        (20, 80, 2, 1e-7),
        (90, 20, 2, 1e-7),
        (20, 20, 2, 1e-7),
    ],
)
def test_distance_is_exact_for_full_and_nearly_singular_and_singular_covariances(num_x, num_y, decades, tolerance):
    x, y = with_decades(num_x, 40, decades, 0), with_decades(num_y, 40, decades, 1)
    expected = distance_by_singular_values(x, y)
    assert frechet_distance(statistics_of(x, "digits"), statistics_of(y, "digits")) == pytest.approx(
        expected, rel=tolerance
    )


@pytest.mark.parametrize("n_samples", [60, 10])  # of 20 features: full rank, and singular
def test_distance_is_that_of_a_general_matrix_root(n_samples):
    """The textbook's tr (S_x S_y)^(1/2), by the eigenvalues of a product that is not symmetric."""
    x, y = statistics_of(features(n_samples, 20), "digits"), statistics_of(3 * features(40, 20, 1) + 1, "digits")
    overlap = np.sqrt(np.linalg.eigvals((x.covariance @ y.covariance).numpy()).real.clip(min=0)).sum()
    apart = (x.mean - y.mean).square().sum()
    expected = float(apart + x.covariance.trace() + y.covariance.trace()) - 2 * overlap
    # Rounding leaves eigenvalues of 1e-16 where a singular product has none, and their roots are 1e-8.
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-12 if n_samples > 20 else 1e-7)


def test_singular_covariances_give_a_warning_and_a_finite_distance(caplog):
    x, y = statistics_of(features(5, 20), "digits"), statistics_of(features(40, 20, 1), "digits")
    with caplog.at_level(logging.WARNING):
        assert 0 < frechet_distance(x, y) < math.inf
    assert [record.args[:2] for record in caplog.records] == [(5, 20)]


def test_batches_of_any_size_give_the_statistics_of_one_batch():
    # A mean far from zero: naive sums of squares would lose eight digits here.
    everything = 1e4 + features(101, 6)
    whole = statistics_of(everything, "digits")
    assert torch.allclose(whole.covariance, torch.cov(everything.T), rtol=1e-12)
    for size in (1, 7, 100):
        seen = FeatureStatistics("digits")
        for batch in everything.split(size):
            seen.update(batch)
        parts = seen.finish()
        assert parts.n_samples == 101
        assert torch.allclose(parts.mean, whole.mean, rtol=1e-14)
        assert torch.allclose(parts.covariance, whole.covariance, rtol=0, atol=1e-10)


def test_merging_workers_equals_one_worker():
    everything = features(90, 4)
    one, other, empty = (FeatureStatistics("digits") for _ in range(3))
    one.update(everything[:20])
    other.update(everything[20:])
    one.merge(other)
    one.merge(empty)
    merged, whole = one.finish(), statistics_of(everything, "digits")
    assert merged.n_samples == 90
    assert torch.allclose(merged.covariance, whole.covariance, rtol=1e-12)
    with pytest.raises(EvaluationError, match="inception"):
        one.merge(FeatureStatistics("inception"))


def test_half_precision_features_are_accumulated_in_double():
    half = features(30, 3).half()
    assert torch.equal(statistics_of(half, "digits").covariance, statistics_of(half.double(), "digits").covariance)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_refused_and_leave_no_trace(bad):
    seen = FeatureStatistics("digits")
    seen.update(features(10, 3))
    before = seen.finish()
    spoiled = features(4, 3, 1)
    spoiled[2, 1] = bad
    with pytest.raises(EvaluationError, match="1 of 4 images"):
        seen.update(spoiled)
    assert torch.equal(seen.finish().covariance, before.covariance)
    assert seen.finish().n_samples == 10


def test_one_image_has_no_statistics():
    seen = FeatureStatistics("digits")
    seen.update(features(1, 3))
    with pytest.raises(EvaluationError, match="1 images"):
        seen.finish()


def test_other_networks_and_widths_are_not_compared():
    x = gaussian([0.0], [[1.0]])
    with pytest.raises(EvaluationError, match="digits and inception"):
        frechet_distance(x, replace(x, features="inception"))
    with pytest.raises(ShapeMismatch, match="1 and 2"):
        frechet_distance(x, gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]))
    with pytest.raises(ShapeMismatch, match="width 2, but 1"):
        seen = FeatureStatistics("digits")
        seen.update(features(3, 1))
        seen.update(features(3, 2))


def test_a_saved_file_reads_back_equal_and_hashes_the_same_every_time(tmp_path):
    statistics = statistics_of(features(20, 5), "digits")
    path = tmp_path / "new" / "reference.safetensors"
    digest = save_statistics(statistics, path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(save_statistics(statistics, path) == digest for _ in range(5))
    assert [p.name for p in path.parent.iterdir()] == ["reference.safetensors"]
    again = load_statistics(path, sha256=digest)
    assert torch.equal(again.mean, statistics.mean)
    assert torch.equal(again.covariance, statistics.covariance)
    assert (again.n_samples, again.features) == (20, "digits")


def test_missing_altered_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "reference.safetensors"
    with pytest.raises(EvaluationError, match="cannot be read"):
        load_statistics(path)
    digest = save_statistics(statistics_of(features(20, 5), "digits"), path)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(EvaluationError, match=f"not {digest}"):
        load_statistics(path, sha256=digest)
    for content in (b"", b"not a safetensors file"):
        path.write_bytes(content)
        with pytest.raises(EvaluationError, match="not a statistics file"):
            load_statistics(path)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_part(tmp_path, monkeypatch):
    path = tmp_path / "reference.safetensors"
    digest = save_statistics(statistics_of(features(20, 5), "digits"), path)

    def full_disk(_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_statistics(statistics_of(features(20, 5, 1), "digits"), path)
    assert load_statistics(path, sha256=digest).n_samples == 20
    assert [p.name for p in tmp_path.iterdir()] == ["reference.safetensors"]


def test_published_statistics_are_read_in_double_precision(tmp_path):
    known = statistics_of(features(20, 5), "digits")
    for dtype, tolerance in ((np.float64, 0), (np.float32, 1e-6)):
        np.savez(tmp_path / "r.npz", mu=known.mean.numpy().astype(dtype), sigma=known.covariance.numpy().astype(dtype))
        read = statistics_from_npz(tmp_path / "r.npz", features="inception@ab", n_samples=50_000)
        assert (read.features, read.n_samples) == ("inception@ab", 50_000)
        assert read.mean.dtype == read.covariance.dtype == torch.float64
        assert torch.allclose(read.mean, known.mean, rtol=0, atol=tolerance)
        assert torch.allclose(read.covariance, known.covariance, rtol=0, atol=tolerance)


IDENTITY = np.eye(3)


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"mu": np.zeros(3)}, "sigma is not a file"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu is \[3\] and sigma \[4, 4\]"),
        ({"mu": np.zeros((1, 3)), "sigma": IDENTITY}, r"mu is \[1, 3\]"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu is \[0\]"),
        ({"mu": np.array(["a"] * 3), "sigma": IDENTITY}, "mu is <U1"),
        ({"mu": np.zeros(3), "sigma": IDENTITY + np.eye(3, k=1)}, "not symmetric"),
        ({"mu": np.full(3, np.nan), "sigma": IDENTITY}, "not finite"),
        ({"mu": np.zeros(3), "sigma": np.diag([1, 1, np.inf])}, "not finite"),
        ({"mu": np.zeros(3), "sigma": -IDENTITY}, "variance -1 is negative"),
    ],
)
def test_arrays_that_are_no_mean_and_covariance_are_refused(tmp_path, arrays, problem):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(EvaluationError, match=problem):
        statistics_from_npz(tmp_path / "r.npz", features="digits", n_samples=10)


def test_missing_damaged_and_pickled_statistics_are_refused(tmp_path):
    path = tmp_path / "r.npz"
    with pytest.raises(EvaluationError, match="cannot be read as statistics"):
        statistics_from_npz(path, features="digits", n_samples=10)
    np.savez(path, mu=np.zeros(3), sigma=IDENTITY)
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", IDENTITY)
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=IDENTITY)
    altered = bytearray(whole)
    altered[whole.index(b"NUMPY") + 130] ^= 1
    array, pickled = (tmp_path / "array.npy").read_bytes(), (tmp_path / "pickled.npz").read_bytes()
    for content in (b"", b"no statistics", whole[:200], bytes(altered), array, pickled):
        path.write_bytes(content)
        with pytest.raises(EvaluationError, match="cannot be read as statistics"):
            statistics_from_npz(path, features="digits", n_samples=10)


PROTOCOL = Protocol(
    features="digits",
    features_sha256="ab",
    image_preparation="uint8",
    reference_sha256="cd",
    n_samples=2000,
)


@pytest.mark.parametrize(
    "change",
    [
        {"features": "inception"},
        {"features_sha256": "ac"},
        {"image_preparation": "float"},
        {"reference_sha256": "ce"},
        {"n_samples": 5000},
    ],
)
def test_every_field_of_a_protocol_separates_distances(change):
    other = replace(PROTOCOL, **change)
    assert other.hash() != PROTOCOL.hash()
    (key, value) = next(iter(change.items()))
    with pytest.raises(EvaluationError, match=f"{key} {PROTOCOL.to_dict()[key]} and {value}"):
        require_same_protocol(PROTOCOL, PROTOCOL, other)


def test_equal_protocols_are_compared_and_hash_alike():
    again = Protocol(**PROTOCOL.to_dict())
    require_same_protocol(PROTOCOL, again)
    assert again.hash() == PROTOCOL.hash()
    assert len(again.hash()) == 64


def test_only_inception_features_make_an_fid():
    assert PROTOCOL.metric == "fd-digits"
    assert replace(PROTOCOL, features="inception").metric == "fid"
