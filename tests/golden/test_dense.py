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
from bdense_core.networks import NetworkConfig, build
from bdense_core.weights import checked, endpoint_only, log_linear, uniform

pytestmark = pytest.mark.golden


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
    inputs = ("noise", "label_index", "class_labels", "latents", "seeds", "state.")
    assert not vectors.unchecked(*inputs, *folded_inputs(vectors))


def check_targets(path, vectors, fixture):
    teacher = fixture("named_network")(path, vectors)
    labels = fixture("stored_labels")(vectors, teacher)
    cases = [key.removeprefix("targets/") for key in vectors.arrays if key.startswith("targets/")]
    for case in cases:
        num_steps, inserted = map(int, re.fullmatch(r"n(\d+)_M(\d+)", case).groups())
        method = fixture("stored_method")(vectors.meta | {"M": inserted}, num_branches=inserted + 1)
        grid = sfd.make_grid(method, num_steps=num_steps)
        states = sfd.teacher_states(
            teacher, vectors.arrays["noise"], grid, labels, solver=method.solver, order=method.order
        )
        vectors.check(f"targets/{case}", states.permute(1, 2, 0, 3, 4, 5))
        vectors.check(f"t_inner/{case}", grid.inner)
        vectors.check(f"t_student/{case}", grid.student)


def check_untrained(path, vectors, fixture):
    """The untrained student walks the grid without a step of any optimizer."""
    teacher = fixture("named_network")(path, vectors)
    labels = fixture("stored_labels")(vectors, teacher)
    config, noise = vectors.meta["config"], vectors.arrays["noise"]
    assert config["K"] == config["M"] + 1
    method = fixture("stored_method")(config, num_branches=config["K"])
    grid = sfd.make_grid(method, num_steps=config["num_steps"], afs=config["afs"])
    student = with_branches(teacher, config["K"]).eval()
    targets = sfd.teacher_states(
        teacher, noise, grid, labels, solver=method.solver, order=method.order
    )  # [B, J, K, C, H, W]
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
            denoised.append(branches)
        x = states[-1][:, -1]
    reached = torch.stack(states)  # [J, B, K, C, H, W]
    vectors.check("F", torch.stack(raw))
    for branches in torch.stack(denoised).unbind(2):  # one is stored, as all are equal
        vectors.check("D", branches)
    vectors.check("branch_states", reached.transpose(1, 2))
    distances = [sfd.branch_losses(reached[j], targets[:, j]) for j in range(grid.num_intervals)]
    vectors.check("branch_distance", torch.stack(distances))
    each = (reached.transpose(0, 1) - targets).abs().flatten(3).sum(3)  # [B, J, K]
    vectors.check("branch_distance_per_sample", each.permute(1, 2, 0))
    by_sampler = sfd.sample(without_branches(student), noise, grid, labels)
    # The training step divides by t and multiplies again, the sampler does not: rounding of the first states.
    seen = vectors.meta["equalities"]["max_difference_to_untrained_euler_sampler"]
    assert (by_sampler - x).abs().max() <= max(10 * seen, 2e-6 * method.sigma_max)


def check_dense_training(path, vectors, fixture):
    run, weights = trained(path, vectors, fixture)
    config = vectors.meta["config"]
    vectors.check("weights", torch.tensor(weights, dtype=torch.float64))
    assert config["weights"] == pytest.approx(weights, rel=1e-12)
    assert run.student.head_name == config["head"]
    fixture("check_common_training")(vectors, run)
    vectors.check("loss_branch", run.losses)
    vectors.check("loss_branch_per_sample", run.per_sample)
    vectors.check("loss_total", (run.losses * torch.tensor(weights)).sum(2))
    if weights == endpoint_only(config["K"]):
        # In double precision, where the order of a convolution's sums makes no difference that Adam would enlarge.
        dense, plain = (
            trained(path, vectors, fixture, dtype=torch.float64, **plainly)[0]
            for plainly in ({}, {"num_branches": 1, "weights": [1.0]})
        )
        check_equals_plain(vectors, dense, plain)


def trained(path, vectors, fixture, *, num_branches=None, weights=None, **others):
    """The stored run and the weights of its rule, or of others."""
    config = vectors.meta["config"]
    assert config["K"] == config["M"] + 1
    teacher = fixture("named_network")(path, vectors, dropout=config["dropout"])
    weights = weights or weights_by_rule(config)
    return fixture("replay_training")(vectors, teacher, num_branches or config["K"], weights, **others), weights


