"""B-DENSE students against an independent program written from the same specification.

There is no official B-DENSE code, so these numbers show that two programs agree about `spec/methods.md`, not
that either agrees with the paper's authors (README of the vectors).
"""

import math
import re

import pytest
import torch

from bdense_core.branches import with_branches, without_branches
from bdense_core.loops import sfd
from bdense_core.methods.sfd import SFD
from bdense_core.networks import NetworkConfig, build
from bdense_core.weights import endpoint_only, log_linear, uniform

pytestmark = pytest.mark.golden


@pytest.fixture
def stored_teacher(read_vectors, stored_network):
    return lambda path, vectors: stored_network(read_vectors(path.parents[1] / vectors.meta["network"]))


@pytest.mark.files("sfd/dense/*.safetensors")
def test_every_stored_target_student_run_and_sample(path, request, read_vectors):
    """Told apart by what they hold, so that a case under another name is not passed over."""
    vectors = read_vectors(path)
    keys = {key.split("/")[0] for key in vectors.arrays}
    if "targets" in keys:
        kind = check_targets
    elif "branch_distance" in keys:
        kind = check_untrained
    elif "loss_branch" in keys:
        kind = check_dense_training
    elif "loss" in keys:
        kind = check_plain_training
    elif "images_folded" in keys:
        kind = check_samples
    else:
        kind = check_folded_heads
    kind(path, vectors, request.getfixturevalue)
    assert not vectors.unchecked("noise", "label_index", "latents", "seeds", "state.", *folded_inputs(vectors))


def check_targets(path, vectors, fixture):
    teacher = fixture("stored_teacher")(path, vectors)
    labels = fixture("stored_labels")(vectors, teacher, ...)
    assert vectors.meta["teacher"] == "dpmpp max_order 3 predict_x0 lower_order_final no AFS"
    cases = [key.removeprefix("targets/") for key in vectors.arrays if key.startswith("targets/")]
    for case in cases:
        num_steps, inserted = map(int, re.fullmatch(r"n(\d+)_M(\d+)", case).groups())
        method = SFD(
            num_branches=inserted + 1,
            sigma_min=vectors.meta["sigma_min"],
            sigma_max=vectors.meta["sigma_max"],
        )
        grid = sfd.make_grid(method, num_steps=num_steps)
        states = sfd.teacher_states(teacher, vectors.arrays["noise"], grid, labels)
        vectors.check(f"targets/{case}", states.permute(1, 2, 0, 3, 4, 5))
        vectors.check(f"t_inner/{case}", grid.inner)
        vectors.check(f"t_student/{case}", grid.student)


def check_untrained(path, vectors, fixture):
    """The untrained student walks the grid without a step of any optimizer."""
    teacher = fixture("stored_teacher")(path, vectors)
    labels = fixture("stored_labels")(vectors, teacher, ...)
    config, noise = vectors.meta["config"], vectors.arrays["noise"]
    assert config["K"] == config["M"] + 1
    method = SFD(num_branches=config["K"])
    grid = sfd.make_grid(method, num_steps=config["num_steps"], afs=config["afs"])
    student = with_branches(teacher, config["K"]).eval()
    targets = sfd.teacher_states(teacher, noise, grid, labels)  # [B, J, K, C, H, W]
    raw, denoised, states = [], [], []
    x = grid.student[0].to(noise) * noise
    for j, (t, inner) in enumerate(zip(grid.student, grid.inner, strict=False)):
        if j < grid.first_trained:
            states.append(sfd.analytic_states(x, t, inner))
        else:
            with torch.no_grad():
                raw.append(student.raw(x, t, labels))
                branches = student.branches(x, t, labels)
                states.append(sfd.branch_states(student, x, t, inner, labels))
            assert torch.equal(branches, branches[:, :1].expand_as(branches))
            denoised.append(branches[:, -1])
        x = states[-1][:, -1]
    reached = torch.stack(states)  # [J, B, K, C, H, W]
    vectors.check("F", torch.stack(raw))
    vectors.check("D", torch.stack(denoised))
    vectors.check("branch_states", reached.transpose(1, 2))
    distances = [sfd.branch_losses(reached[j], targets[:, j]) for j in range(grid.num_intervals)]
    vectors.check("branch_distance", torch.stack(distances))
    each = (reached.transpose(0, 1) - targets).abs().flatten(3).sum(3)  # [B, J, K]
    vectors.check("branch_distance_per_sample", each.permute(1, 2, 0))
    by_sampler = sfd.sample(without_branches(student), noise, grid, labels)
    # The training step divides by t and multiplies again, the sampler does not: rounding of states near 80.
    assert (by_sampler - x).abs().max() <= 10 * vectors.meta["equalities"]["max_difference_to_untrained_euler_sampler"]


