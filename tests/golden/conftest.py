"""Where the stored numbers are, how they are read, and what counts as equal.

The vectors are not part of this repository: `BDENSE_VECTORS` names their folder, otherwise
`../shared/vectors` beside the checkout is tried. Without them these tests are skipped.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bdense_core import data
from bdense_core.branches import with_branches
from bdense_core.loops import sfd
from bdense_core.methods.sfd import SFD
from bdense_core.networks import Denoiser, NetworkConfig, build
from bdense_core.precision import Trainee

TOLERANCES = (
    "tol_maxabs",
    "tol_maxabs_per_state",
    "tol_maxabs_per_interval",
    "tol_maxabs_per_interval_branch",
    "tol_maxrel",
    "tol_maxrel_per_iteration",
    "tol_meanabs",
)
ROOT = Path(__file__).resolve().parents[2]
VECTORS = Path(os.environ.get("BDENSE_VECTORS", ROOT.parent / "shared" / "vectors"))


@dataclass(frozen=True)
class Vectors:
    """One stored file: its settings, its arrays, and their tolerances."""

    name: str
    meta: dict[str, Any]
    arrays: dict[str, Tensor]
    checked: set[str] = field(default_factory=set)

    def check(self, key: str, actual: Tensor) -> None:
        """Asserts that `actual` agrees with the stored array within every stored tolerance, no wider."""
        self.checked.add(key)
        expected, rule = self.arrays[key], self.meta["arrays"][key]
        assert list(actual.shape) == list(expected.shape), f"{self.name} {key}: shape"
        actual, expected = actual.detach().double(), expected.double()
        assert actual.isfinite().all(), f"{self.name} {key}: not finite"
        tolerances = {kind: limits(rule[kind], expected.dim()) for kind in rule if kind in TOLERANCES}
        assert tolerances, f"{self.name} {key}: no stored tolerance"
        error = (actual - expected).abs()
        for kind, tolerance in tolerances.items():
            allowed = tolerance * expected.abs() if "maxrel" in kind else tolerance
            seen = error.mean() if kind == "tol_meanabs" else error
            excess = (seen - allowed).max()
            assert excess <= 0, f"{self.name} {key}: {kind} exceeded by {excess:.3g}, error {error.max():.3g}"

    def check_pixels(self, case: str, images: Tensor) -> None:
        """Asserts that the images make the stored bytes.

        Truncation may go either way only within the images' tolerance of a whole number.
        """
        stored, rule = self.arrays[f"images/{case}"], self.meta["arrays"][f"images/{case}"]
        self.checked.add(f"uint8/{case}")
        difference = (data.to_uint8(images).int() - self.arrays[f"uint8/{case}"].int()).abs()
        levels = stored.double() * 127.5 + 128
        near = (levels - levels.round()).abs() <= 127.5 * rule["tol_maxabs"]
        assert difference[~near].sum() == 0, f"{self.name} uint8/{case}"
        assert difference.max() <= 1, f"{self.name} uint8/{case}"

    def unchecked(self, *inputs: str) -> set[str]:
        """The arrays that no `check` has seen, other than the named inputs: a test expects none."""
        return {key for key in self.arrays if key not in self.checked and not key.startswith(inputs)}

    def state(self, prefix: str = "state.") -> dict[str, Tensor]:
        """The stored parameters and buffers below `prefix`, in float32."""
        return {k.removeprefix(prefix): v.float() for k, v in self.arrays.items() if k.startswith(prefix)}


def limits(stored: Any, num_axes: int) -> Tensor:
    """Tolerances stored for all of an array or for each index of its first axes."""
    table = torch.tensor(stored, dtype=torch.float64)
    return table.reshape(*table.shape, *[1] * (num_axes - table.dim())) if table.dim() else table


def read(path: Path) -> Vectors:
    """The vectors in `x.safetensors` with the settings in `x.meta.json`."""
    meta = json.loads(path.with_suffix(".meta.json").read_text())
    return Vectors(path.stem, meta, load_file(path))


def network(vectors: Vectors) -> Denoiser:
    """The stored network with its weights, in evaluation mode."""
    denoiser = build(NetworkConfig.from_edm_kwargs(vectors.meta["wrapper"], vectors.meta["kwargs"]))
    denoiser.load_state_dict(vectors.state(), strict=True)
    return denoiser.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a stored training run must show; I iterations, J intervals, K branches, B samples."""

    student: Denoiser
    start: dict[str, Tensor]
    grid: sfd.Grid
    rates: Tensor
    """[I, optimizer steps of an iteration]"""
    states: Tensor
    """Of the student's branches, before each step, [I, J, K, B, C, H, W]."""
    targets: Tensor
    per_sample: Tensor
    """Distances [I, J, K, B]; index 0 of J is the analytic first step, if there is one."""
    losses: Tensor
    """Their mean over samples, as the loop computes it, [I, J, K]."""
    first_gradients: dict[str, Tensor | None]
    parameters: list[dict[str, Tensor]]
    """After each iteration."""


