"""The invariants of progressive distillation in one step (spec/methods.md, section 4), and its settings."""

from dataclasses import replace

import pytest
import torch

from bdense_core import vp
from bdense_core.branches import with_branches
from bdense_core.errors import BadValue, ShapeMismatch
from bdense_core.loops import pd
from bdense_core.methods.base import with_settings
from bdense_core.methods.pd import PD
from tests.sfd import SHAPE, network

STEPS = pd.Steps(schedule=vp.Cosine(-8.76, 10.23), num_steps=4, teacher_steps=2, num_branches=2)
INDEX = torch.tensor([0, 1, 2, 3])


def drawn(seed=0):
    return torch.randn((4, *SHAPE), generator=torch.Generator().manual_seed(seed))


def denoise(denoiser):
    return vp.of_exploding(denoiser)


def start(steps=STEPS):
    return pd.noisy(drawn(0).clamp(-1, 1), drawn(1), steps.level(INDEX))


# --- targets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [STEPS.schedule, vp.Linear()], ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize(("teacher_steps", "num_branches"), [(2, 1), (2, 2), (4, 2), (4, 4), (3, 3)])
def test_one_ddim_step_with_a_branchs_target_lands_where_the_teacher_is(teacher_steps, num_branches, schedule):
    """Of each branch, the endpoint's among them; at the clean end, where the last image alone counts, on that image."""
    steps = replace(STEPS, schedule=schedule, teacher_steps=teacher_steps, num_branches=num_branches)
    teacher, z = denoise(network().double()), start(steps).double()
    levels = [steps.schedule.at(u) for u in steps.times(INDEX)]
    walk = list(vp.ddim(teacher, z, levels))
    found = pd.targets(teacher, z, INDEX, steps)
    stride = teacher_steps // num_branches
    for k, target in enumerate(found.unbind(1)):
        end = (k + 1) * stride
        [(_, landed)] = vp.ddim(lambda z, level, x=target: x, z, [levels[0], levels[end]])
        inner = INDEX > 0 if k == num_branches - 1 else INDEX >= 0
        assert torch.allclose(landed[inner], walk[end - 1][1][inner], rtol=1e-9, atol=1e-9)
    assert torch.equal(found[0, -1], walk[-1][0].x[0])


def test_at_initialisation_the_first_branch_has_nothing_to_learn():
    """Of DDIM, the first step's image is the teacher's own: exactly, as a mean of one."""
    teacher, z = network(), start()
    student = with_branches(teacher, 2)
    level = STEPS.level(INDEX)
    target = pd.targets(denoise(teacher), z, INDEX, STEPS)
    found = vp.of_exploding(student.branches)(z, level)
    for head in found.unbind(1):
        assert torch.equal(head, denoise(teacher)(z, level))
    z = z[:, None]
    for weighting in ("constant", "snr", "snr_trunc", "v_mse"):
        losses = pd.branch_losses(vp.predict(found, z, level), vp.predict(target, z, level), weighting)
        assert losses[:, 0].tolist() == [0.0] * 4
        assert (losses[:, 1] > 0).all()


def test_the_endpoints_target_does_not_know_how_many_branches_there_are():
    teacher, z = denoise(network()), start()
    plain = pd.targets(teacher, z, INDEX, replace(STEPS, num_branches=1))
    assert torch.equal(pd.targets(teacher, z, INDEX, STEPS)[:, -1:], plain)


def test_times_divide_the_students_step_and_end_at_exactly_0():
    steps = pd.Steps(schedule=vp.Cosine(), num_steps=3, teacher_steps=3, num_branches=1)
    times = torch.stack(steps.times(torch.tensor([0, 2])))
    assert times[:, 0].tolist() == pytest.approx([1 / 3, 2 / 9, 1 / 9, 0.0])
    assert times[:, 1].tolist() == pytest.approx([1.0, 8 / 9, 7 / 9, 2 / 3])
    assert times[-1, 0] == 0


# --- losses ---------------------------------------------------------------------------------------------


def test_the_losses_of_v_and_of_the_truncated_snr_follow_from_that_of_the_image():
    """spec/methods.md 2.1: v-MSE = (1 + SNR) x-MSE, and the truncated one is the larger of image and noise."""
    z, level = start().double(), STEPS.level(INDEX)
    student, target = (vp.predict(drawn(seed).double()[:, None], z[:, None], level) for seed in (5, 6))
    found = {kind: pd.branch_losses(student, target, kind)[:, 0] for kind in ("constant", "snr", "snr_trunc", "v_mse")}
    mse = (student.x - target.x).square().flatten(1).mean(1)
    snr = level.logsnr.exp()
    assert torch.allclose(found["constant"], mse)
    assert torch.allclose(found["snr"], snr * mse)
    assert torch.allclose(found["v_mse"], (1 + snr) * mse)
    assert torch.allclose(found["snr_trunc"], snr.clamp(min=1) * mse)
    assert (snr > 1).any() and (snr < 1).any(), "both sides of the truncation"