def check_dense_training(path, vectors, fixture):
    teacher, config = fixture("stored_teacher")(path, vectors), vectors.meta["config"]
    weights = weights_by_rule(config["weights_rule"], config["K"])
    vectors.check("weights", torch.tensor(weights, dtype=torch.float64))
    assert weights == pytest.approx(config["weights"], rel=1e-12)
    assert config["K"] == config["M"] + 1
    run = fixture("replay_training")(vectors, teacher, config["K"], weights)
    assert run.student.head_name == config["head"]
    fixture("check_common_training")(vectors, run)
    vectors.check("loss_branch", run.losses)
    vectors.check("loss_branch_per_sample", run.per_sample)
    vectors.check("loss_total", (run.losses * torch.tensor(weights)).sum(2))
    for key in vectors.arrays:
        if key.startswith("branch_states/iter"):
            vectors.check(key, run.states[int(key.rpartition("iter")[2]) - 1])
    if weights == endpoint_only(config["K"]):
        check_equals_plain(vectors, run, fixture("replay_training")(vectors, teacher, 1, [1.0]))
    if sampled := list(path.parent.glob("sample.safetensors")):
        check_sample_of(sampled[0], path, run, fixture)


def weights_by_rule(rule, num_branches):
    number = r"(-?[\d.]+)"
    if found := re.search(rf"\(a, b\) = \({number}, {number}\)", rule):
        return log_linear(float(found[1]), float(found[2]), num_branches)
    if found := re.match(rf"w_k = exp\({number} k ([+-]) {number}\), k = 0", rule):
        b = float(found[3]) * (1 if found[2] == "+" else -1)
        return log_linear(float(found[1]), b, num_branches)
    known = {"w_k = 1/K": uniform, "w = (0,...,0,1)": endpoint_only}
    assert rule in known, f"a rule of weights that this test does not know: {rule}"
    return known[rule](num_branches)


def check_equals_plain(vectors, dense, plain):
    """All weight on the endpoint is plain SFD bit for bit, and the other groups of the head never move."""
    assert torch.equal(dense.losses[..., -1], plain.losses[..., -1])
    assert torch.equal(dense.states[:, :, -1], plain.states[:, :, -1])
    head = {f"{dense.student.head_name}.{kind}" for kind in ("weight", "bias")}
    for after, expected in zip(dense.parameters, plain.parameters, strict=True):
        for name, parameter in expected.items():
            if name in head:
                channels = len(parameter)
                assert torch.equal(after[name][-channels:], parameter), name
                assert torch.equal(after[name][:-channels], dense.start[name][:-channels]), name
            elif name not in vectors.meta["never_compare"]:
                assert torch.equal(after[name], parameter), name
    for name, gradient in plain.first_gradients.items():
        found = dense.first_gradients[name]
        if name in head:
            assert torch.equal(found[-len(gradient) :], gradient), name
            assert not found[: -len(gradient)].any(), name
        elif gradient is not None and name not in vectors.meta["never_compare"]:
            assert torch.equal(found, gradient), name


