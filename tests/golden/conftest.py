"""Where the stored numbers are, how they are read, and what counts as equal.

The vectors are not part of this repository: `BDENSE_VECTORS` names their folder, otherwise
`../shared/vectors` beside the checkout is tried. Without them these tests are skipped. Another folder of the
same form may hold other cases: each one's settings are read from its metadata, and what these tests do not
know fails.
"""

import copy
import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
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

TOLERANCE = re.compile(r"tol_(maxabs|maxrel|meanabs)(_per_\w+)?")
TEACHER = re.compile(r"(\w+)(?: (?:max_)?order (\d+))?( predict_x0 lower_order_final)?(?: no AFS)?")
CONFIG = frozenset(
    {"num_steps", "nfe", "intervals", "M", "K", "afs", "batch", "iterations", "total_images", "lr", "betas", "eps"}
    | {"sigma_min", "sigma_max", "schedule", "teacher", "dropout", "precision"}
    | {"weights", "weights_rule", "head", "head_layout"}
)
"""Settings of a stored training run; any other fails."""
AUTHORS_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
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
        tolerances = {kind: limits(rule[kind], expected.dim()) for kind in rule if kind.startswith("tol_")}
        assert tolerances, f"{self.name} {key}: no stored tolerance"
        error = (actual - expected).abs()
        for kind, tolerance in tolerances.items():
            assert TOLERANCE.fullmatch(kind), f"{self.name} {key}: a tolerance of an unknown kind, {kind}"
            allowed = tolerance * expected.abs() if "maxrel" in kind else tolerance
            seen = error.mean() if "meanabs" in kind else error
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
        """The arrays that no `check` has seen, other than the named inputs: a test expects none.

        A name that ends in `.` or `/` stands for all that begin with it.
        """
        groups = tuple(name for name in inputs if name.endswith((".", "/")))
        return {k for k in self.arrays if not (k in self.checked or k in inputs or k.startswith(groups))}

    def state(self, prefix: str = "state.") -> dict[str, Tensor]:
        """The stored parameters and buffers below `prefix`, in float32."""
        return {k.removeprefix(prefix): v.float() for k, v in self.arrays.items() if k.startswith(prefix)}


def limits(stored: Any, num_axes: int) -> Tensor:
    """Tolerances stored for all of an array or for each index of its first axes."""
    table = torch.tensor(stored, dtype=torch.float64)
    return table.reshape(*table.shape, *[1] * (num_axes - table.dim())) if table.dim() else table


def read(path: Path) -> Vectors:
    """The vectors in `x.safetensors` with the settings in `x.meta.json`."""
    name, arrays = f"{path.parent.name}/{path.stem}", load_file(path)
    meta = json.loads(path.with_suffix(".meta.json").read_text())
    described = {key: (rule["shape"], rule["dtype"]) for key, rule in meta["arrays"].items()}
    found = {key: (list(array.shape), str(array.dtype).removeprefix("torch.")) for key, array in arrays.items()}
    assert described == found, f"{name}: not the arrays that its metadata describes"
    return Vectors(name, meta, arrays)


