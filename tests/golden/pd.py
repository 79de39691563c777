"""Reads the stored numbers of progressive distillation: one index, one file of arrays a topic."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bdense_core import vp

RULES = frozenset({"shape", "dtype", "kind", "what", "tol_maxabs", "tol_axis0", "tol_axis1", "max_abs_value"})
"""What an array's entry may say; anything else fails."""
EXACT = 1e-9
ROUNDED = 1e-7
"""Of outputs that are stored in float32."""
ILL_CONDITIONED = 1e-5
"""Where the noise is predicted at u = 1: the image is 1 / alpha = 22,000 times its error."""


@dataclass
class Stored:
    """The arrays of one file in the type that a test computes in, and what they must agree with."""

    name: str
    cases: list[dict[str, Any]]
    arrays: dict[str, Tensor]
    rules: dict[str, dict[str, Any]]
    dtype: torch.dtype
    checked: set[str] = field(default_factory=set)

    def __getitem__(self, key: str) -> Tensor:
        """An input; whole numbers as they are."""
        assert self.rules[key]["kind"] == "input", f"{self.name} {key} is no input"
        self.checked.add(key)
        array = self.arrays[key]
        return array.to(self.dtype) if array.is_floating_point() else array

    def check(self, key: str, actual: Tensor, *, ill_conditioned: bool = False) -> None:
        """Asserts that `actual` agrees with a stored output: as the README says for float32 or for float64 code."""
        expected, rule = self.arrays[key].double(), self.rules[key]
        assert rule["kind"] == "output", f"{self.name} {key} is no output"
        assert actual.shape == expected.shape, f"{self.name} {key}: shape {list(actual.shape)}"
        actual = actual.detach().double()
        assert actual.isfinite().all(), f"{self.name} {key}: not finite"
        if self.dtype == torch.float64:
            relative = ILL_CONDITIONED if ill_conditioned else ROUNDED if rule["dtype"] == "float32" else EXACT
            least = rule["max_abs_value"] if rule["dtype"] == "float32" else max(1.0, rule["max_abs_value"])
            allowed = torch.tensor(relative * least, dtype=torch.float64)
        else:
            allowed = _tolerance(rule, expected.dim())
        excess = ((actual - expected).abs() - allowed).max()
        assert excess <= 0, f"{self.name} {key} in {self.dtype}: exceeded by {excess:.3g}"
        self.checked.add(key)

    def unchecked(self) -> set[str]:
        """Arrays that no test has read or compared."""
        return set(self.arrays) - self.checked


def _tolerance(rule: dict[str, Any], num_axes: int) -> Tensor:
    """For float32 code: of each index of axis 0 or 1 where that is stored, else of the whole array."""
    for axis, name in enumerate(("tol_axis0", "tol_axis1")):
        if name in rule:
            shape = [1] * num_axes
            shape[axis] = -1
            return torch.tensor(rule[name], dtype=torch.float64).reshape(shape)
    return torch.tensor(rule["tol_maxabs"], dtype=torch.float64)


def read(path: Path, dtype: torch.dtype) -> Stored:
    """One file of arrays, with what `index.json` beside it says of them."""
    index = json.loads((path.parent / "index.json").read_text())
    assert index["layout"] == "NCHW"
    described, arrays = index["files"][path.name], load_file(path)
    rules = described["arrays"]
    for rule in rules.values():
        assert set(rule) <= RULES, f"{path.name}: rules not covered: {set(rule) - RULES}"
    found = {key: (list(array.shape), str(array.dtype).removeprefix("torch.")) for key, array in arrays.items()}
    assert found == {key: (rule["shape"], rule["dtype"]) for key, rule in rules.items()}
    return Stored(f"pd/{path.stem}", described["cases"], arrays, rules, dtype)


def schedule_of(limits: dict[str, float]) -> vp.Cosine:
    assert set(limits) == {"logsnr_min", "logsnr_max"}
    return vp.Cosine(**limits)


def settings(case: dict[str, Any], **known: Any) -> dict[str, Any]:
    """A case's settings. Those in `known` may be missing, and have the given default; others fail."""
    assert set(case) <= set(known), f"settings not covered: {set(case) - set(known)}"
    return known | case


@dataclass(frozen=True)
class Mixture:
    """The exact denoiser of a mixture of Gaussians (README of the vectors), and a network that answers with it."""

    pi: Tensor
    mu: Tensor
    s: Tensor

    @classmethod
    def of(cls, stored: Stored) -> "Mixture":
        return cls(stored["gmm.pi"], stored["gmm.mu"], stored["gmm.s"])

    def denoised(self, z: Tensor, level: vp.Level) -> Tensor:
        """The mean of x given z, [B, C, H, W]."""
        at = level.beside(z[:, None])  # [B, M, C, H, W] throughout, M components
        s = self.s.reshape(1, -1, 1, 1, 1)
        variance = at.alpha**2 * s**2 + at.sigma**2
        away = z[:, None] - at.alpha * self.mu
        log_likelihood = -(away**2 / variance + variance.log()).flatten(2).sum(2) / 2
        shares = (self.pi.log() + log_likelihood).softmax(1)  # [B, M]
        means = self.mu + at.alpha * s**2 / variance * away
        return (shares[:, :, None, None, None] * means).sum(1)

    def network(self, mean_type: str, mul: float, add: float) -> vp.Denoise:
        """The image that a network predicts whose output is of a kind, after whatever that kind costs in rounding."""

        def denoise(z: Tensor, level: vp.Level) -> Tensor:
            at = level.beside(z)
            x = mul * self.denoised(z, level) + add
            eps = (z - at.alpha * x) / at.sigma
            other = (z - at.alpha * (0.9 * x + 0.05)) / at.sigma
            output = {"x": x, "eps": eps, "v": at.alpha * eps - at.sigma * x, "both": torch.cat([x, other], 1)}
            return vp.predict(output[mean_type], z, level, mean_type=mean_type).x

        return denoise
