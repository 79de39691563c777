"""The stored numbers of DASH: one index for all files, in another form than SFD's.

A tolerance is an array `NAME.tol` of the same file, else one for each index of the first axis, else one for all.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """One file: the settings of its cases, its arrays, and what the index says of each."""

    name: str
    cases: list[dict[str, Any]]
    arrays: dict[str, Tensor]
    rules: dict[str, dict[str, Any]]
    checked: set[str] = field(default_factory=set)

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The arrays whose names begin so, without the prefix."""
        return {key.removeprefix(prefix): array for key, array in self.arrays.items() if key.startswith(prefix)}

    def check(self, key: str, actual: Tensor | float) -> None:
        """Asserts that `actual` agrees with a stored output within its tolerance."""
        expected, actual = self.arrays[key], torch.as_tensor(actual).detach()
        assert self.rules[key]["kind"] == "output", f"{self.name} {key}: no output"
        assert list(actual.shape) == list(expected.shape), f"{self.name} {key}: shape"
        error = (actual.double() - expected.double()).abs()
        assert error.isfinite().all(), f"{self.name} {key}: not finite"
        excess = (error - self._tolerance(key)).max()
        assert excess <= 0, f"{self.name} {key}: tolerance exceeded by {excess:.3g}, error {error.max():.3g}"
        self.checked.add(key)

    def unchecked(self) -> set[str]:
        """Outputs that no `check` has seen: a test expects none."""
        return {key for key, rule in self.rules.items() if rule["kind"] == "output"} - self.checked

    def _tolerance(self, key: str) -> Tensor:
        rule, num_axes = self.rules[key], self.arrays[key].dim()
        if f"{key}.tol" in self.arrays:
            return self.arrays[f"{key}.tol"].double()
        if "tol_axis0" in rule:
            return torch.tensor(rule["tol_axis0"], dtype=torch.float64).view(-1, *[1] * (num_axes - 1))
        return torch.tensor(rule["tol_maxabs"], dtype=torch.float64)


def read(root: Path, name: str) -> Stored:
    """The arrays of `name`.safetensors, of exactly the names, shapes and kinds that the index lists."""
    listed = json.loads((root / "dash" / "index.json").read_text())["files"][f"{name}.safetensors"]
    arrays, rules = load_file(root / "dash" / f"{name}.safetensors"), listed["arrays"]
    found = {key: (list(array.shape), str(array.dtype).removeprefix("torch.")) for key, array in arrays.items()}
    assert found == {key: (rule["shape"], rule["dtype"]) for key, rule in rules.items()}, name
    assert {rule["kind"] for rule in rules.values()} <= {"input", "output", "tolerance"}, name
    return Stored(name, listed["cases"], arrays, rules)
