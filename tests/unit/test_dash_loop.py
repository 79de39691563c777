import math

import pytest
import torch

from bdense_core import discrete, tirt
from bdense_core.errors import BadValue, CheckpointError, ShapeMismatch, TrainingDiverged, WeightsError
from bdense_core.guidance import noise_predictor
from bdense_core.loops import dash_teacher
from bdense_core.loops.dash import (
    AN,
    IM,
    UN,
    Batch,
    Objective,
    Predictions,
    accumulate,
    guidance_table,
    importance,
    noised,
)
from bdense_core.loops.dash_data import Examples
from bdense_core.loops.dash_gap import gap_metrics, gap_rows
from bdense_core.loops.dash_learner import Learner, cosine_rate
from bdense_core.loops.dash_teacher import TeacherTraining, preset, pretrain
from bdense_core.methods.dash import DASH
from bdense_core.networks import NetworkConfig, build
from bdense_core.snapshots import Snapshots

SCHEDULE = discrete.cosine()
OMEGA = tirt.clipped_snr(SCHEDULE.snr, gamma=5.0).float()
CONFIG = NetworkConfig.ddpm(
    img_resolution=8, img_channels=1, label_dim=3, preconditioning="cosine", model_channels=8, channel_mult=[1, 1],
    num_blocks=1, attn_resolutions=[], norm_groups=4, dropout=0.2,
)  # fmt: skip
CPU = torch.device("cpu")


def network(seed=0):
    """With dropout on, and no layer behind a zero start."""
    torch.manual_seed(seed)
    return build(CONFIG).train()


def a_batch(seed=0, size=6):
    source = torch.Generator().manual_seed(seed)
    clean, noise = torch.rand(2, size, 1, 8, 8, generator=source)
    t = torch.randint(1000, (size,), generator=source)
    return Batch(2 * clean - 1, noise, t, torch.eye(3)[torch.randint(3, (size,), generator=source)])


