"""Noise-level grids against zju-pi/diff-sampler."""

import pytest
import torch

from bdense_core import sigmas

pytestmark = pytest.mark.golden


@pytest.mark.files("sfd/schedules.safetensors")
def test_every_stored_grid_in_single_and_double_precision(path, read_vectors, stored_levels):
    vectors = read_vectors(path)
    table = vectors.arrays.get("discrete_alphas_cumprod")
    assert vectors.meta["cases"]
    for case, settings in vectors.meta["cases"].items():
        grid = torch.tensor(grid_of(settings, stored_levels(settings), table), dtype=torch.float64)
        vectors.check(case, grid)
        if f"double/{case}" in vectors.arrays:
            vectors.check(f"double/{case}", grid)
            expected = vectors.arrays[f"double/{case}"]
            worst = ((grid - expected) / expected).abs().max()
            assert worst <= 1e-9, f"{case}: {worst:.3g}"  # the README's tolerance for double precision
    assert not vectors.unchecked("discrete_alphas_cumprod")


def grid_of(settings, levels, table):
    if levels["schedule"] == "discrete":
        levels = {key: levels[key] for key in ("sigma_min", "sigma_max", "rho")}
        return sigmas.discrete(settings["num_steps"], **levels, alphas_cumprod=table.double().tolist())
    return sigmas.student_grid(settings["num_steps"], **levels)