def weights_by_rule(config):
    """What a rule of the README gives; under any other the metadata must list the numbers themselves."""
    rule, num_branches = config["weights_rule"], config["K"]
    number = r"(-?\d[\d.]*(?:e-?\d+)?)"
    origin = int(found[1]) if (found := re.search(r"\bk = (\d+)\b", rule)) else 0
    if found := re.search(rf"exp\(a k \+ b\).*\(a, b\) = \({number}, {number}\)", rule):
        return log_linear(float(found[1]), float(found[2]), num_branches, index_origin=origin)
    if found := re.match(rf"w_k = exp\({number} k ([+-]) {number}\)", rule):
        b = float(found[3]) * (1 if found[2] == "+" else -1)
        return log_linear(float(found[1]), b, num_branches, index_origin=origin)
    known = {"w_k = 1/K": uniform, "w = (0,...,0,1)": endpoint_only}
    return known[rule](num_branches) if rule in known else checked(config["weights"])


def check_equals_plain(vectors, dense, plain):
    """All weight on the endpoint is plain SFD, and the other groups of the head never move."""
    assert_equal(dense.losses[..., -1], plain.losses[..., -1], "losses")
    assert_equal(dense.states[:, :, -1], plain.states[:, :, -1], "states")
    head = {f"{dense.student.head_name}.{kind}" for kind in ("weight", "bias")}
    for after, expected in zip(dense.parameters, plain.parameters, strict=True):
        for name, parameter in expected.items():
            if name in head:
                channels = len(parameter)
                assert_equal(after[name][-channels:], parameter, name)
                assert torch.equal(after[name][:-channels], dense.start[name][:-channels]), name
            elif name not in vectors.meta["never_compare"]:
                assert_equal(after[name], parameter, name)
    for name, gradient in plain.first_gradients.items():
        found = dense.first_gradients[name]
        if name in head:
            assert_equal(found[-len(gradient) :], gradient, name)
            assert not found[: -len(gradient)].any(), name
        elif gradient is not None and name not in vectors.meta["never_compare"]:
            assert_equal(found, gradient, name)


def assert_equal(actual, expected, name):
    """To the rounding of double precision."""
    assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max().clamp(min=1), name


def check_plain_training(path, vectors, fixture):
    teacher = fixture("named_network")(path, vectors, dropout=vectors.meta["config"]["dropout"])
    run = fixture("replay_training")(vectors, teacher, 1, [1.0])
    fixture("check_common_training")(vectors, run)
    vectors.check("loss", run.losses[..., 0])
    vectors.check("loss_per_sample", run.per_sample[..., 0, :])


def check_samples(path, vectors, fixture):
    """Images of a stored student, and of the student of the run that it came from, before it was rounded."""
    teacher, config = fixture("named_network")(path, vectors), vectors.meta["config"]
    student = with_branches(teacher, config["K"]).eval()
    student.load_state_dict(vectors.state(), strict=True)
    iteration, name = re.search(r"after iteration (\d+) of ([\w.-]+),", vectors.meta["weights"]).groups()
    training = fixture("read_vectors")(path.with_name(f"{name}.safetensors"))
    run = trained(path, training, fixture)[0]
    assert int(iteration) == len(run.parameters)
    latents, labels = vectors.arrays["latents"], fixture("stored_labels")(vectors, teacher)
    method = fixture("stored_method")(config | {"M": 0}, num_branches=1)
    for case in [key.removeprefix("images/") for key in vectors.arrays if key.startswith("images/")]:
        grid = sfd.make_grid(method, num_steps=int(re.fullmatch(r"n(\d+)", case)[1]), afs=config["afs"])
        images = sfd.sample(student, latents, grid, labels)
        vectors.check(f"images/{case}", images)
        vectors.check(f"images_folded/{case}", sfd.sample(without_branches(student), latents, grid, labels))
        vectors.check(f"images_unrounded/{case}", sfd.sample(run.student.eval(), latents, grid, labels))
        vectors.check_pixels(case, images)
    assert f"images/n{config['num_steps']}" in vectors.checked


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
            for network in (folded, dense, without_branches(dense)):
                vectors.check(f"{name}/D_folded", network(*inputs))


def test_weights_of_the_paper_sum_to_about_one():
    """Table 4 of arXiv 2602.15971 and spec/methods.md 1: what tells that k counts from 0."""
    rows = [(1.386, -4.274), (1.337, -4.195), (1.230, -4.085), (1.278, -4.137), (1.277, -4.207)]
    sums = [math.fsum(log_linear(a, b, 4)) for a, b in rows]
    assert sums == pytest.approx([1.18, 1.12, 0.95, 1.02, 0.95], abs=0.006)
