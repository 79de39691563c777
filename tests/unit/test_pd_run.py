"""Whole runs of progressive distillation, on a network of a few thousand weights."""

import gc
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bdense_core import vp
from bdense_core.branches import with_branches, without_branches
from bdense_core.checkpoints import load_network, save_network
from bdense_core.errors import BadValue, CheckpointError, ShapeMismatch, TrainingDiverged
from bdense_core.evaluation import Metric
from bdense_core.files import HashedFile, sha256_of_file
from bdense_core.loops import pd_targets
from bdense_core.loops.images import Images
from bdense_core.loops.pd_run import Distillation
from bdense_core.loops.teacher import FrozenTeacher
from bdense_core.methods.pd import PD
from bdense_core.networks import Denoiser
from bdense_core.sampling import DDIMSampler, sampler_of
from bdense_core.task import Progress, Score, Task
from bdense_core.weights import endpoint_only, uniform
from tests.sfd import CONFIG as LARGER
from tests.sfd import SHAPE, flat, make_evaluation, network, scores

CONFIG = replace(LARGER, channel_mult=(1,), attn_resolutions=())
"""Small enough for a thousand images a stage."""
METHOD = PD(start_steps=8, nfe=2, batch=250, budget_kimg=2, lr=1e-3, logsnr_min=-8.76, logsnr_max=10.23)
"""Two stages of four iterations; 4 steps, then 2."""
PLAIN = replace(METHOD, num_branches=1)


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory):
    return make_evaluation(tmp_path_factory.mktemp("features"))


@pytest.fixture
def task(tmp_path, evaluation):
    return Task(
        weights=(0.25, 0.75),
        seed=7,
        every_kimg=1,
        teacher=save_network(network(CONFIG), tmp_path / "teacher.safetensors"),
        dataset="digits",
        evaluation=evaluation,
        cache_root=str(tmp_path / "cache"),
    )


def digest(path):
    return sha256_of_file(Path(path))


def written(task):
    """The student of a task, which is run for it."""
    path = task.output
    return load_network(HashedFile(path=path, sha256=digest(path)))


def trained(method, task, iterations):
    """A run after so many iterations, without scores."""
    run = Distillation(method, task)
    for _ in range(iterations):
        list(run.prepare())
        run.advance()
    return run


# --- what a run is --------------------------------------------------------------------------------------


def test_a_run_is_scored_at_the_end_of_each_stage_with_that_stages_steps(task):
    found = scores(METHOD, task)
    assert [(score.kimg, score.done) for score in found] == [(1, 0.5), (2, 1.0)]
    assert found[0].metrics == {"fd@4": found[0].value}
    assert found[1].metrics == {"fd@4": found[0].value, "fd@2": found[1].value}


def test_the_figures_of_all_stages_are_of_all_samples_even_if_early_scores_are_not(task):
    few = replace(task, evaluation=replace(task.evaluation, early_samples=10))
    early, last = scores(METHOD, few)
    expected = scores(METHOD, task)
    assert last.metrics == expected[-1].metrics
    assert last.value == expected[-1].value
    assert early.value != expected[0].value


def test_the_same_seed_gives_the_same_scores_and_another_seed_others(task):
    first = scores(METHOD, task)
    torch.rand(11)
    assert scores(METHOD, task) == first
    assert scores(METHOD, replace(task, cache_root=None)) == first, "with and without a cache"
    assert scores(METHOD, replace(task, seed=8))[-1].value != first[-1].value
    assert scores(METHOD, replace(task, weights=uniform(2)))[-1].value != first[-1].value


def test_each_stages_teacher_is_the_last_ones_student_and_its_optimizer_is_new(task):
    run = trained(METHOD, task, 4)
    student, old = without_branches(run._trainee.student), run._trainee
    list(run.prepare())
    assert run._trainee is not old
    assert torch.equal(flat(run._promoted.full), flat(student))
    assert torch.equal(flat(run._trainee.student), flat(with_branches(student, 2)))
    assert not run._trainee.optimizer.state
    assert not torch.equal(flat(student), flat(load_network(task.teacher)))
    run.advance()
    assert torch.equal(flat(run._promoted.full), flat(student)), "a teacher is not trained"
    assert "network" not in vars(run._teacher), "the first one is not kept beside it"


