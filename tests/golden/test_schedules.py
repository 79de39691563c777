"""Noise-level grids against zju-pi/diff-sampler."""

import pytest
import torch

from bdense_core import sigmas

pytestmark = pytest.mark.golden


@pytest.mark.files("sfd/schedules.safetensors")
def test_every_stored_grid_in_single_and_double_precision(path, read_vectors):
    vectors = read_vectors(path)
    table = vectors.arrays["discrete_alphas_cumprod"].double().tolist()
    assert vectors.meta["cases"]
    for case, settings in vectors.meta["cases"].items():
        grid = torch.tensor(grid_of(settings, table), dtype=torch.float64)
        vectors.check(case, grid)
        if f"double/{case}" in vectors.arrays:
            expected = vectors.arrays[f"double/{case}"]
            worst = ((grid - expected) / expected).abs().max()
            assert worst <= 1e-9, f"{case}: {worst:.3g}"  # the README's tolerance for double precision


def grid_of(settings, table):
    limits = {"sigma_min": settings["sigma_min"], "sigma_max": settings["sigma_max"]}
    if settings["schedule_type"] == "discrete":
        return sigmas.discrete(settings["num_steps"], **limits, alphas_cumprod=table, rho=settings["schedule_rho"])
    return sigmas.student_grid(
        settings["num_steps"], **limits, schedule=settings["schedule_type"], rho=settings["schedule_rho"]
    )