def gradients(student, weights, *, kind="dash", guidance=None, micro_batch=None, batch=None, teacher=None):
    """Terms and gradients of one batch, with the dropout of a run's first iteration."""
    teacher = teacher or noise_predictor(network(seed=1).eval())
    objective = Objective(weights=weights, omega=OMEGA, kind=kind, guidance=guidance)
    student.zero_grad()
    torch.manual_seed(0)
    terms = accumulate(
        noise_predictor(student), teacher, batch or a_batch(), objective, SCHEDULE, micro_batch=micro_batch
    )
    return terms, {name: p.grad.clone() for name, p in student.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def nobody(x, t, labels):
    raise AssertionError("the teacher was asked")


@pytest.mark.parametrize("without", [AN, UN])
def test_a_term_of_weight_0_is_as_if_it_were_not_there_bit_for_bit(without):
    """Against all predictions made and the term multiplied by 0: dropout's masks are those of the conditional pass."""
    weights = [0.3, 0.7, 1.0]
    weights[without] = 0.0
    student, teacher, batch = network(), noise_predictor(network(seed=1).eval()), a_batch()
    _, found = gradients(student, tuple(weights), batch=batch)
    x = noised(SCHEDULE, batch)
    torch.manual_seed(0)
    mine = Predictions.of(noise_predictor(student), x, batch.t, batch.labels)
    with torch.no_grad():
        theirs = Predictions.of(teacher, x, batch.t, batch.labels)
    errors = Objective(weights=(1.0, 1.0, 1.0), omega=OMEGA).errors(mine, theirs, batch)
    student.zero_grad()
    ((errors * tirt.batch_weights(OMEGA[batch.t])).sum(1) / 6 * torch.tensor(weights)).sum().backward()
    assert same(found, {name: p.grad for name, p in student.named_parameters()})


def test_without_the_unconditional_term_neither_network_is_asked_without_a_class():
    asked = []

    def watched(predict, who):
        def ask(x, t, labels):
            asked.append((who, labels is not None))
            return predict(x, t, labels)

        return ask

    objective = Objective(weights=(0.1, 0.0, 1.0), omega=OMEGA)
    student, teacher = (watched(noise_predictor(network(seed)), who) for seed, who in ((0, "student"), (1, "teacher")))
    accumulate(student, teacher, a_batch(), objective, SCHEDULE)
    assert sorted(asked) == [("student", True), ("teacher", True)]


def test_gradients_of_parts_of_a_batch_add_up_to_those_of_the_whole():
    student = network().eval()  # a mask differs with the shape it is drawn for
    whole_terms, whole = gradients(student, (0.1, 1.0, 1.0))
    parts_terms, parts = gradients(student, (0.1, 1.0, 1.0), micro_batch=4)
    assert torch.allclose(whole_terms, parts_terms, rtol=1e-5)
    assert all(torch.allclose(whole[name], parts[name], rtol=1e-3, atol=1e-6) for name in whole)


def test_scratch_learns_the_true_noise_and_asks_no_teacher():
    student = network()
    terms, found = gradients(student, (0.0, 0.0, 1.0), kind="scratch", teacher=nobody)
    _, anchor = gradients(student, (1.0, 0.0, 0.0), teacher=nobody)
    assert same(found, anchor)
    assert terms[IM] == terms[AN] > 0


def test_scratch_with_a_weight_on_another_term_is_refused():
    with pytest.raises(WeightsError, match="the objective scratch has no terms but im"):
        Objective(weights=(0.1, 0.0, 1.0), omega=OMEGA, kind="scratch")


def test_at_guidance_1_the_composite_is_the_conditional_imitation():
    student = network().eval()
    dash, composite = (
        gradients(student, (0.0, 0.0, 1.0), kind=kind, guidance=torch.ones(1000)) for kind in ("dash", "composite")
    )
    assert composite[0][IM].item() == pytest.approx(dash[0][IM].item(), rel=1e-5)
    assert all(torch.allclose(dash[1][name], composite[1][name], rtol=1e-3, atol=1e-6) for name in dash[1])


def test_at_guidance_0_the_composite_is_the_unconditional_term():
    student = network().eval()
    terms, found = gradients(student, (0.0, 0.0, 1.0), kind="composite", guidance=torch.zeros(1000))
    dash_terms, dash = gradients(student, (0.0, 1.0, 0.0))
    assert terms[IM].item() == pytest.approx(dash_terms[UN].item(), rel=1e-5)
    assert all(torch.allclose(dash[name], found[name], rtol=1e-3, atol=1e-6) for name in dash)


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e3])
def test_a_common_factor_of_all_weights_leaves_adamw_where_it_was(factor):
    """Without a limit on the gradient. What is left is rounding, and Adam's epsilon."""
    moved = []
    for scale in (1.0, factor):
        learner = Learner(network(), lr=1e-3, weight_decay=0.01, ema=0.5, grad_clip=math.inf)
        start = torch.cat([p.detach().flatten() for p in learner.network.parameters()])
        for index in range(5):
            gradients(learner.network, tuple(scale * w for w in (0.1, 1.0, 1.0)), batch=a_batch(index))
            learner.step(1e-3)
        moved.append(torch.cat([p.detach().flatten() for p in learner.network.parameters()]) - start)
    assert (moved[0] - moved[1]).norm() < 0.02 * moved[0].norm()


def test_the_gradient_is_limited_and_the_average_follows():
    learner = Learner(torch.nn.Linear(2, 1, bias=False), lr=0.1, weight_decay=0.0, ema=0.75, grad_clip=1.0)
    before = learner.network.weight.detach().clone()
    learner.network.weight.grad = torch.tensor([[3.0, 4.0]])
    assert learner.step(0.1).item() == 5.0
    after = learner.network.weight.detach()
    moment = learner.optimizer.state[learner.network.weight]["exp_avg"]
    assert moment[0].tolist() == pytest.approx([0.06, 0.08], rel=1e-5)  # a tenth of (3, 4) / 5
    assert (after - before)[0].tolist() == pytest.approx([-0.1, -0.1], rel=1e-4)
    assert torch.allclose(learner.average.weight, 0.75 * before + 0.25 * after)


def test_a_learner_goes_on_from_its_state_bit_for_bit():
    def new(seed):
        logits = torch.nn.Parameter(torch.zeros(3))
        return logits, Learner(network(seed), lr=1e-3, weight_decay=0.01, ema=0.9, grad_clip=1.0, logits=logits)

    def train(logits, learner, batches):
        for index in batches:
            gradients(learner.network, (0.1, 1.0, 1.0), batch=a_batch(index))
            logits.grad = logits.detach() + index
            learner.step(1e-3)

    whole, first, second = new(0), new(0), new(5)
    train(*whole, range(4))
    train(*first, range(2))
    second[1].restore({name: tensor.clone() for name, tensor in first[1].state().items()})
    train(*second, range(2, 4))
    ended, resumed = whole[1].state(), second[1].state()
    assert ended.keys() == resumed.keys()
    assert same(ended, resumed)


