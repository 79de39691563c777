"""Progressive distillation against numbers from the authors' public code.

Each in float32, within the stored tolerances, and in float64, where two correct programs agree nearly to rounding.
What lies in the frame of images and levels is `vp`, what is of one student step `loops.pd`.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from bdense_core import data, vp
from bdense_core.loops import pd
from bdense_core.methods.pd import PD
from tests.golden.pd import Mixture, read, schedule_of, settings

pytestmark = pytest.mark.golden

both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
WEIGHTINGS = ("constant", "snr", "snr_trunc", "v_mse")
OFFICIAL = {"logsnr_min": -20.0, "logsnr_max": 20.0}


@pytest.mark.files("pd/index.json")
def test_every_stored_file_has_a_test(path):
    tested = set(re.findall(r'^@pytest\.mark\.files\("pd/(.*\.safetensors)"\)$', Path(__file__).read_text(), re.M))
    assert set(json.loads(path.read_text())["files"]) == tested
    assert {found.name for found in path.parent.glob("*.safetensors")} == tested


@both_types
@pytest.mark.files("pd/schedule.safetensors")
def test_schedules(path, dtype):
    stored = read(path, dtype)
    for case in stored.cases:
        told = settings(case, index=None, name="cosine", logsnr_min=None, logsnr_max=None, a=None, b=None)
        assert told["name"] == "cosine"
        schedule, k = vp.Cosine(told["logsnr_min"], told["logsnr_max"]), told["index"]
        level = schedule.at(stored["u"])
        stored.check(f"alpha_{k}", level.alpha)
        stored.check(f"sigma_{k}", level.sigma)
        stored.check(f"logsnr_{k}", level.logsnr)
        ends = schedule.at(torch.tensor([0.0, 1.0], dtype=torch.float64))
        angles = torch.atan2(ends.sigma, ends.alpha)
        assert angles.tolist() == pytest.approx([told["b"], told["a"] + told["b"]], rel=1e-12)
    assert not stored.unchecked()


@both_types
@pytest.mark.files("pd/predictions.safetensors")
def test_conversions_of_raw_outputs(path, dtype):
    stored = read(path, dtype)
    level = vp.Level.of_logsnr(stored["logsnr"])
    for case in stored.cases:
        if "reverse" in case:
            continue
        told = settings(case, mean_type=None, clip=None)
        raw = torch.cat([stored["raw"], stored["raw2"]], dim=1) if told["mean_type"] == "both" else stored["raw"]
        found = vp.predict(raw, stored["z"], level, mean_type=told["mean_type"], clip=told["clip"])
        name = f"{told['mean_type']}.{'clip' if told['clip'] else 'noclip'}"
        for kind in ("x", "eps", "v"):
            stored.check(f"{name}.{kind}", getattr(found, kind))
    # Progressive distillation samples with DDIM alone: the step that draws from q(z_s | z_t, x) is no part of it here.
    assert all(key.startswith("reverse.") for key in stored.unchecked())


@both_types
@pytest.mark.files("pd/ddim.safetensors")
def test_steps_and_runs_of_ddim(path, dtype):
    stored = read(path, dtype)
    mixture = Mixture.of(stored)
    stored.check("denoiser.x", mixture.denoised(stored["denoiser.z"], vp.Level.of_logsnr(stored["denoiser.logsnr"])))
    for case in stored.cases:
        {"single step": check_step, "run": check_run}[case["kind"]](stored, mixture, case)
    assert not stored.unchecked()


def check_step(stored, mixture, case):
    told = settings(
        case, kind=None, N=None, i=None, clip=None, u_t="(i+1)/N", u_s="i/N", mean_type="x", schedule=None, array=None
    )
    assert (told["u_t"], told["u_s"], told["mean_type"]) == ("(i+1)/N", "i/N", "x")
    begin = told["N"] - 1 - told["i"]
    levels = schedule_of(told["schedule"]).grid(told["N"])[begin : begin + 2]
    [(_, z)] = vp.ddim(lambda z, level: stored["step.xhat"], stored["step.z"], levels, clip=told["clip"])
    stored.check(told["array"], z)


def check_run(stored, mixture, case):
    told = settings(
        case, kind=None, array=None, mean_type=None, N=None, clip=None, denoiser_mul=None, denoiser_add=None,
        schedule=None,
    )  # fmt: skip
    network = mixture.network(told["mean_type"], told["denoiser_mul"], told["denoiser_add"])
    levels, start = schedule_of(told["schedule"]).grid(told["N"]), stored["run.z_init"]
    seen, states = zip(*vp.ddim(network, start, levels, clip=told["clip"]), strict=True)
    hard = told["mean_type"] == "eps"
    stored.check(f"{told['array']}.states", torch.stack([start, *states]), ill_conditioned=hard)
    stored.check(f"{told['array']}.xhat", torch.stack([believed.x for believed in seen]), ill_conditioned=hard)
    if "run.image255" in stored.arrays and told["array"] in stored.rules["run.image255"]["what"]:
        check_pixels(stored, states[-1])


def check_pixels(stored, images):
    """Bytes are the stored levels, rounded; halves may go either way within the tolerance."""
    levels = stored.arrays["run.image255"]
    away = (data.to_uint8(images).double() - levels.double()).abs()
    assert (away <= 0.5 + stored.rules["run.image255"]["tol_maxabs"]).all()
    stored.checked.add("run.image255")


@both_types
@pytest.mark.files("pd/targets.safetensors")
def test_targets_losses_and_gradients_of_a_halving(path, dtype):
    stored = read(path, dtype)
    mixture = Mixture.of(stored)
    for case in stored.cases:
        (check_teacher_training if "kind" in case else check_halving)(stored, mixture, case)
    assert not stored.unchecked()


def check_halving(stored, mixture, case):
    told = settings(
        case, prefix=None, mean_type=None, N_student=None, teacher_steps=None, schedule=OFFICIAL,
        denoiser_mul=1.1, denoiser_add=0.0, batch=None,
    )  # fmt: skip
    prefix, mean_type = told["prefix"], told["mean_type"]
    hard = mean_type == "eps"

    def check(key, actual):
        stored.check(prefix + key, actual, ill_conditioned=hard)

    assert told["teacher_steps"] == 2 * told["N_student"]
    steps = pd.Steps(
        schedule=schedule_of(told["schedule"]), num_steps=told["N_student"], teacher_steps=2, num_branches=1
    )
    network = mixture.network(mean_type, told["denoiser_mul"], told["denoiser_add"])
    index = stored[f"{prefix}i"]
    times = steps.times(index)
    for suffix, u in zip(("", "_mid", "_s"), times, strict=True):
        check(f"u{suffix}", u)
        check(f"logsnr{suffix}", steps.schedule.at(u).logsnr)
    z = pd.noisy(stored[f"{prefix}x"], stored[f"{prefix}eps"], steps.level(index))
    check("z", z)
    walk = list(vp.ddim(network, z, [steps.schedule.at(u) for u in times]))
    for number, (name, (believed, state)) in enumerate(zip(("z_mid", "z_teacher"), walk, strict=True), start=1):
        check(name, state)
        check(f"teacher{number}.x", believed.x)
        check(f"teacher{number}.eps", believed.eps)
    [x_target] = pd.targets(network, z, index, steps).unbind(1)
    target = vp.predict(x_target, z, steps.level(index))
    output = stored[f"{prefix}student_out"].requires_grad_()
    student = vp.predict(output, z, steps.level(index), mean_type=mean_type)
    for kind in ("x", "eps", "v"):
        check(f"{kind}_target", getattr(target, kind))
        check(f"student.{kind}", getattr(student, kind))
        check(f"{kind}_mse", (getattr(student, kind) - getattr(target, kind)).square().flatten(1).mean(1))
    for weighting in WEIGHTINGS:
        [loss] = pd.branch_losses(branches(student), branches(target), weighting).unbind(1)
        check(f"loss.{weighting}", loss)
        check(f"lossmean.{weighting}", loss.mean())
        [gradient] = torch.autograd.grad(loss.mean(), output, retain_graph=True)
        check(f"grad.{weighting}", gradient)


def check_teacher_training(stored, mixture, case):
    """The weighting of a loss does not care what the target is."""
    told = settings(case, prefix=None, kind=None, mean_type=None, schedule=OFFICIAL, batch=None)
    prefix, mean_type = told["prefix"], told["mean_type"]
    x, eps, u = stored[f"{prefix}x"], stored[f"{prefix}eps"], stored.arrays[f"{prefix}u"]
    stored.checked.add(f"{prefix}u")  # stored as an output: the draw of the original
    level = schedule_of(told["schedule"]).at(u)
    z = pd.noisy(x, eps, level)
    at = level.beside(z)
    truth = vp.Prediction(x, eps, at.alpha * eps - at.sigma * x)
    student = vp.predict(stored[f"{prefix}student_out"], z, level, mean_type=mean_type)
    for weighting in WEIGHTINGS:
        [loss] = pd.branch_losses(branches(student), branches(truth), weighting).unbind(1)
        stored.check(f"{prefix}loss.{weighting}", loss, ill_conditioned=mean_type == "eps")


def branches(*each):
    """Of predictions [B, C, H, W], one of all branches [B, K, C, H, W]."""
    return vp.Prediction(*(torch.stack([getattr(one, kind) for one in each], dim=1) for kind in ("x", "eps", "v")))


@both_types
@pytest.mark.files("pd/dense.safetensors")
def test_targets_and_losses_of_all_branches(path, dtype):
    stored = read(path, dtype)
    mixture = Mixture.of(stored)
    for case in stored.cases:
        check_branches(stored, mixture, case)
    assert not stored.unchecked()


def check_branches(stored, mixture, case):
    told = settings(
        case, prefix=None, mean_type=None, N_student=None, K=None, teacher_steps=None, schedule=OFFICIAL,
        denoiser_mul=1.1, denoiser_add=0.0, weights=None, official=None, batch=None,
    )  # fmt: skip
    prefix, mean_type, num_branches = told["prefix"], told["mean_type"], told["K"]
    hard = mean_type == "eps"

    def check(key, actual):
        stored.check(prefix + key, actual, ill_conditioned=hard)

    teacher_steps, rest = divmod(told["teacher_steps"], told["N_student"])
    assert (teacher_steps, rest) == (num_branches, 0)
    steps = pd.Steps(
        schedule=schedule_of(told["schedule"]),
        num_steps=told["N_student"],
        teacher_steps=teacher_steps,
        num_branches=num_branches,
    )
    network = mixture.network(mean_type, told["denoiser_mul"], told["denoiser_add"])
    index, level = stored[f"{prefix}i"], steps.level(stored[f"{prefix}i"])
    z = pd.noisy(stored[f"{prefix}x"], stored[f"{prefix}eps"], level)
    check("z", z)
    check("logsnr", level.logsnr)
    levels = [steps.schedule.at(u) for u in steps.times(index)]
    check("logsnr_k", torch.stack([there.logsnr for there in levels[1:]]))
    seen, states = zip(*vp.ddim(network, z, levels), strict=True)
    check("z_k", torch.stack(states))
    check("teacher_x_k", torch.stack([believed.x for believed in seen]))
    x_target = pd.targets(network, z, index, steps)
    taught = [vp.predict(x, z, level) for x in x_target.unbind(1)]
    for kind in ("x", "eps", "v"):
        check(f"{kind}_target_k", torch.stack([getattr(target, kind) for target in taught]))
    weights = stored[f"{prefix}w"]
    assert weights.tolist() == pytest.approx(told["weights"])
    output = stored[f"{prefix}student_out"].requires_grad_()
    student = branches(*(vp.predict(raw, z, level, mean_type=mean_type) for raw in output))
    for weighting in WEIGHTINGS:
        losses = pd.branch_losses(student, branches(*taught), weighting)
        check(f"loss_k.{weighting}", losses.T)
        total = (losses.mean(0) * weights).sum()
        check(f"total.{weighting}", total)
        if f"{prefix}grad.{weighting}" in stored.arrays:
            check(f"grad.{weighting}", torch.autograd.grad(total, output, retain_graph=True)[0])


@both_types
@pytest.mark.files("pd/optim.safetensors")
def test_clipping_and_updates_of_a_small_student(path, dtype):
    stored = read(path, dtype)
    for prefix in sorted({key.split(".")[0] for key in stored.arrays if key.startswith("clip")}):
        check_clipping(stored, prefix)
    [case] = stored.cases
    check_updates(stored, case)
    assert not stored.unchecked()


def check_clipping(stored, prefix):
    names = [key.removeprefix(f"{prefix}.in.") for key in stored.arrays if key.startswith(f"{prefix}.in.")]
    parameters = {name: torch.nn.Parameter(torch.zeros_like(stored[f"{prefix}.in.{name}"])) for name in names}
    for name, parameter in parameters.items():
        parameter.grad = stored[f"{prefix}.in.{name}"].clone()
    stored.check(f"{prefix}.norm", pd.clip_gradients(parameters.values(), 1.0))
    for name, parameter in parameters.items():
        stored.check(f"{prefix}.out.{name}", parameter.grad)


def check_updates(stored, case):
    told = settings(
        case, kind="mini distillation", mean_type=None, N_student=None, loss=None, schedule=OFFICIAL, denoiser_mul=1.1,
        denoiser_add=0.0, clip_norm=1.0, adam=None, base_lr=None, steps=None, lr_rule=None, ema=None, student=None,
    )  # fmt: skip
    assert told["adam"] == {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    assert told["lr_rule"].startswith(f"base_lr*(1 - step/{told['steps']})")
    assert told["ema"] is None
    method = PD(optimizer="adam", lr=told["base_lr"], clip_norm=told["clip_norm"], weighting=told["loss"])
    mixture = Mixture.of(stored)
    network = mixture.network(told["mean_type"], told["denoiser_mul"], told["denoiser_add"])
    steps = pd.Steps(
        schedule=schedule_of(told["schedule"]), num_steps=told["N_student"], teacher_steps=2, num_branches=1
    )
    student = {name: torch.nn.Parameter(stored[f"init.{name}"].clone()) for name in ("w", "b", "g")}
    optimizer = pd.optimizer_for(student.values(), method)
    for s in range(told["steps"]):
        index = stored[f"t{s}.i"]
        level = steps.level(index)
        z = pd.noisy(stored[f"t{s}.x"], stored[f"t{s}.eps"], level)
        predicted = vp.predict(affine(student, z, level), z, level, mean_type=told["mean_type"])
        [x_target] = pd.targets(network, z, index, steps).unbind(1)
        target = vp.predict(x_target, z, level)
        loss = pd.branch_losses(branches(predicted), branches(target), method.weighting).mean()
        optimizer.zero_grad()
        loss.backward()
        stored.check(f"t{s}.loss", loss)
        for name, parameter in student.items():
            stored.check(f"t{s}.grad.{name}", parameter.grad)
        stored.check(f"t{s}.gnorm", pd.clip_gradients(student.values(), method.clip_norm))
        rate = pd.learning_rate(method, s, told["steps"])
        stored.check(f"t{s}.lr", torch.tensor(rate, dtype=torch.float64))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        for name, parameter in student.items():
            stored.check(f"t{s}.param.{name}", parameter)


def affine(student, z, level):
    """The student that the case describes: (z w + b)(1 + alpha g), channel by channel."""
    mixed = torch.einsum("bchw,cd->bdhw", z, student["w"]) + student["b"].reshape(1, -1, 1, 1)
    return mixed * (1 + level.beside(z).alpha * student["g"].reshape(1, -1, 1, 1))