def test_the_teachers_file_stays_as_it_is(task):
    scores(METHOD, task)
    assert digest(task.teacher.path) == task.teacher.sha256


def test_a_student_is_trained_without_dropout(task, tmp_path):
    """spec/methods.md 2.1, unlike SFD's."""
    dropping = save_network(network(replace(CONFIG, dropout=0.3)), tmp_path / "dropout.safetensors")
    assert scores(METHOD, replace(task, teacher=dropping)) == scores(METHOD, task)


def test_the_rate_begins_anew_in_each_stage(task):
    run, rates = Distillation(METHOD, task), []
    for _ in range(8):
        list(run.prepare())
        run.advance()
        rates.append(run._trainee.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4] * 2)


def test_images_noise_and_steps_are_the_same_for_all_trials_of_a_seed_in_any_batches(task):
    images = Images(task, CONFIG, torch.device("cpu"))
    steps = pd_targets.steps_of(METHOD, 0)
    whole = pd_targets.draw(images, steps, 7, 0, 600)
    part = pd_targets.draw(images, steps, 7, 250, 300)
    assert torch.equal(part.z, whole.z[250:300])
    assert torch.equal(part.index, whole.index[250:300])
    # Four standard errors of a count: 4 sqrt(600 * 3 / 16).
    assert (whole.index.bincount(minlength=4) - 150).abs().max() < 43
    assert not torch.equal(pd_targets.draw(images, steps, 8, 0, 600).z, whole.z)


# --- weights --------------------------------------------------------------------------------------------


def test_a_zero_weight_is_plain_pd_bit_for_bit_through_all_stages(task, tmp_path):
    dense_task = replace(task, weights=endpoint_only(2), output=str(tmp_path / "dense.safetensors"))
    plain_task = replace(task, weights=(1.0,), output=str(tmp_path / "plain.safetensors"))
    assert scores(METHOD, dense_task) == scores(PLAIN, plain_task)
    dense, plain = written(dense_task), written(plain_task)
    assert torch.equal(flat(dense), flat(plain))
    assert not torch.equal(flat(plain), flat(load_network(task.teacher)))


def test_plain_pd_with_gradients_that_are_always_clipped_is_the_same_too(task):
    """The norm that gradients are scaled by must not see idle branches."""
    clipped = {"clip_norm": 1e-3}
    dense = scores(replace(METHOD, **clipped), replace(task, weights=endpoint_only(2)))
    assert dense == scores(replace(PLAIN, **clipped), replace(task, weights=(1.0,)))


def test_an_idle_branch_never_moves(task):
    run = trained(METHOD, replace(task, weights=endpoint_only(2)), 3)
    head = f"{run._trainee.student.head_name}.weight"
    idle, moved = run._trainee.student.get_parameter(head).split(1)
    teacher = load_network(task.teacher).get_parameter(head)
    assert torch.equal(idle, teacher)
    assert not torch.equal(moved, teacher)


def test_a_common_factor_of_the_weights_changes_nothing(task):
    """They are taken relative to their sum, as the limit on gradients would give a factor a meaning."""
    scaled = replace(task, weights=tuple(64 * w for w in task.weights))
    assert scores(METHOD, scaled) == scores(METHOD, task)


def test_a_schedule_of_constant_weights_is_the_run_of_those_and_a_falling_one_is_another(task):
    constant = replace(task, schedule=((task.weights,), (task.weights,)))
    assert scores(METHOD, constant) == scores(METHOD, task)
    falling = replace(task, schedule=((task.weights,), (endpoint_only(2),)))
    assert scores(METHOD, falling)[-1].value != scores(METHOD, task)[-1].value


# --- the teacher alone ----------------------------------------------------------------------------------


def test_the_teacher_alone_scores_as_a_student_that_has_learned_nothing(task):
    alone = replace(METHOD, untrained=True)
    found = scores(alone, task)
    copy = scores(replace(METHOD, lr=1e-30), task)
    assert [score.kimg for score in found] == [1, 2]
    assert found[-1].metrics == pytest.approx(copy[-1].metrics, rel=1e-4)
    assert found[-1].surrogate == pytest.approx(copy[-1].surrogate, rel=1e-4)
    assert scores(alone, replace(task, seed=8)) == found, "no training seed has a part in it"
    assert scores(METHOD, task)[-1].value != found[-1].value