def replay(vectors: Vectors, teacher: Denoiser, num_branches: int, weights: list[float]) -> Replay:
    """The stored run with this project's functions; a setting they cannot follow fails the test."""
    config, noises = dict(vectors.meta["config"]), vectors.arrays["noise"]
    method = SFD(
        nfe=config["num_steps"] - 1 - config["afs"],
        num_branches=num_branches,
        teacher_steps=config["M"] + 1,
        lr=config["lr"],
        batch=config["batch"],
        budget_kimg=config["total_images"] / 1000,
        sigma_min=config["sigma_min"],
        sigma_max=config["sigma_max"],
    )
    assert config["schedule"] == f"polynomial rho {method.rho:g}"
    assert config["teacher"] == f"dpmpp order {method.solver_order} predict_x0 lower_order_final"
    assert (config["precision"], config["dropout"]) == ("float32", teacher.config.dropout)
    assert noises.shape[:2] == (config["iterations"], config["batch"])
    student = with_branches(teacher, num_branches).requires_grad_(True).train()
    optimizer = sfd.adam(student, method)
    assert list(optimizer.defaults["betas"]) == config["betas"]
    assert (optimizer.defaults["eps"], optimizer.defaults["weight_decay"]) == (config["eps"], 0)
    grid = sfd.make_grid(method, num_steps=config["num_steps"], afs=config["afs"])
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    rates, states, targets, losses, parameters = [], [], [], [], []
    gradients: dict[str, Tensor | None] = {}
    for iteration, noise in enumerate(noises):
        labels = one_hot(vectors, teacher, iteration)
        target = sfd.teacher_states(teacher, noise, grid, labels)
        predicted: list[Tensor] = []
        means: list[Tensor] = []
        if config["afs"]:
            level = grid.student[0]
            predicted.append(sfd.analytic_states(level.to(noise) * noise, level, grid.inner[0]))
            means.append(sfd.branch_losses(predicted[0], target[:, 0]))
        optimizer.param_groups[0]["lr"] = sfd.learning_rate(method, iteration)
        rates.append([])
        for terms, before in sfd.train_intervals(
            Trainee(student, optimizer),
            sfd.first_states(noise, grid),
            target[:, len(predicted) :],
            weights=torch.tensor(weights, dtype=torch.float32),
            grid=grid,
            labels=labels,
        ):
            gradients = gradients or {
                name: None if p.grad is None else p.grad.clone() for name, p in student.named_parameters()
            }
            predicted.append(before)
            means.append(terms)
            rates[-1].append(optimizer.param_groups[0]["lr"])
        states.append(torch.stack(predicted).transpose(1, 2))
        targets.append(target.permute(1, 2, 0, 3, 4, 5))
        losses.append(torch.stack(means))
        parameters.append({name: p.detach().clone() for name, p in student.named_parameters()})
    all_states, all_targets = torch.stack(states), torch.stack(targets)
    return Replay(
        student=student,
        start=start,
        grid=grid,
        rates=torch.tensor(rates, dtype=torch.float64),
        states=all_states,
        targets=all_targets,
        per_sample=(all_states - all_targets).abs().flatten(4).sum(4),
        losses=torch.stack(losses),
        first_gradients=gradients,
        parameters=parameters,
    )


