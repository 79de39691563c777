"""SFD's teacher states, training runs and samples against zju-pi/diff-sampler."""

import re

import pytest
import torch

from bdense_core import sigmas
from bdense_core.loops import sfd
from bdense_core.solvers import dpmpp_order

pytestmark = pytest.mark.golden


@pytest.mark.files("sfd/sfd/*.safetensors")
def test_every_stored_teacher_and_training_run(
    path,
    read_vectors,
    named_network,
    stored_labels,
    stored_levels,
    stored_method,
    replay_training,
    check_common_training,
):
    vectors = read_vectors(path)
    if "loss" in vectors.arrays:
        teacher = named_network(path, vectors, dropout=vectors.meta["config"]["dropout"])
        run = replay_training(vectors, teacher, 1, [1.0])
        check_common_training(vectors, run)
        vectors.check("loss", run.losses[..., 0])
        vectors.check("loss_per_sample", run.per_sample[..., 0, :])
    else:
        teacher = named_network(path, vectors)
        check_teacher(vectors, teacher, stored_labels(vectors, teacher), stored_levels, stored_method)
    assert not vectors.unchecked("noise", "label_index", "class_labels")


def check_teacher(vectors, teacher, labels, stored_levels, stored_method):
    assert vectors.meta["cases"]
    for case, settings in vectors.meta["cases"].items():
        method = stored_method(vectors.meta | settings, num_branches=1)
        grid = sfd.make_grid(method, num_steps=settings["num_steps"])
        num_points = settings["num_steps_teacher"]
        levels = stored_levels(vectors.meta | settings)
        assert tuple(grid.teacher.tolist()) == sigmas.teacher_grid(settings["num_steps"], settings["M"] + 1, **levels)
        assert len(grid.teacher) == num_points
        if method.solver == "dpmpp":
            order = method.solver_order
            orders = [dpmpp_order(i, num_points, order, lower_order_final=True) for i in range(num_points - 1)]
            assert orders == settings["teacher_orders"]
        states = sfd.teacher_states(
            teacher, vectors.arrays["noise"], grid, labels, solver=method.solver, order=method.order
        )  # [B, J, 1, C, H, W]
        vectors.check(f"t_student/{case}", grid.student)
        vectors.check(f"teacher_traj/{case}", states[:, :, 0].transpose(0, 1))
        # The branches' times are the teacher's own, whichever of its steps a branch stands for.
        kept = [grid.inner[j, -1] for j in range(grid.num_intervals)]
        assert torch.equal(torch.stack(kept), grid.teacher[settings["teacher_indices"]])


@pytest.mark.files("sfd/sampling/*.safetensors")
def test_every_stored_sample_and_its_pixels(path, read_vectors, named_network, stored_labels, stored_method):
    vectors = read_vectors(path)
    student = named_network(path, vectors)
    if trained := re.search(r"(\S+\.safetensors) (param_iter\d+/)", vectors.meta["weights"]):
        state = read_vectors(path.parents[1] / trained[1]).state(trained[2]) | vectors.state("qkv_bias/")
        student.load_state_dict(student.state_dict() | state)
    else:
        assert vectors.meta["weights"] == "as in the network file"
    assert vectors.meta["cases"]
    for case, settings in vectors.meta["cases"].items():
        method = stored_method(vectors.meta | settings | {"M": 0}, num_branches=1)
        grid = sfd.make_grid(method, num_steps=settings["num_steps"], afs=settings["afs"])
        images = sfd.sample(student, vectors.arrays["latents"], grid, stored_labels(vectors, student))
        vectors.check(f"images/{case}", images)
        vectors.check_pixels(case, images)
    # test_solvers.py compares the states on the way.
    assert not vectors.unchecked("latents", "class_labels", "seeds", "qkv_bias/", "traj/")