def test_the_teacher_alone_needs_no_data_and_can_be_written_and_told_again(task, tmp_path):
    alone = replace(METHOD, untrained=True)
    kept = replace(task, dataset=None, output=str(tmp_path / "s.safetensors"), snapshots=str(tmp_path / "run"))
    first = scores(alone, kept)
    assert torch.equal(flat(written(kept)), flat(load_network(task.teacher)))
    assert scores(alone, kept) == first


# --- the cache ------------------------------------------------------------------------------------------


def test_trials_share_the_first_stages_targets_whatever_they_do_with_them(task, tmp_path):
    scores(METHOD, task)
    folders = sorted((tmp_path / "cache").iterdir())
    assert len(folders) == 2, "the targets, and the images of the evaluation's noise"
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.glob("shard-*.safetensors")}
    others = replace(METHOD, lr=1e-4, weighting="constant", optimizer="adam", clip_norm=5.0)
    scores(others, replace(task, weights=uniform(2)))
    assert sorted((tmp_path / "cache").iterdir()) == folders
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_images_or_other_steps_have_other_targets(task, tmp_path):
    scores(METHOD, task)
    for other in (replace(METHOD, start_steps=4), replace(METHOD, flip=True), replace(METHOD, logsnr_max=9.0)):
        count = len(list((tmp_path / "cache").iterdir()))
        scores(replace(other, budget_kimg=other.num_stages), task)
        assert len(list((tmp_path / "cache").iterdir())) > count, other


@pytest.mark.parametrize(("kind", "allowed"), [("float16", 2**-11), ("float32", 1e-5)])
def test_kept_targets_lose_only_what_their_type_does(task, kind, allowed):
    """Of v, up to 4 large: half a unit in the last place at 2 to 4 is 2^-10, and sigma < 1 times it of the image."""
    method, device = replace(METHOD, targets=kind), torch.device("cpu")
    images = Images(task, CONFIG, device)
    teacher = FrozenTeacher(task, "float32", device)
    source = pd_targets.FirstTargets(method, task, teacher, images, CONFIG)
    list(source.fill(0, 250))
    batch = pd_targets.draw(images, pd_targets.steps_of(method, 0), task.seed, 0, 250)
    found, exact = source.rows(0, 250, batch), pd_targets.taught(teacher.network, batch, pd_targets.steps_of(method, 0))
    at = batch.level.beside(batch.z[:, None])
    v = vp.predict(exact, batch.z[:, None], batch.level).v.abs().clamp(min=1)
    assert ((found - exact).abs() <= (2 * allowed * v * at.sigma + 1e-5)).all()
    source.close()


def test_a_closed_run_lets_its_networks_go(task):
    """Actors are reused, and Python's collector does not see a GPU's memory: no cycle may keep a network."""

    def networks_after_a_closed_run():
        run = METHOD.run(replace(task, cache_root=None))
        next(event for event in run if isinstance(event, Progress) and event.phase == "train" and event.done > 0.5)
        run.close()
        del run
        return sum(type(found) is Denoiser for found in gc.get_objects())

    networks_after_a_closed_run()  # torch's own first use of meta tensors leaves frames behind
    gc.collect()
    gc.disable()
    try:
        assert networks_after_a_closed_run() == networks_after_a_closed_run() == 0
    finally:
        gc.enable()


# --- data and labels ------------------------------------------------------------------------------------


def test_a_class_conditional_teacher_is_told_the_classes_of_the_images(task, tmp_path):
    conditional = save_network(network(replace(CONFIG, label_dim=10)), tmp_path / "ten.safetensors")
    found = scores(METHOD, replace(task, teacher=conditional))
    assert found == scores(METHOD, replace(task, teacher=conditional))
    run = Distillation(METHOD, replace(task, teacher=conditional))
    batch = pd_targets.draw(run._images, run._steps_of_stage, 7, 0, 100)
    assert batch.labels.sum(1).tolist() == [1.0] * 100
    assert batch.labels.sum(0).gt(0).all()


def test_data_that_do_not_fit_the_teacher_are_refused_before_anything_is_trained(task, tmp_path):
    three = save_network(network(replace(CONFIG, label_dim=3)), tmp_path / "three.safetensors")
    with pytest.raises(BadValue, match="digits has labels 0 to 9, but the network knows 0 to 2"):
        next(METHOD.run(replace(task, teacher=three)))
    with pytest.raises(ShapeMismatch, match=r"digits16 are \[1, 16, 16\]"):
        next(METHOD.run(replace(task, dataset="digits16")))
    with pytest.raises(BadValue, match="set dataset"):
        next(METHOD.run(replace(task, dataset=None)))