def test_students_and_targets_of_another_number_of_branches_are_refused():
    level = STEPS.level(INDEX)
    one, two = (vp.predict(torch.zeros(4, k, *SHAPE), start()[:, None], level) for k in (1, 2))
    with pytest.raises(ShapeMismatch, match=r"\[4, 2, 1, 8, 8\].*\[4, 1, 1, 8, 8\]"):
        pd.branch_losses(two, one, "constant")


def test_gradients_below_the_limit_stay_as_they_are_and_others_keep_their_direction():
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(drawn(0))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert pd.clip_gradients(parameters, 6.0) == 5
    assert parameters[0].grad.tolist() == [3.0, 0.0]
    assert pd.clip_gradients(parameters, 1.0) == 5
    assert [p.grad.tolist() for p in parameters[:2]] == [pytest.approx([0.6, 0.0]), pytest.approx([0.8])]


def test_the_rate_falls_linearly_towards_0_or_not_at_all():
    falling, constant = PD(lr=1e-3), PD(lr=1e-3, lr_decay="none")
    assert [pd.learning_rate(falling, i, 4) for i in range(4)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert {pd.learning_rate(constant, i, 4) for i in range(4)} == {1e-3}


# --- settings -------------------------------------------------------------------------------------------


def test_the_papers_stages_halve_1024_to_128():
    method = PD()
    assert method.stage_steps == (512, 256, 128)
    assert method.steps(1) == (6400, 12800, 19200)
    assert method.stage_ends == (50_000, 100_000, 150_000)
    assert method.terms == ("branch.1", "branch.2")
    assert list(method.metrics()) == ["fd@512", "fd@256", "fd@128"]


def test_stages_end_where_their_kimg_are_full_whatever_the_batch():
    method = PD(start_steps=16, nfe=2, budget_kimg=3, batch=300)
    assert method.stage_ends == (4, 7, 10)  # 1,000, 2,000 and 3,000 images are passed by 1,200, 2,100 and 3,000


def test_a_stage_may_divide_by_more_than_two():
    assert PD(start_steps=64, nfe=1, teacher_steps=4, num_branches=2, budget_kimg=3).stage_steps == (16, 4, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": 3, "start_steps": 16}, r"nfe \(3\) is not reached from .*16.*choose one of 8, 4"),
        ({"nfe": 16, "start_steps": 16}, r"nfe \(16\) is not reached"),
        ({"nfe": 2, "start_steps": 7}, "start_steps is not divisible"),
        ({"num_branches": 3}, r"num_branches \(3\) must divide method.teacher_steps.*got 2"),
        ({"teacher_steps": 1, "num_branches": 1}, "at least 2, got 1"),
        ({"budget_kimg": 20}, "each of 3 stages the same whole number of kimg"),
        ({"budget_kimg": 3, "batch": 2000}, r"a batch \(2000\) at least"),
        ({"logsnr_min": 3, "logsnr_max": 3}, r"logsnr_max \(3\) must exceed"),
        ({"lr": 0}, "lr must be positive"),
        ({"clip_norm": -1}, "clip_norm must be positive"),
        ({"weight_decay": -1}, "weight_decay must not be negative"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(BadValue, match=message):
        PD(**settings)


def test_controls_are_plain_pd_uniform_weights_and_a_teacher_that_is_not_trained():
    method = PD()
    controls = method.controls()
    assert controls["endpoint_only"].weights == (0.0, 1.0)
    assert controls["uniform"].weights == (0.5, 0.5)
    assert not controls["teacher"].is_trained
    assert with_settings(method, controls["teacher"].settings).untrained


def test_cost_counts_as_shared_what_the_cache_holds_and_the_rest_as_the_students():
    """Four steps of the teacher for each image: in the first of three stages its own, then those of a student."""
    method = PD(start_steps=64, nfe=1, teacher_steps=4, num_branches=2, budget_kimg=3)
    assert method.forward_units() == pytest.approx((4 / 3, 3 + 4 * 2 / 3))
    assert method.cache_bytes(64) * method.num_stages == 2 * 64 * 2
    alone = replace(method, untrained=True)
    assert (alone.forward_units(), alone.cache_bytes(64)) == ((0.0, 0.0), 0.0)
