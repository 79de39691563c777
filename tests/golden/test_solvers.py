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


def walk(denoise, latents, settings):
    """The trajectory that upstream's settings describe; a setting not known here fails the test."""
    settings = dict(settings)
    orders = settings.pop("orders", None)
    grid = sigmas.student_grid(
        settings.pop("num_steps"),
        schedule=settings.pop("schedule_type"),
        sigma_min=settings.pop("sigma_min"),
        sigma_max=settings.pop("sigma_max"),
        rho=settings.pop("schedule_rho"),
    )
    options = {"to_zero": settings.pop("denoise_to_zero", False), **settings}
    known = inspect.signature(solvers.solve).parameters
    assert set(options) <= set(known), f"settings not covered: {set(options) - set(known)}"
    if orders is not None:
        final = options["lower_order_final"]
        used = [
            solvers.dpmpp_order(i, len(grid), options["max_order"], lower_order_final=final)
            for i in range(len(grid) - 1)
        ]
        assert used == orders
    with torch.no_grad():
        return solvers.solve(denoise, grid[0] * latents, grid, **options)


@pytest.mark.files("sfd/solvers/gmm.safetensors")
def test_trajectories_on_a_gaussian_mixture(path, read_vectors):
    vectors = read_vectors(path)
    denoise = gaussian_mixture(vectors.arrays)
    assert {key for key in vectors.arrays if key.startswith("traj/")} == set(vectors.meta["cases"])
    for case, settings in vectors.meta["cases"].items():
        vectors.check(case, walk(denoise, vectors.arrays["latents"], settings))


@pytest.mark.files("sfd/solvers/net_*.safetensors")
def test_trajectories_on_stored_networks(path, read_vectors, stored_network):
    vectors = read_vectors(path)
    denoiser = stored_network(read_vectors(path.parents[1] / vectors.meta["network"]))
    labels = vectors.arrays.get("class_labels")
    assert {key for key in vectors.arrays if key.startswith("traj/")} == set(vectors.meta["cases"])
    for case, settings in vectors.meta["cases"].items():
        states = walk(lambda x, t: denoiser(x, t, labels), vectors.arrays["latents"], settings)
        vectors.check(case, states)


@pytest.mark.files("sfd/solvers/deis_coefficients.safetensors")
def test_deis_coefficients(path, read_vectors):
    vectors = read_vectors(path)
    assert vectors.meta["cases"]
    for case, settings in vectors.meta["cases"].items():
        limits = {"sigma_min": settings["sigma_min"], "sigma_max": settings["sigma_max"]}
        grid = sigmas.polynomial(settings["num_steps"], **limits)
        rows = solvers.deis_coefficients(grid, settings["max_order"])
        vectors.check(case, torch.tensor(rows, dtype=torch.float64))


@pytest.mark.files("sfd/sfd/teacher_*.safetensors")
def test_teacher_states_at_the_student_levels(path, read_vectors, stored_network):
    vectors = read_vectors(path)
    denoiser = stored_network(read_vectors(path.parents[1] / vectors.meta["network"]))
    labels, noise = vectors.arrays.get("class_labels"), vectors.arrays["noise"]
    limits = {"sigma_min": vectors.meta["sigma_min"], "sigma_max": vectors.meta["sigma_max"]}
    assert vectors.meta["cases"]
    for case, settings in vectors.meta["cases"].items():
        student = sigmas.student_grid(settings["num_steps"], **limits)
        grid = sigmas.teacher_grid(settings["num_steps"], settings["M"] + 1, **limits)
        assert len(grid) == settings["num_steps_teacher"]
        orders = [solvers.dpmpp_order(i, len(grid), 3, lower_order_final=True) for i in range(len(grid) - 1)]
        assert orders == settings["teacher_orders"]
        with torch.no_grad():
            x = limits["sigma_max"] * noise
            states = solvers.solve(lambda x, t: denoiser(x, t, labels), x, grid, solver="dpmpp")
        vectors.check(f"t_student/{case}", torch.tensor(student))
        vectors.check(f"teacher_traj/{case}", states[settings["teacher_indices"]])


@pytest.mark.files("sfd/sampling/*.safetensors")
def test_samples_by_euler_with_an_analytic_first_step(path, read_vectors, stored_network):
    vectors = read_vectors(path)
    root = path.parents[1]
    denoiser = stored_network(read_vectors(root / vectors.meta["network"]))
    if trained := re.search(r"(\S+\.safetensors) (param_iter\d+/)", vectors.meta["weights"]):
        state = read_vectors(root / trained[1]).state(trained[2]) | vectors.state("qkv_bias/")
        denoiser.load_state_dict(denoiser.state_dict() | state, strict=True)
    labels = vectors.arrays.get("class_labels")
    limits = {"sigma_min": vectors.meta["sigma_min"], "sigma_max": vectors.meta["sigma_max"]}
    assert vectors.meta["cases"]
    for case, settings in vectors.meta["cases"].items():
        grid = sigmas.student_grid(settings["num_steps"], **limits)
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