def one_hot(vectors: Vectors, teacher: Denoiser, *index: int) -> Tensor | None:
    """The stored classes (of one iteration, if they have such an axis), or None for an ordinary network."""
    if teacher.config.label_dim == 0:
        assert "label_index" not in vectors.arrays
        return None
    classes = vectors.arrays["label_index"][index]
    return torch.nn.functional.one_hot(classes, teacher.config.label_dim).float()


def check_training(vectors: Vectors, run: Replay) -> None:
    """Whatever the stored plain and dense runs have in common."""
    never = set(vectors.meta["never_compare"])
    vectors.check("lr_used", run.rates)
    for name in vectors.meta["parameters_without_gradient"]:
        assert run.first_gradients[name] is None, name
        assert torch.equal(run.parameters[-1][name], run.start[name]), name
    for key in vectors.arrays:
        group, _, name = key.partition("/")
        if name in never:
            vectors.checked.add(key)
        elif group == "grad_step1":
            gradient = run.first_gradients[name]
            assert gradient is not None, key
            vectors.check(key, gradient)
        elif group.startswith("param_iter"):
            vectors.check(key, run.parameters[int(group.removeprefix("param_iter")) - 1][name])
            rule = vectors.meta["arrays"][key]
            # A pass says nothing where the tolerance is as large as the move.
            assert 10 * rule["tol_maxabs"] < rule["update_maxabs"] or rule["update_maxabs"] == 0, key
        elif group.startswith("update_l2_iter"):
            after = run.parameters[int(group.removeprefix("update_l2_iter")) - 1]
            moves = [(after[n].double() - run.start[n].double()).norm() for n in vectors.meta["update_l2_names"]]
            vectors.check(key, torch.stack(moves))
        elif group == "student_endpoints":
            vectors.check(key, run.states[int(name.removeprefix("iter")) - 1][:, -1])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "files(pattern): run for each file of the vectors that matches")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.files("sfd/*.json")` calls a test with `path` once for each matching file."""
    marker = metafunc.definition.get_closest_marker("files")
    if marker is None:
        return
    (pattern,) = marker.args
    paths = sorted(VECTORS.glob(pattern))
    if paths:
        metafunc.parametrize("path", paths, ids=[str(p.relative_to(VECTORS)) for p in paths])
    else:
        reason = f"no {pattern} in {VECTORS}; set BDENSE_VECTORS to the folder of the vectors"
        # A folder without the expected files is a mistake and fails; no folder at all is skipped.
        marks = [] if VECTORS.is_dir() else [pytest.mark.skip(reason=reason)]
        metafunc.parametrize("path", [pytest.param(VECTORS / pattern, marks=marks, id="missing")])


@pytest.fixture(scope="session")
def vectors_root() -> Path:
    if not VECTORS.is_dir():
        pytest.skip(f"{VECTORS} does not exist; set BDENSE_VECTORS to the folder of the vectors")
    return VECTORS


@pytest.fixture(scope="session")
def read_vectors() -> Callable[[Path], Vectors]:
    return read


@pytest.fixture(scope="session")
def stored_network() -> Callable[[Vectors], Denoiser]:
    return network


@pytest.fixture(scope="session")
def replay_training() -> Callable[[Vectors, Denoiser, int, list[float]], Replay]:
    return replay


@pytest.fixture(scope="session")
def check_common_training() -> Callable[[Vectors, Replay], None]:
    return check_training


@pytest.fixture(scope="session")
def stored_labels() -> Callable[..., Tensor | None]:
    return one_hot