def test_another_network_s_state_is_one_line():
    small = Learner(torch.nn.Linear(2, 1), lr=0.1, weight_decay=0.0, ema=0.5, grad_clip=1.0)
    large = Learner(torch.nn.Linear(3, 1), lr=0.1, weight_decay=0.0, ema=0.5, grad_clip=1.0)
    with pytest.raises(CheckpointError, match="the snapshot is another network's"):
        large.restore(small.state())


def test_the_learning_rate_falls_by_half_a_cosine_over_the_epochs():
    rates = [cosine_rate(1e-3, 1e-5, epoch, 4) for epoch in range(5)]
    assert rates[0] == 1e-3
    assert rates[2] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[4] == pytest.approx(1e-5)
    assert rates == sorted(rates, reverse=True)


# --- curricula


def test_a_student_takes_its_teacher_s_curriculum_over():
    logits = [(-1) ** t * t / 500 for t in range(1000)]
    found = importance(DASH(curriculum="tirt", gamma=3.0, tau=5.0), SCHEDULE, logits)
    by_hand = [min(float(SCHEDULE.snr[t]), 3.0) / (1 + math.exp(-logits[t])) for t in (0, 333, 700, 999)]
    assert found[[0, 333, 700, 999]].tolist() == pytest.approx(by_hand, rel=1e-5)
    tempered = importance(DASH(curriculum="tirt_tempered", gamma=3.0, tau=5.0), SCHEDULE, logits)
    by_hand = [min(float(SCHEDULE.snr[t]), 3.0) / (1 + math.exp(-logits[t] / 5)) for t in (0, 333, 700, 999)]
    assert tempered[[0, 333, 700, 999]].tolist() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("curriculum", ["uniform", "min_snr", "clipped_snr"])
def test_other_curricula_need_no_teacher_that_has_learned_one(curriculum):
    assert importance(DASH(curriculum=curriculum), SCHEDULE, None).shape == (1000,)


@pytest.mark.parametrize(("logits", "found"), [(None, "none"), ([0.0] * 10, "10 logits")])
def test_a_teacher_without_a_curriculum_has_none_to_take_over(logits, found):
    with pytest.raises(BadValue, match=f"method.curriculum is tirt, but the teacher has {found} of the 1000"):
        importance(DASH(), SCHEDULE, logits)


def test_guidance_in_the_composite_is_that_of_sampling():
    table = guidance_table(DASH(guidance=4.0, tag=True), 1000)
    assert table[[0, 980]].tolist() == pytest.approx([3.77, 1.25], abs=0.005)
    assert guidance_table(DASH(guidance=2.5, tag=False), 1000).unique().tolist() == [2.5]


# --- the guidance gap


def test_a_student_that_is_its_teacher_keeps_the_whole_gap():
    cond, null = torch.randn(2, 5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = gap_metrics(gap_rows(Predictions(cond, null), Predictions(cond, null)))
    assert found == pytest.approx({"rho": 1.0, "cos": 1.0, "gap_mse": 0.0}, abs=1e-6)


def test_half_a_gap_is_half_of_rho_and_one_that_points_back_has_a_cosine_of_minus_1():
    cond, null = torch.randn(2, 5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = gap_metrics(gap_rows(Predictions(null + (null - cond) / 2, null), Predictions(cond, null)))
    assert found["rho"] == pytest.approx(0.5)
    assert found["cos"] == pytest.approx(-1.0)
    assert found["gap_mse"] == pytest.approx(2.25 * (cond - null).square().mean().item(), rel=1e-5)


# --- the data


def images(count=40, classes=3):
    source = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 1, 8, 8), generator=source) / 127.5 - 1, torch.arange(count) % classes


def examples(count=40, held_out=0.25):
    return Examples(*images(count), CONFIG, held_out=held_out, device=CPU)


def rows_of(batch):
    """Which images a batch holds."""
    every = images()[0]
    return [next(i for i, image in enumerate(every) if torch.allclose(image, clean)) for clean in batch.clean]


def test_an_epoch_goes_once_through_all_images_that_are_not_held_out():
    data = examples()
    seen = [row for iteration in range(9) for row in rows_of(data.batch(0, iteration, size=10, num_times=1000))]
    epochs = [seen[first : first + 30] for first in (0, 30, 60)]
    trained = sorted(epochs[0])
    assert len(set(trained)) == 30
    assert [sorted(epoch) for epoch in epochs] == [trained] * 3
    assert epochs[0] != epochs[1]
    assert [data.epoch(count) for count in (0, 29, 30, 89)] == [0, 0, 1, 2]
    held = {row for batch in data.pairs(0, 300, num_times=1000) for row in rows_of(batch)}
    assert held == set(range(40)) - set(trained)


