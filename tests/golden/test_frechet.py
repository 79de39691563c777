"""Statistics and Frechet distances against three independent evaluations."""

import pytest
import torch

from bdense_core.frechet import FeatureStatistics, frechet_distance

pytestmark = pytest.mark.golden


@pytest.mark.files("sfd/frechet.safetensors")
def test_statistics_and_distances_of_every_stored_case(path, read_vectors):
    vectors = read_vectors(path)
    assert vectors.meta["cases"]
    for case, facts in vectors.meta["cases"].items():
        sides = []
        for side in ("x", "y"):
            seen = FeatureStatistics("golden")
            for batch in vectors.arrays[f"{case}/{side}"].double().split(97):
                seen.update(batch)
            statistics = seen.finish()
            vectors.check(f"{case}/mu_{side}", statistics.mean)
            if f"{case}/sigma_{side}" in vectors.arrays:
                vectors.check(f"{case}/sigma_{side}", statistics.covariance)
            else:
                vectors.check(f"{case}/sigma_{side}_diag", statistics.covariance.diagonal())
            norm = statistics.covariance.norm().item()
            assert norm == pytest.approx(facts[f"fro_sigma_{side}"], rel=1e-9)
            sides.append(statistics)
        distance = torch.tensor(frechet_distance(*sides), dtype=torch.float64)
        vectors.checked.add(f"{case}/frechet")
        assert (vectors.arrays[f"{case}/frechet"] - distance).abs().max() <= facts["tol_maxabs"], case
    assert not vectors.unchecked(*(f"{case}/{side}" for case in vectors.meta["cases"] for side in "xy"))
