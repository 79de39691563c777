"""SFD's teacher states, training runs and samples against zju-pi/diff-sampler."""

import re

import pytest
import torch

from bdense_core.loops import sfd
from bdense_core.methods.sfd import SFD

pytestmark = pytest.mark.golden


@pytest.mark.files("sfd/sfd/*.safetensors")
def test_every_stored_teacher_and_training_run(
    path, read_vectors, stored_network, replay_training, check_common_training
):
    vectors = read_vectors(path)
    teacher = stored_network(read_vectors(path.parents[1] / vectors.meta["network"]))
    if "loss" in vectors.arrays:
        run = replay_training(vectors, teacher, 1, [1.0])
        check_common_training(vectors, run)
        check_plain_training(vectors, run)
    else:
        check_teacher(vectors, teacher)
    assert not vectors.unchecked("noise", "label_index", "class_labels")


def check_plain_training(vectors, run):
    vectors.check("loss", run.losses[..., 0])
    vectors.check("loss_per_sample", run.per_sample[..., 0, :])
    for key in vectors.arrays:
        if key.startswith("teacher_states/iter"):
            vectors.check(key, run.targets[int(key.rpartition("iter")[2]) - 1][:, -1])


def check_teacher(vectors, teacher):
    assert vectors.meta["cases"]
    assert vectors.meta["teacher"] == "dpmpp max_order 3 predict_x0 lower_order_final no AFS"
    for case, settings in vectors.meta["cases"].items():
        method = SFD(
            num_branches=1,
            teacher_steps=settings["M"] + 1,
            sigma_min=vectors.meta["sigma_min"],
            sigma_max=vectors.meta["sigma_max"],
        )
        grid = sfd.make_grid(method, num_steps=settings["num_steps"])
        assert len(grid.teacher) == settings["num_steps_teacher"]
        states = sfd.teacher_states(
            teacher, vectors.arrays["noise"], grid, vectors.arrays.get("class_labels")
        )  # [B, J, 1, C, H, W]
        vectors.check(f"t_student/{case}", grid.student)
        vectors.check(f"teacher_traj/{case}", states[:, :, 0].transpose(0, 1))
        # The branches' times are the teacher's own, whichever of its steps a branch stands for.
        kept = [grid.inner[j, -1] for j in range(grid.num_intervals)]
        assert torch.equal(torch.stack(kept), grid.teacher[settings["teacher_indices"]])


@pytest.mark.files("sfd/sampling/*.safetensors")
def test_every_stored_sample_and_its_pixels(path, read_vectors, stored_network):
    vectors = read_vectors(path)
    student = stored_network(read_vectors(path.parents[1] / vectors.meta["network"]))
    if trained := re.search(r"(\S+\.safetensors) (param_iter\d+/)", vectors.meta["weights"]):
        state = read_vectors(path.parents[1] / trained[1]).state(trained[2]) | vectors.state("qkv_bias/")
        student.load_state_dict(student.state_dict() | state)
    else:
        assert vectors.meta["weights"] == "as in the network file"
    assert vectors.meta["cases"]
    for case, settings in vectors.meta["cases"].items():
        method = SFD(nfe=settings["nfe"], sigma_min=vectors.meta["sigma_min"], sigma_max=vectors.meta["sigma_max"])
        assert method.num_steps == settings["num_steps"]
        grid = sfd.make_grid(method, afs=settings["afs"])
        images = sfd.sample(student, vectors.arrays["latents"], grid, vectors.arrays.get("class_labels"))
        vectors.check(f"images/{case}", images)
        vectors.check_pixels(case, images)
    # test_solvers.py compares the states on the way.
    assert not vectors.unchecked("latents", "class_labels", "seeds", "qkv_bias/", "traj/")