def test_a_batch_follows_from_seed_and_iteration_alone():
    late = examples().batch(3, 7, size=10, num_times=1000)
    data = examples()
    data.batch(3, 0, size=10, num_times=1000)
    again, other = (data.batch(seed, 7, size=10, num_times=1000) for seed in (3, 4))
    for name in ("clean", "noise", "t", "labels"):
        assert torch.equal(getattr(late, name), getattr(again, name))
    assert not torch.equal(late.noise, other.noise)
    assert not torch.equal(late.clean, other.clean)


def test_pairs_are_as_many_as_asked_and_the_first_of_more():
    few, many = (examples().pairs(1, count, num_times=1000) for count in (100, 600))
    assert [len(batch) for batch in few + many] == [100, 256, 256, 88]
    assert torch.equal(few[0].noise, many[0].noise[:100])


def test_classes_stay_with_their_images():
    batch = examples().batch(0, 0, size=10, num_times=1000)
    assert [row % 3 for row in rows_of(batch)] == batch.labels.argmax(1).tolist()


@pytest.mark.parametrize(
    ("of", "label_dim", "held_out", "error", "says"),
    [
        (images(classes=5), 3, 0.1, BadValue, "labels 0 to 4, but the network knows 0 to 2"),
        ((torch.zeros(4, 3, 8, 8), torch.zeros(4).long()), 3, 0.1, ShapeMismatch, r"\[3, 8, 8\]"),
        ((torch.zeros(4, 1, 8, 8), torch.zeros(3).long()), 3, 0.1, ShapeMismatch, "there are 4 images"),
        (images(), 0, 0.1, BadValue, "knows no classes"),
        (images(1), 3, 0.9, BadValue, "leaves none to train on"),
    ],
)
def test_data_that_do_not_fit_the_network_are_one_line(of, label_dim, held_out, error, says):
    config = NetworkConfig.from_dict(CONFIG.to_dict() | {"label_dim": label_dim})
    with pytest.raises(error, match=says):
        Examples(*of, config, held_out=held_out, device=CPU)


# --- a teacher's training

SHORT = TeacherTraining(budget_kimg=0.08, batch=8, lr=1e-2, ema=0.5)


def train_teacher(settings=SHORT, snapshots=None, stop_after=None):
    """The teacher, or None if the training is broken off after so many signs of life."""
    training = pretrain(*images(), CONFIG, settings, snapshots=snapshots)
    for index in range(1000):
        try:
            next(training)
        except StopIteration as end:
            return end.value
        if index + 1 == stop_after:
            training.close()
            return None
    raise AssertionError("a training without end")


def test_a_teacher_learns_its_curriculum_with_its_weights():
    teacher = train_teacher()
    assert len(teacher.tirt) == 1000
    assert sum(value != 0 for value in teacher.tirt) >= 60  # 80 timesteps were drawn
    assert max(abs(value) for value in teacher.tirt) > 1e-3
    assert not any(p.requires_grad for p in teacher.network.parameters())


def test_a_teacher_s_training_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(dash_teacher, "_SNAPSHOT_EVERY_S", -1.0)  # after each iteration
    snapshots = Snapshots(tmp_path, identity={"settings": SHORT.to_dict()})
    assert train_teacher(snapshots=snapshots, stop_after=1) is None
    found = snapshots.latest()
    assert 0 < found.step < SHORT.num_iterations
    resumed, whole = train_teacher(snapshots=snapshots), train_teacher()
    assert resumed.tirt == whole.tirt
    assert same(resumed.network.state_dict(), whole.network.state_dict())


def test_a_teacher_s_loss_that_is_not_finite_is_one_line():
    with pytest.raises(TrainingDiverged, match="the loss is not finite"):
        train_teacher(TeacherTraining(budget_kimg=4, batch=8, lr=1e30))


def test_unusable_settings_of_a_teacher_are_one_line():
    with pytest.raises(BadValue, match="the teacher's lr is 0"):
        TeacherTraining(lr=0)


@pytest.mark.parametrize(("classes", "parameters"), [(10, 35_751_939), (100, 35_798_019)])
def test_the_preset_at_32x32_is_the_authors_teacher(classes, parameters):
    """Their counts (spec/methods.md 3)."""
    config = preset(torch.empty(1, 3, 32, 32), classes, 128)
    with torch.device("meta"):
        assert sum(p.numel() for p in build(config).parameters()) == parameters
    assert config.label_dropout == 0.1


def test_the_preset_of_small_images_is_small():
    config = preset(torch.empty(1, 1, 8, 8), 10, 32)
    with torch.device("meta"):
        assert sum(p.numel() for p in build(config).parameters()) < 300_000