def test_a_rule_that_learns_weights_is_refused(task):
    with pytest.raises(BadValue, match="the rule gate learns weights in SFD alone"):
        next(METHOD.run(replace(task, rule="gate")))


def test_a_damaged_teacher_is_named(task, tmp_path):
    broken = load_network(task.teacher)
    with torch.no_grad():
        broken.get_parameter(f"{broken.head_name}.bias")[0] = float("nan")
    teacher = save_network(broken, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match=r"nan\.safetensors gives states that are not finite \(rows 0 to"):
        scores(METHOD, replace(task, teacher=teacher))


def test_a_rate_far_too_large_ends_the_run_with_what_it_was(task):
    with pytest.raises(TrainingDiverged) as caught:
        scores(replace(METHOD, lr=1e35), task)
    assert caught.value.kimg == 0.5


# --- broken off and continued ---------------------------------------------------------------------------


@pytest.mark.parametrize("broken_off_at", [0.1, 0.3, 0.5, 0.6, 0.99])
def test_a_run_that_is_broken_off_ends_as_an_undisturbed_one_bit_for_bit(task, tmp_path, broken_off_at):
    """In the middle of either stage, and between them."""
    task = replace(task, evaluation_seeds=(6, 7), num_shown=3)
    expected = scores(METHOD, replace(task, output=str(tmp_path / "whole.safetensors")))
    resumable = replace(
        task, snapshots=str(tmp_path / "run"), snapshot_every_s=0.0, output=str(tmp_path / "resumed.safetensors")
    )
    begun = METHOD.run(resumable)
    next(event for event in begun if event.done >= broken_off_at)
    begun.close()
    torch.rand(13)
    events = list(METHOD.run(resumable))
    assert [event for event in events if isinstance(event, Score)] == expected
    trained = [event for event in events if isinstance(event, Progress) and event.phase == "train"]
    assert all(event.done >= broken_off_at - 0.13 for event in trained), "it began anew"
    assert digest(tmp_path / "resumed.safetensors") == digest(tmp_path / "whole.safetensors")
    (tmp_path / "resumed.safetensors").unlink()
    assert scores(METHOD, resumable) == expected, "an ended run is only told again"
    assert digest(tmp_path / "resumed.safetensors") == digest(tmp_path / "whole.safetensors")


# --- the written student, precision ---------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_written_student_is_an_ordinary_network_whose_images_are_those_that_were_scored(task, tmp_path, precision):
    task = replace(task, output=str(tmp_path / "student.safetensors"))
    found = scores(replace(METHOD, precision=precision), task)
    student, sampler = written(task), sampler_of(task.output)
    assert student.config == CONFIG
    assert isinstance(sampler, DDIMSampler)
    assert (sampler.nfe, sampler.clip, sampler.precision) == (2, True, precision)
    assert (sampler.sigmas[0], sampler.sigmas[-1]) == (pytest.approx(math.exp(8.76 / 2)), 0)
    value = Metric(task.evaluation)(sampler.bind(student), SHAPE, 0)
    assert value == found[-1].value


def test_half_precision_trains_close_to_single(task, tmp_path):
    found = {}
    for precision in ("float32", "bfloat16"):
        path = tmp_path / f"{precision}.safetensors"
        run = replace(task, output=str(path))
        scores(replace(METHOD, precision=precision), run)
        found[precision] = flat(written(run)) - flat(load_network(task.teacher))
    assert torch.nn.functional.cosine_similarity(found["bfloat16"], found["float32"], dim=0) > 0.5


def test_micro_batches_give_the_gradients_of_the_whole_batch(task, tmp_path):
    found = []
    for rows in (None, 60):
        run = replace(task, output=str(tmp_path / f"{rows}.safetensors"), micro_batch=rows)
        scores(METHOD, run)
        found.append(flat(written(run)))
    start = flat(load_network(task.teacher))
    # Adam turns the rounding noise of a vanishing gradient into whole steps: compare the moves, not each entry.
    assert (found[0] - found[1]).norm() < 0.05 * (found[0] - start).norm()