def check_sample_of(path, training, run, fixture):
    """`images_unrounded` are those of the student that a training run ends with."""
    vectors = fixture("read_vectors")(path)
    iteration, name = re.search(r"after iteration (\d+) of (\w+),", vectors.meta["weights"]).groups()
    if name == training.stem:
        assert int(iteration) == len(run.parameters)
        for key in vectors.arrays:
            if key.startswith("images_unrounded/"):
                vectors.check(key, sfd.sample(run.student.eval(), vectors.arrays["latents"], sample_grid(vectors)))


def check_plain_training(path, vectors, fixture):
    teacher = fixture("stored_teacher")(path, vectors)
    run = fixture("replay_training")(vectors, teacher, 1, [1.0])
    fixture("check_common_training")(vectors, run)
    vectors.check("loss", run.losses[..., 0])
    vectors.check("loss_per_sample", run.per_sample[..., 0, :])


def sample_grid(vectors):
    config = vectors.meta["config"]
    assert config["schedule"] == "polynomial rho 7"
    method = SFD(nfe=config["nfe"], sigma_min=config["sigma_min"], sigma_max=config["sigma_max"])
    assert method.num_steps == config["num_steps"]
    return sfd.make_grid(method, afs=config["afs"])


def check_samples(path, vectors, fixture):
    teacher = fixture("stored_teacher")(path, vectors)
    student = with_branches(teacher, vectors.meta["config"]["K"]).eval()
    student.load_state_dict(vectors.state(), strict=True)
    grid, latents = sample_grid(vectors), vectors.arrays["latents"]
    case = f"n{vectors.meta['config']['num_steps']}"
    images, folded = sfd.sample(student, latents, grid), sfd.sample(without_branches(student), latents, grid)
    assert torch.equal(images, folded)
    vectors.check(f"images/{case}", images)
    vectors.check(f"images_folded/{case}", folded)
    vectors.check_pixels(case, images)
    vectors.checked.add(f"images_unrounded/{case}")  # checked beside the training run that makes the student
    assert (path.parent / f"{re.search(r' of (train_[^,]+),', vectors.meta['weights'])[1]}.safetensors").exists()


def folded_inputs(vectors):
    names = ("state.", "dense_head.", "x", "sigma", "class_labels")
    return [f"{case}/{name}" for case in vectors.meta.get("cases", ()) for name in names]


def check_folded_heads(path, vectors, fixture):
    assert vectors.meta["cases"]
    for name, case in vectors.meta["cases"].items():
        inputs = [vectors.arrays.get(f"{name}/{key}") for key in ("x", "sigma", "class_labels")]
        config = NetworkConfig.from_edm_kwargs(case["wrapper"], case["kwargs"])
        folded = build(config).eval()
        folded.load_state_dict(vectors.state(f"{name}/state."), strict=True)
        dense = with_branches(folded, case["K"]).eval()
        assert dense.head_name == case["head"]
        head = vectors.state(f"{name}/dense_head.")
        assert list(head["weight"].shape) == case["head_shape_dense"]
        state = {f"{dense.head_name}.{kind}": head[kind] for kind in ("weight", "bias")}
        dense.load_state_dict(dense.state_dict() | state, strict=True)
        with torch.no_grad():
            vectors.check(f"{name}/F", dense.raw(*inputs))
            vectors.check(f"{name}/D_branch", dense.branches(*inputs).transpose(0, 1))
            vectors.check(f"{name}/D_folded", folded(*inputs))
            vectors.check(f"{name}/D_folded", without_branches(dense)(*inputs))


def test_weights_of_the_paper_sum_to_about_one():
    """Table 4 of arXiv 2602.15971 and spec/methods.md 1: what tells that k counts from 0."""
    rows = [(1.386, -4.274), (1.337, -4.195), (1.230, -4.085), (1.278, -4.137), (1.277, -4.207)]
    sums = [math.fsum(log_linear(a, b, 4)) for a, b in rows]
    assert sums == pytest.approx([1.18, 1.12, 0.95, 1.02, 0.95], abs=0.006)
