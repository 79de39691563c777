"""Solver trajectories against zju-pi/diff-sampler, on a Gaussian mixture and on stored networks."""

import inspect
import re

import pytest
import torch

from bdense_core import sigmas, solvers

pytestmark = pytest.mark.golden


def gaussian_mixture(arrays):
    """The exact denoiser of the README's mixture, evaluated in double precision."""
    weights, means, std = (arrays[f"gmm_{k}"].double() for k in ("weights", "means", "std"))

    def denoise(x, t):
        flat, var = x.double().flatten(1), t.double() ** 2
        total = std**2 + var  # [K]
        distance = torch.cdist(flat, means).square()  # [B, K]
        share = (weights.log() - means.shape[1] / 2 * total.log() - distance / (2 * total)).softmax(dim=1)
        parts = (std[:, None] ** 2 * flat[:, None] + var * means) / total[:, None]  # [B, K, d]
        return (share[:, :, None] * parts).sum(dim=1).reshape(x.shape).to(x.dtype)

    return denoise


LEVELS = ("schedule", "schedule_type", "schedule_rho", "sigma_min", "sigma_max")


def grid_of(settings, stored_levels):
    """The grid that settings describe, which are taken from them."""
    return sigmas.student_grid(
        settings.pop("num_steps"), **stored_levels({key: settings.pop(key) for key in LEVELS if key in settings})
    )


def walk(denoise, latents, settings, stored_levels):
    """The trajectory that upstream's settings describe; a setting not known here fails the test."""
    settings = dict(settings)
    orders = settings.pop("orders", None)
    grid = grid_of(settings, stored_levels)
    options = {"to_zero": settings.pop("denoise_to_zero", False), **settings}
    known = set(inspect.signature(solvers.solve).parameters) - {"denoise", "x", "sigmas"}
    assert set(options) <= known, f"settings not covered: {set(options) - known}"
    if orders is not None:
        final = options["lower_order_final"]
        used = [
            solvers.dpmpp_order(i, len(grid), options["max_order"], lower_order_final=final)
            for i in range(len(grid) - 1)
        ]
        assert used == orders
    with torch.no_grad():
        return solvers.solve(denoise, grid[0] * latents, grid, **options)


@pytest.mark.files("sfd/solvers/*.safetensors")
def test_every_stored_trajectory_and_coefficient(path, read_vectors, named_network, stored_labels, stored_levels):
    """Told apart by what they hold, so that a case under another name is not passed over."""
    vectors = read_vectors(path)
    cases = vectors.meta["cases"]
    assert cases
    if "latents" not in vectors.arrays:
        for case, settings in cases.items():
            vectors.check(case, coefficients(settings, stored_levels))
        assert not vectors.unchecked()
        return
    if "gmm_means" in vectors.arrays:
        denoise = gaussian_mixture(vectors.arrays)
    else:
        denoiser = named_network(path, vectors)
        labels = stored_labels(vectors, denoiser)

        def denoise(x, t):
            return denoiser(x, t, labels)

    for case, settings in cases.items():
        vectors.check(case, walk(denoise, vectors.arrays["latents"], settings, stored_levels))
    assert not vectors.unchecked("latents", "class_labels", "label_index", "gmm_weights", "gmm_means", "gmm_std")


def coefficients(settings, stored_levels):
    """The weights of tAB-DEIS that settings describe; a setting not known here fails the test."""
    settings = dict(settings)
    grid = grid_of(settings, stored_levels)
    rows = solvers.deis_coefficients(grid, settings.pop("max_order"))
    assert not settings, f"settings not covered: {settings}"
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.files("sfd/sampling/*.safetensors")
def test_samples_by_euler_with_an_analytic_first_step(path, read_vectors, named_network, stored_labels, stored_levels):
    vectors = read_vectors(path)
    denoiser = named_network(path, vectors)
    if trained := re.search(r"(\S+\.safetensors) (param_iter\d+/)", vectors.meta["weights"]):
        state = read_vectors(path.parents[1] / trained[1]).state(trained[2]) | vectors.state("qkv_bias/")
        denoiser.load_state_dict(denoiser.state_dict() | state, strict=True)
    labels = stored_labels(vectors, denoiser)
    assert vectors.meta["cases"]
    for case, settings in vectors.meta["cases"].items():
        grid = sigmas.student_grid(settings["num_steps"], **stored_levels(vectors.meta | settings))
        assert sigmas.nfe_of(len(grid), afs=settings["afs"]) == settings["nfe"]
        with torch.no_grad():
            states = solvers.solve(
                lambda x, t: denoiser(x, t, labels),
                grid[0] * vectors.arrays["latents"],
                grid,
                afs=settings["afs"],
            )
        vectors.check(f"images/{case}", states[-1])
        if f"traj/{case}" in vectors.arrays:
            vectors.check(f"traj/{case}", states)
    assert not any(key.startswith("traj/") for key in vectors.unchecked())