def levels_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule, rho and limits that settings name; where they are silent, those of the README."""
    words = re.fullmatch(r"(\w+)(?: rho ([\d.]+))?", settings.get("schedule", "polynomial rho 7"))
    assert words, f"a schedule in an unknown form: {settings['schedule']}"
    return {
        "schedule": settings.get("schedule_type", words[1]),
        "rho": float(settings.get("schedule_rho", words[2] or 7)),
        "sigma_min": settings.get("sigma_min", 0.006),
        "sigma_max": settings.get("sigma_max", 80.0),
    }


def method_of(settings: Mapping[str, Any], num_branches: int, **others: Any) -> SFD:
    """The grids and the teacher that settings name."""
    described = settings.get("teacher", "dpmpp order 3 predict_x0 lower_order_final")
    words = TEACHER.fullmatch(described)
    assert words, f"a teacher in an unknown form: {described}"
    assert words[1] != "dpmpp" or words[3], f"a teacher that these tests do not cover: {described}"
    return SFD(
        num_branches=num_branches,
        teacher_steps=settings["M"] + 1,
        solver=words[1],
        solver_order=int(words[2] or 1),
        **levels_of(settings),
        **others,
    )


def network(vectors: Vectors, dropout: float | None = None) -> Denoiser:
    """The stored network with its weights, in evaluation mode; the settings of a run may name another dropout."""
    config = NetworkConfig.from_edm_kwargs(vectors.meta["wrapper"], vectors.meta["kwargs"])
    denoiser = build(config if dropout is None else dataclasses.replace(config, dropout=dropout))
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


def replay(
    vectors: Vectors,
    teacher: Denoiser,
    num_branches: int,
    weights: list[float],
    dtype: torch.dtype = torch.float32,
) -> Replay:
    """The stored run with this project's functions; a setting they cannot follow fails the test."""
    config, noises = vectors.meta["config"], vectors.arrays["noise"].to(dtype)
    assert set(config) <= CONFIG, f"settings not covered: {set(config) - CONFIG}"
    num_steps, afs = config["num_steps"], config["afs"]
    assert config.get("intervals", num_steps - 1) == num_steps - 1
    assert config.get("nfe", num_steps - 1 - afs) == num_steps - 1 - afs
    assert (config["precision"], config["dropout"]) == ("float32", 0)
    assert noises.shape[:2] == (config["iterations"], config["batch"])
    method = method_of(
        config,
        num_branches,
        lr=config["lr"],
        batch=config["batch"],
        budget_kimg=config["total_images"] / 1000,
    )
    teacher = copy.deepcopy(teacher).to(dtype)
    assert teacher.config.dropout == 0
    student = with_branches(teacher, num_branches).requires_grad_(True).train()
    optimizer = sfd.adam(student, method)
    assert {key: optimizer.defaults[key] for key in AUTHORS_ADAM} == AUTHORS_ADAM
    optimizer.param_groups[0].update(betas=tuple(config["betas"]), eps=config["eps"])
    grid = sfd.make_grid(method, num_steps=num_steps, afs=afs)
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    rates, states, targets, losses, parameters = [], [], [], [], []
    gradients: dict[str, Tensor | None] = {}
    for iteration, noise in enumerate(noises):
        labels = labels_of(vectors, teacher, iteration)
        target = sfd.teacher_states(teacher, noise, grid, labels, solver=method.solver, order=method.order)
        predicted: list[Tensor] = []
        means: list[Tensor] = []
        if afs:
            level = grid.student[0]
            predicted.append(sfd.analytic_states(level.to(noise) * noise, level, grid.inner[0]))
            means.append(sfd.branch_losses(predicted[0], target[:, 0]))
        optimizer.param_groups[0]["lr"] = sfd.learning_rate(method, iteration)
        rates.append([])
        for terms, before in sfd.train_intervals(
            Trainee(student, optimizer),
            sfd.first_states(noise, grid),
            target[:, len(predicted) :],
            weights=torch.tensor(weights, dtype=dtype),
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


def labels_of(vectors: Vectors, denoiser: Denoiser, *index: int) -> Tensor | None:
    """The stored labels, one-hot (of one iteration, if they have such an axis); None for an ordinary network."""
    stored = [vectors.arrays[key] for key in ("class_labels", "label_index") if key in vectors.arrays]
    assert len(stored) == (denoiser.config.label_dim > 0), f"{vectors.name}: labels do not fit the network"
    if not stored:
        return None
    if "class_labels" in vectors.arrays:
        return stored[0][index or ...]
    return torch.nn.functional.one_hot(stored[0][index or ...], denoiser.config.label_dim).float()


def check_training(vectors: Vectors, run: Replay) -> None:
    """Whatever the stored plain and dense runs have in common."""
    never = set(vectors.meta["never_compare"])
    moved = []
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
            moved.append(any(10 * rule[f"tol_{kind}"] < rule[f"update_{kind}"] for kind in ("maxabs", "meanabs")))
        elif group.startswith("update_l2_iter"):
            after = run.parameters[int(group.removeprefix("update_l2_iter")) - 1]
            moves = [(after[n].double() - run.start[n].double()).norm() for n in vectors.meta["update_l2_names"]]
            vectors.check(key, torch.stack(moves))
        elif group == "student_endpoints":
            vectors.check(key, run.states[int(name.removeprefix("iter")) - 1][:, -1])
        elif group == "teacher_states":
            vectors.check(key, run.targets[int(name.removeprefix("iter")) - 1][:, -1])
        elif group == "branch_states":
            vectors.check(key, run.states[int(name.removeprefix("iter")) - 1])
    # A pass says nothing where the tolerance is as large as the move.
    assert any(moved) or not moved, f"{vectors.name}: no stored parameter moved farther than its tolerance"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "files(*patterns): run for each file of the vectors that matches")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.files("sfd/*.json")` calls a test with `path` once for each file that matches a pattern."""
    marker = metafunc.definition.get_closest_marker("files")
    if marker is None:
        return
    paths = sorted(path for pattern in marker.args for path in VECTORS.glob(pattern)) or [VECTORS / marker.args[0]]
    metafunc.parametrize("path", paths, ids=[str(p.relative_to(VECTORS)) for p in paths], indirect=True)


@pytest.fixture(scope="session")
def vectors_root() -> Path:
    if not VECTORS.is_dir():
        pytest.skip(f"{VECTORS} does not exist; set BDENSE_VECTORS to the folder of the vectors")
    return VECTORS


@pytest.fixture
def path(request: pytest.FixtureRequest, vectors_root: Path) -> Path:
    """One of the files that a test asks for. A folder without any is a mistake and fails."""
    found: Path = request.param
    if not found.exists():
        pytest.fail(f"no {found.relative_to(vectors_root)} in {vectors_root}: incomplete, or not a folder of vectors")
    return found


@pytest.fixture(scope="session")
def read_vectors() -> Callable[[Path], Vectors]:
    return read


@pytest.fixture(scope="session")
def stored_network() -> Callable[..., Denoiser]:
    return network


@pytest.fixture(scope="session")
def named_network() -> Callable[..., Denoiser]:
    """Of the vectors in a file, the network that they name, beside its folder."""

    def of(path: Path, vectors: Vectors, dropout: float | None = None) -> Denoiser:
        return network(read(path.parents[1] / vectors.meta["network"]), dropout)

    return of


@pytest.fixture(scope="session")
def stored_levels() -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    return levels_of


@pytest.fixture(scope="session")
def stored_method() -> Callable[..., SFD]:
    return method_of


@pytest.fixture(scope="session")
def replay_training() -> Callable[..., Replay]:
    return replay


@pytest.fixture(scope="session")
def check_common_training() -> Callable[[Vectors, Replay], None]:
    return check_training


@pytest.fixture(scope="session")
def stored_labels() -> Callable[..., Tensor | None]:
    return labels_of
