"""What comes with a score: the surrogate, further evaluation seeds, images to look at, fewer samples early on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bdense_core.checkpoints import load_network, save_network
from bdense_core.evaluation import Metric
from bdense_core.files import HashedFile, sha256_of_file
from bdense_core.images import read_image
from bdense_core.loops import scoring, sfd_targets
from bdense_core.loops.sfd_run import Distillation
from bdense_core.methods.sfd import SFD
from bdense_core.sampling import draw, sampler_of, teacher_sampler
from bdense_core.seeds import evaluation_rows
from bdense_core.task import Task
from tests.sfd import CONFIG, SHAPE, make_evaluation, network, scores

SHORT = SFD(nfe=1, num_branches=2, lr=1e-3, batch=50, budget_kimg=0.1)
LONG = replace(SHORT, batch=250, budget_kimg=1.25)
"""Scored twice."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(sfd_targets, "SHARD_ROWS", 32)


@pytest.fixture
def task(tmp_path):
    return Task(
        weights=(0.4, 0.6),
        seed=7,
        every_kimg=1,
        teacher=save_network(network(replace(CONFIG, dropout=0.2)), tmp_path / "teacher.safetensors"),
        evaluation=make_evaluation(tmp_path, batch=15),
        cache_root=str(tmp_path / "cache"),
        output=str(tmp_path / "student.safetensors"),
    )


def written(task):
    """The student of a task and how it samples."""
    path = Path(task.output)
    return load_network(HashedFile(path=str(path), sha256=sha256_of_file(path))).eval(), sampler_of(str(path))


@pytest.mark.parametrize("label_dim", [0, 3])
def test_the_surrogate_is_the_mean_difference_of_the_students_and_the_teachers_images(task, tmp_path, label_dim):
    """Both sampled from their files, the teacher with as many steps as its trajectories have."""
    config = replace(CONFIG, label_dim=label_dim)
    task = replace(task, teacher=save_network(network(config), tmp_path / "conditional.safetensors"))
    score = scores(SHORT, task)[-1]
    student, sampler = written(task)
    teacher, walk = load_network(task.teacher).eval(), teacher_sampler("dpmpp", 2 * (SHORT.nfe + 1))
    noise, labels = evaluation_rows(task.evaluation.seed, 0, 40, SHAPE, label_dim)
    difference = sampler(sampler.prepare(student), noise, labels) - walk(walk.prepare(teacher), noise, labels)
    assert score.surrogate == pytest.approx(float(difference.abs().mean()), rel=1e-5)


def test_no_more_than_256_images_are_compared(task, monkeypatch):
    """Here 10, which end in the middle of no batch and begin at the first image."""
    monkeypatch.setattr(scoring, "NUM_COMPARED", 10)
    few = scores(SHORT, task)[-1]
    short = make_evaluation(Path(task.output).parent, n_samples=10)
    assert few.surrogate == scores(SHORT, replace(task, evaluation=short))[-1].surrogate
    assert few.value != scores(SHORT, replace(task, evaluation=short))[-1].value


def test_further_evaluations_are_the_same_student_on_other_noise_and_change_no_score(task):
    alone = scores(LONG, task)
    *early, last = scores(LONG, replace(task, evaluation_seeds=(6, 9), num_shown=4))
    assert [*early, replace(last, evaluations=(), samples=None)] == alone
    student, sampler = written(task)
    prepared = sampler.prepare(student)
    expected = [
        Metric(replace(task.evaluation, seed=seed))(lambda z, y: sampler(prepared, z, y), SHAPE, 0) for seed in (6, 9)
    ]
    assert last.evaluations == tuple(expected)


def test_early_scores_take_the_first_of_the_images_and_the_last_one_all(task):
    whole, few = scores(LONG, task), scores(LONG, replace(task, evaluation=replace(task.evaluation, n_samples=20)))
    found = scores(LONG, replace(task, evaluation=replace(task.evaluation, early_samples=20)))
    assert [score.value for score in found] == [few[0].value, whole[1].value]
    assert whole[0].value != few[0].value


def test_the_shown_images_are_the_students_above_the_teachers_large_enough_to_see(task):
    score = scores(SHORT, replace(task, num_shown=3))[-1]
    grid = read_image(score.samples, "samples")
    assert grid.shape == (1, 2 * 34, 3 * 34)  # a white pixel around each
    student, sampler = written(task)
    teacher, walk = load_network(task.teacher).eval(), teacher_sampler("dpmpp", 4)
    seed = task.evaluation.seed
    rows = [next(draw(network, by, count=3, seed=seed)) for network, by in ((student, sampler), (teacher, walk))]
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            cell = grid[:, 34 * row + 1 : 34 * row + 33, 34 * column + 1 : 34 * column + 33]
            # The teacher's solver and its sampler round differently: a grey level, where one is on the edge.
            assert (cell[:, ::4, ::4].int() - image.int()).abs().max() <= 1
            assert torch.equal(cell, cell[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert not torch.equal(rows[0], rows[1])


def test_with_full_caches_the_teacher_is_never_loaded(task):
    scores(SHORT, task)
    again = Distillation(SHORT, task)
    with again.targets as targets:
        while not again.ended:
            list(again.prepare())
            again.advance()
        list(again.score())
        assert again.scores[0].surrogate is not None
        assert "_network" not in vars(targets.teacher)


def test_repeats_add_their_scores_and_take_nothing_from_what_the_run_itself_carries(task):
    task = replace(task, num_shown=2, evaluation_seeds=(6,))
    repeated, alone = scores(SHORT, task, repeats=(8,))[-1], scores(SHORT, task)[-1]
    other = scores(SHORT, replace(task, seed=8))
    assert repeated == replace(alone, repeats=tuple((8, score.kimg, score.value) for score in other))
