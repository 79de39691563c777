"""The invariants of SFD and B-DENSE (spec/methods.md, section 4), on networks of a few thousand weights."""

import gc
from dataclasses import replace

import pytest
import torch

from bdense_core.branches import with_branches, without_branches
from bdense_core.checkpoints import load_network, save_network
from bdense_core.distill import distill
from bdense_core.errors import BadValue, CheckpointError, ShapeMismatch, TrainingDiverged, WeightsError
from bdense_core.evaluation import Metric
from bdense_core.files import HashedFile, sha256_of_file
from bdense_core.integrity import read_metadata
from bdense_core.loops import sfd, sfd_targets
from bdense_core.networks import Denoiser
from bdense_core.precision import HalfDenoiser, Trainee, in_precision
from bdense_core.sampling import sampler_of
from bdense_core.task import Progress, Score, Task
from bdense_core.weights import endpoint_only, uniform
from tests.sfd import CONFIG, METHOD, SHAPE, flat, make_evaluation, network, scores


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """The teacher walks whole shards; these runs need a dozen rows."""
    monkeypatch.setattr(sfd_targets, "SHARD_ROWS", 32)


def train(teacher, method, weights, *, iterations=3, optimizer=None, seed=0, prepare=None):
    """A student after some iterations, and the unweighted losses [I, J', K]."""
    student = with_branches(teacher, method.num_branches).requires_grad_(True).train()
    optimizer = sfd.adam(student, method) if optimizer is None else optimizer(student.parameters())
    grid, losses = sfd.make_grid(method), []
    for change in prepare or ():
        change(student)
    trainee = Trainee(student, optimizer, method.precision)
    for iteration in range(iterations):
        rows = iteration * method.batch, (iteration + 1) * method.batch
        noise = sfd.latents(seed, *rows, SHAPE)
        labels = sfd.uniform_labels(seed, *rows, teacher.config.label_dim)
        targets = sfd.teacher_states(teacher, noise, grid, labels)[:, grid.first_trained :]
        steps = sfd.train_intervals(
            trainee,
            sfd.first_states(noise, grid),
            targets,
            weights=torch.tensor(weights),
            grid=grid,
            labels=labels,
        )
        losses.append(torch.stack([terms for terms, _ in steps]))
    return student, torch.stack(losses), optimizer


def count_calls(denoiser):
    calls = []
    denoiser.model.register_forward_hook(lambda *_: calls.append(1))
    return calls


# --- the branches ---------------------------------------------------------------------------------------


def test_at_initialisation_every_head_equals_the_teacher():
    teacher = network()
    student = with_branches(teacher, 4)
    x, t = torch.randn(3, *SHAPE), torch.tensor(2.0)
    branches = student.branches(x, t)
    assert branches.shape == (3, 4, *SHAPE)
    for k in range(4):
        assert torch.equal(branches[:, k], teacher(x, t))


def test_endpoint_only_with_four_branches_equals_plain_sfd_bit_for_bit():
    """K = 1 and auxiliary weights of exactly 0 are the same run, and the idle heads never move."""
    teacher = network()
    dense, dense_losses, _ = train(teacher, METHOD, endpoint_only(4))
    plain, plain_losses, _ = train(teacher, replace(METHOD, num_branches=1, teacher_steps=4), (1.0,))
    assert torch.equal(dense_losses[..., -1], plain_losses[..., 0])
    state, expected = without_branches(dense).state_dict(), plain.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    assert not torch.equal(expected[f"{plain.head_name}.weight"], teacher.get_parameter(f"{plain.head_name}.weight"))
    for kind in ("weight", "bias"):
        taught = teacher.get_parameter(f"{teacher.head_name}.{kind}")
        for group in dense.get_parameter(f"{dense.head_name}.{kind}").split(1)[:-1]:
            assert torch.equal(group, taught)


def test_a_branch_moves_only_if_its_weight_is_positive():
    teacher = network()
    student, _, _ = train(teacher, METHOD, (0.0, 0.5, 0.0, 1.0))
    taught = teacher.get_parameter(f"{teacher.head_name}.weight")
    groups = student.get_parameter(f"{student.head_name}.weight").split(1)
    assert [torch.equal(group, taught) for group in groups] == [True, False, True, False]


def test_an_interval_is_trained_with_its_own_weights():
    """Losses are from before each step: weights of the second interval can show in the next iteration only."""
    teacher, plain, dense = network(), endpoint_only(4), uniform(4)
    _, expected, _ = train(teacher, METHOD, plain)
    _, first, _ = train(teacher, METHOD, (dense, plain))
    _, second, _ = train(teacher, METHOD, (plain, dense))
    assert torch.equal(first[0, 0], expected[0, 0])
    assert not torch.equal(first[0, 1], expected[0, 1])
    assert torch.equal(second[0], expected[0])
    assert not torch.equal(second[1], expected[1])


def test_gradients_that_are_not_finite_are_repaired_as_the_authors_do():
    """NaN counts as 0 and infinity as 1e5: the first stays where it was, the second makes one Adam step."""

    def spoil(student):
        student.get_parameter("model.map_layer0.bias").register_hook(lambda g: g * float("nan"))
        student.get_parameter("model.map_layer1.bias").register_hook(lambda g: g.abs() / 0)

    teacher, method = network(), replace(METHOD, nfe=1)
    student, _, _ = train(teacher, method, uniform(4), iterations=1, prepare=[spoil])
    moved = {n: student.get_parameter(n) - teacher.get_parameter(n) for n in dict(teacher.named_parameters())}
    assert not moved["model.map_layer0.bias"].any()
    assert torch.allclose(moved["model.map_layer1.bias"], torch.tensor(-method.lr), rtol=1e-3)


def test_a_common_factor_of_the_weights_cancels_in_adam():
    """A power of 2 scales gradients without rounding; with an eps far below them nothing else is left."""
    weights = (0.1, 0.2, 0.3, 0.4)

    def optimizer(parameters):
        return torch.optim.Adam(parameters, lr=METHOD.lr, eps=1e-30)

    one, _, _ = train(network(), METHOD, weights, optimizer=optimizer)
    other, _, _ = train(network(), METHOD, tuple(64 * w for w in weights), optimizer=optimizer)
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_common_factor_leaves_a_run_with_the_shipped_optimizer_to_its_eps():
    """eps 1e-8 damps the entries whose gradients are near it, here in the attention, and nothing else.

    Measured: 64 times the weights change 1.6% of the move; 3% is allowed. Other shares change far more.
    """
    teacher, weights = network(), (0.1, 0.2, 0.3, 0.4)
    runs = [weights, tuple(64 * w for w in weights), weights[::-1]]
    one, scaled, other = (flat(train(teacher, METHOD, w)[0]) for w in runs)
    move = (one - flat(with_branches(teacher, 4))).norm()
    assert (one - scaled).norm() < 0.03 * move
    assert (one - other).norm() > 0.3 * move


def test_students_and_targets_of_another_number_of_branches_are_refused():
    with pytest.raises(ShapeMismatch, match=r"\[2, 4, 1, 8, 8\].*\[2, 3, 1, 8, 8\]"):
        sfd.branch_losses(torch.zeros(2, 4, *SHAPE), torch.zeros(2, 3, *SHAPE))


# --- grids and the analytic first step ------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [1, 2, 3, 5])
def test_sampling_calls_the_network_exactly_nfe_times(nfe):
    student = network()
    calls = count_calls(student)
    sfd.sample(student, torch.randn(2, *SHAPE), sfd.make_grid(replace(METHOD, nfe=nfe)))
    assert len(calls) == nfe


@pytest.mark.parametrize("nfe", [1, 2, 3])
def test_the_analytic_first_step_costs_no_call_and_trains_nothing(nfe):
    teacher, method = network(), replace(METHOD, nfe=nfe)
    calls = count_calls(teacher)
    student, losses, optimizer = train(teacher, method, uniform(4), iterations=1)
    assert len(calls) == 4 * (nfe + 1)  # the teacher walks all intervals
    assert losses.shape == (1, nfe, 4)
    assert {int(state["step"]) for state in optimizer.state.values()} == {nfe}
    trained = count_calls(student)
    grid = sfd.make_grid(method)
    noise = torch.randn(2, *SHAPE)
    x = sfd.first_states(noise, grid)
    assert trained == []
    # By hand: x + (t1 - t0) x / sqrt(1 + t0^2) with x = 80 z.
    factor = 80 + (float(grid.student[1]) - 80) * 80 / (1 + 80**2) ** 0.5
    assert torch.allclose(x, factor * noise, rtol=1e-5)


def test_training_begins_where_sampling_arrives_after_its_analytic_step():
    """One interval after the analytic step: the sampler's image is the student's endpoint, up to rounding."""
    student, grid = network(), sfd.make_grid(replace(METHOD, nfe=1))
    noise = torch.randn(3, *SHAPE)
    with torch.no_grad():
        states = sfd.branch_states(student, sfd.first_states(noise, grid), grid.student[1], grid.inner[1, -1:])
    # States near 40 are divided by t and multiplied again: some units in their last place, 4e-6 each.
    assert torch.allclose(states[:, -1], sfd.sample(student, noise, grid), atol=5e-5)


@pytest.mark.parametrize(("num_branches", "teacher_steps"), [(1, 1), (1, 4), (2, 4), (4, 4), (3, 6)])
def test_every_branch_has_its_own_time_and_the_last_the_students(num_branches, teacher_steps):
    grid = sfd.make_grid(replace(METHOD, num_branches=num_branches, teacher_steps=teacher_steps))
    stride = teacher_steps // num_branches
    assert grid.inner.shape == (3, num_branches)
    assert grid.inner.flatten().tolist() == grid.teacher[stride::stride].tolist()
    assert grid.inner[:, -1].tolist() == grid.student[1:].tolist()


def test_without_the_analytic_step_the_first_interval_trains():
    grid = sfd.make_grid(METHOD, num_steps=3, afs=False)
    noise = torch.randn(2, *SHAPE)
    assert (grid.first_trained, grid.num_intervals) == (0, 2)
    assert torch.equal(sfd.first_states(noise, grid), 80.0 * noise)
    student = network()
    calls = count_calls(student)
    sfd.sample(student, noise, grid)
    assert len(calls) == 2


# --- noise and labels -----------------------------------------------------------------------------------

RANGES = [(0, 1), (5, 9), (1000, 1030), (1023, 1025), (1024, 1025), (2047, 2500), (0, 2500)]


@pytest.mark.parametrize(("first", "end"), RANGES)
def test_rows_of_noise_and_labels_do_not_depend_on_the_range_asked_for(first, end):
    assert torch.equal(sfd.latents(3, first, end, (2, 3)), sfd.latents(3, 0, 3000, (2, 3))[first:end])
    labels = sfd.uniform_labels(3, first, end, 5)
    assert torch.equal(labels, sfd.uniform_labels(3, 0, 3000, 5)[first:end])


def test_noise_is_standard_normal_and_labels_are_uniform_and_seeds_differ():
    noise, labels = sfd.latents(3, 0, 4000, (4, 4)), sfd.uniform_labels(3, 0, 4000, 4)
    # Four standard errors: 4 / sqrt(64000) for the mean, 4 sqrt(4000 * 3 / 16) for a count.
    assert abs(float(noise.mean())) < 0.016
    assert abs(float(noise.std()) - 1) < 0.012
    assert labels.sum(1).eq(1).all()
    assert (labels.sum(0) - 1000).abs().max() < 110
    assert not torch.equal(noise[:1024], noise[1024:2048])
    assert not torch.equal(noise[:8], sfd.latents(4, 0, 8, (4, 4)))
    assert sfd.uniform_labels(3, 0, 10, 0) is None


def test_the_rate_falls_to_a_tenth_after_half_of_the_budget():
    """The README's case: 8 iterations of 4 in a budget of 32; iterations 6, 7 and 8 are slow."""
    method = replace(METHOD, lr=5e-5, batch=4, budget_kimg=0.032)
    rates = [sfd.learning_rate(method, iteration) for iteration in range(8)]
    assert rates == [5e-5] * 5 + [5e-5 / 10] * 3


# --- whole runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory):
    return make_evaluation(tmp_path_factory.mktemp("features"))


@pytest.fixture
def task(tmp_path, evaluation):
    teacher = save_network(network(replace(CONFIG, dropout=0.2)), tmp_path / "teacher.safetensors")
    return Task(
        weights=(0.1, 0.2, 0.3, 0.4),
        seed=7,
        every_kimg=1,
        teacher=teacher,
        evaluation=evaluation,
        cache_root=str(tmp_path / "cache"),
    )


def test_the_same_seed_gives_the_same_score_and_another_seed_another(task, tmp_path):
    """Dropout included, and whether or not the teacher cache was there before."""
    first = scores(METHOD, task)
    torch.rand(11)
    assert scores(METHOD, task) == first
    assert scores(METHOD, replace(task, cache_root=str(tmp_path / "empty"))) == first
    assert scores(METHOD, replace(task, seed=8))[-1].value != first[-1].value
    assert scores(METHOD, replace(task, weights=uniform(4)))[-1].value != first[-1].value


def test_a_student_trains_with_dropout_and_is_scored_without(task, tmp_path):
    """spec/methods.md 1.5. The teacher's own states are without dropout, whatever its configuration says."""
    without = save_network(network(), tmp_path / "no-dropout.safetensors")
    assert scores(METHOD, replace(task, teacher=without)) != scores(METHOD, task)
    untrained = replace(METHOD, lr=1e-30)
    assert scores(untrained, replace(task, teacher=without)) == scores(untrained, task)


def test_a_whole_endpoint_only_run_scores_exactly_as_plain_sfd(task):
    dense = scores(METHOD, replace(task, weights=endpoint_only(4)))
    plain = scores(replace(METHOD, num_branches=1, teacher_steps=4), replace(task, weights=(1.0,)))
    assert dense == plain


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_constant_schedule_is_the_run_of_its_weights_bit_for_bit(task, times):
    constant = replace(task, schedule=((task.weights,),) * times)
    assert scores(METHOD, constant) == scores(METHOD, task)


def test_a_schedule_without_auxiliary_weights_is_plain_sfd_bit_for_bit(task):
    schedule = (((0.0, 0.0, 0.0, 1.0),), (endpoint_only(4), endpoint_only(4)))
    dense = scores(METHOD, replace(task, schedule=schedule))
    assert dense == scores(replace(METHOD, num_branches=1, teacher_steps=4), replace(task, weights=(1.0,)))


def test_a_schedule_begins_with_its_first_weights_and_goes_on_to_its_last(task):
    """One iteration knows the first alone; the more there are the more the last ones count."""
    annealed = replace(task, schedule=((uniform(4),), (endpoint_only(4),)))
    short = replace(METHOD, budget_kimg=0.004)
    assert scores(short, annealed) == scores(short, replace(task, weights=uniform(4)))
    found = scores(METHOD, annealed)[-1].value
    assert found not in [scores(METHOD, replace(task, weights=w))[-1].value for w in (uniform(4), endpoint_only(4))]


def test_a_schedule_of_another_shape_is_refused_before_anything_is_trained(task):
    wrong = replace(task, schedule=((uniform(4),), (uniform(4),) * 3))
    with pytest.raises(
        WeightsError, match=r"rows of \[4, 4, 4\] weights, but the student has 2 trained intervals of 4"
    ):
        next(METHOD.run(wrong))


def test_a_class_conditional_run_draws_labels(task, tmp_path):
    config = replace(CONFIG, label_dim=3)
    teacher = save_network(network(config), tmp_path / "conditional.safetensors")
    found = scores(METHOD, replace(task, teacher=teacher))
    assert found == scores(METHOD, replace(task, teacher=teacher))
    assert len(found) == 1


def test_trials_with_other_weights_share_one_cache(task, tmp_path):
    scores(METHOD, task)
    folders = sorted((tmp_path / "cache").iterdir())
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.glob("shard-*.safetensors")}
    assert (len(folders), len(before)) == (2, 2), "the targets, and the endpoints of the evaluation's noise"
    scores(replace(METHOD, lr=1e-4), replace(task, weights=uniform(4)))
    assert sorted((tmp_path / "cache").iterdir()) == folders
    assert {path: path.stat().st_mtime_ns for path in before} == before
    scores(METHOD, replace(task, seed=8))
    assert len(list((tmp_path / "cache").iterdir())) == 3, "the endpoints are those of any training seed"


def test_studies_that_cut_one_teacher_grid_differently_do_not_share_targets(task, tmp_path):
    """NFE 1 with six steps an interval, NFE 2 with four and NFE 5 with two: 13 points each, and the same endpoints."""
    alone = scores(replace(METHOD, num_branches=2, teacher_steps=4), replace(task, weights=(0.5, 0.5)))
    shared = replace(task, weights=(0.5, 0.5), cache_root=str(tmp_path / "shared"))
    scores(replace(METHOD, nfe=1, num_branches=2, teacher_steps=6), shared)
    scores(replace(METHOD, nfe=5, num_branches=2), shared)
    assert scores(replace(METHOD, num_branches=2, teacher_steps=4), shared) == alone
    assert len(list((tmp_path / "shared").iterdir())) == 4


def test_a_closed_run_lets_its_teacher_go(task):
    """Actors are reused, and Python's collector does not see a GPU's memory: no cycle may keep the network."""

    def networks_after_a_closed_run():
        run = METHOD.run(replace(task, cache_root=None))
        next(event for event in run if event.phase == "train")
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


def test_a_run_ends_with_the_score_of_its_whole_budget_whatever_the_batch(task):
    """Batches of 1500 pass 1 and then 2 and 3 kimg."""
    method = replace(METHOD, nfe=1, num_branches=1, batch=1500, budget_kimg=3)
    found = scores(method, replace(task, weights=(1.0,)))
    assert [score.kimg for score in found] == [1, 3]
    assert [score.done for score in found] == [0.5, 1.0]


def test_signs_of_life_come_before_the_first_score_and_never_run_backwards(task):
    events = list(distill(METHOD, task))
    phases = [event.phase for event in events if isinstance(event, Progress)]
    assert [phase for phase, before in zip(phases, [None, *phases], strict=False) if phase != before] == [
        "teacher cache",
        "train",
        "evaluation",
    ]
    done = [event.done for event in events]
    assert done == sorted(done)
    assert isinstance(events[-1], Score)
    assert done[-1] == 1
    assert all(event.done < 1 for event in events[:-1])


def test_a_damaged_teacher_is_named_before_any_student_is_blamed(task, tmp_path):
    broken = load_network(task.teacher)
    with torch.no_grad():
        broken.get_parameter(f"{broken.head_name}.bias")[0] = float("nan")
    teacher = save_network(broken, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match=r"nan\.safetensors gives states that are not finite \(trajectories 0 to"):
        scores(METHOD, replace(task, teacher=teacher))
    assert not list((tmp_path / "cache").glob("*/shard-*.safetensors"))


def test_a_rate_far_too_large_raises_in_the_interval_after_its_first_step(task):
    with pytest.raises(TrainingDiverged) as caught:
        scores(replace(METHOD, lr=1e35), task)
    assert (caught.value.kimg, caught.value.interval) == (0.004, 2)
    assert caught.value.last_finite_loss > 0


def test_repeats_report_every_seed_and_leave_the_trials_own_value_alone(task):
    alone = scores(METHOD, task)[-1]
    repeated = scores(METHOD, task, repeats=(8, 9))[-1]
    assert repeated.value == alone.value
    assert alone.repeats == ()
    expected = [(seed, s.kimg, s.value) for seed in (8, 9) for s in scores(METHOD, replace(task, seed=seed))]
    assert list(repeated.repeats) == expected
    assert len({alone.value, *(value for _, _, value in expected)}) == 1 + len(expected)


# --- broken off and continued ---------------------------------------------------------------------------


LONG = replace(METHOD, nfe=1, num_branches=2, batch=250, budget_kimg=2)
"""8 iterations; scored after 4 and 8."""
LONG_WEIGHTS = (0.0, 1.0)
"""One head never moves: Adam has no moments for it."""


@pytest.mark.parametrize("broken_off_at", [0.1, 0.3, 0.6, 0.99])
def test_a_run_that_is_broken_off_ends_as_an_undisturbed_one_bit_for_bit(task, tmp_path, broken_off_at):
    """With dropout, a falling rate, falling weights, a score in between, and all that the last one carries."""
    task = replace(
        task,
        weights=LONG_WEIGHTS,
        schedule=(((0.5, 0.5),), ((0.0, 1.0),)),
        evaluation_seeds=(6, 7),
        num_shown=3,
    )
    expected = scores(LONG, replace(task, output=str(tmp_path / "whole.safetensors")))
    resumable = replace(
        task, snapshots=str(tmp_path / "run"), snapshot_every_s=0.0, output=str(tmp_path / "resumed.safetensors")
    )
    begun = LONG.run(resumable)
    next(event for event in begun if event.done >= broken_off_at)
    begun.close()
    torch.rand(13)
    continued = LONG.run(resumable)
    events = list(continued)
    assert [event for event in events if isinstance(event, Score)] == expected
    trained = [event for event in events if isinstance(event, Progress) and event.phase == "train"]
    assert all(event.done >= broken_off_at - 0.13 for event in trained), "it began anew"
    assert sha256_of_file(tmp_path / "resumed.safetensors") == sha256_of_file(tmp_path / "whole.safetensors")
    (tmp_path / "resumed.safetensors").unlink()
    assert scores(LONG, resumable) == expected, "an ended run is only told again"
    assert sha256_of_file(tmp_path / "resumed.safetensors") == sha256_of_file(tmp_path / "whole.safetensors")


def test_a_run_closed_while_it_is_scored_scores_that_iteration_when_it_goes_on(task, tmp_path):
    """Whoever closes a run in the middle of a score keeps its state; the score is not lost, nor taken too late."""
    task = replace(task, weights=LONG_WEIGHTS)
    expected = scores(LONG, task)
    resumable = replace(task, snapshots=str(tmp_path / "run"))
    begun = LONG.run(resumable)
    next(event for event in begun if isinstance(event, Progress) and event.phase == "evaluation")
    begun.close()
    events = list(LONG.run(resumable))
    assert [event for event in events if isinstance(event, Score)] == expected
    assert [event.phase for event in events[:2]] == ["resumed", "evaluation"]


def test_a_snapshot_of_other_weights_is_refused_with_what_differs(task, tmp_path):
    kept = replace(task, snapshots=str(tmp_path / "run"), snapshot_every_s=0.0)
    scores(METHOD, kept)
    with pytest.raises(CheckpointError, match="weights"):
        scores(METHOD, replace(kept, weights=uniform(4)))


def test_a_damaged_snapshot_costs_only_the_way_back_to_the_one_before(task, tmp_path):
    kept = replace(task, snapshots=str(tmp_path / "run"), snapshot_every_s=0.0)
    expected = scores(METHOD, kept)
    newest = max((tmp_path / "run").glob("snapshot-*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-7])
    assert scores(METHOD, kept) == expected


def test_without_a_cache_the_result_is_the_same_bit_for_bit(task, tmp_path):
    task = replace(task, weights=LONG_WEIGHTS)
    assert scores(LONG, replace(task, cache_root=None)) == scores(LONG, task)


def test_the_written_student_is_an_ordinary_network_that_knows_its_sampler(task, tmp_path):
    path = tmp_path / "student.safetensors"
    scores(METHOD, replace(task, output=str(path)))
    student = load_network(HashedFile(path=str(path), sha256=sha256_of_file(path)))
    assert student.config == replace(CONFIG, dropout=0.2)
    about = read_metadata(str(path))["about"]
    assert about["weights"] == list(task.weights)
    sigmas = sfd.make_grid(METHOD).student.tolist()
    assert about["sampler"] == {"solver": "euler", "afs": True, "sigmas": sigmas, "precision": "float32"}


# --- precision ------------------------------------------------------------------------------------------


def test_float16_targets_lose_less_than_a_tenth_of_a_grey_level(task, tmp_path):
    """And the plain states, up to 100 large, would lose far more."""
    teacher, grid = network(), sfd.make_grid(METHOD)
    noise = sfd.latents(7, 0, 64, SHAPE)
    exact = sfd.teacher_states(teacher, noise, grid)[:, grid.first_trained :]
    targets = {}
    for kind in ("float16", "float32"):
        method = replace(METHOD, batch=64, budget_kimg=0.064, targets=kind)
        with sfd_targets.Targets(method, task, grid, CONFIG, torch.device("cpu")) as source:
            for _ in source.fill(0):
                pass
            targets[kind] = source.batch(0).states
    # The teacher with dropout in its configuration is another network object with the same weights.
    assert (targets["float32"] - exact).abs().max() < 2e-5
    loss = (targets["float16"] - exact).abs().max()
    plain = (exact.half().float() - exact).abs().max()
    assert loss < 0.1 / 127.5
    assert plain > 10 * loss


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_close_to_single_with_masters_in_single(task, tmp_path, precision):
    found, students = {}, {}
    for kind in ("float32", precision):
        path = tmp_path / f"{kind}.safetensors"
        method = replace(METHOD, precision=kind, budget_kimg=0.04)
        found[kind] = scores(method, replace(task, output=str(path)))[-1].value
        students[kind] = load_network(HashedFile(path=str(path), sha256=sha256_of_file(path)))
    assert {p.dtype for p in students[precision].parameters()} == {torch.float32}
    teacher = load_network(task.teacher)
    exact = flat(students["float32"]) - flat(teacher)
    moved = flat(students[precision]) - flat(teacher)
    assert torch.nn.functional.cosine_similarity(moved, exact, dim=0) > 0.5
    assert found[precision] == pytest.approx(found["float32"], rel=0.3)


def test_float16_that_overflows_goes_on_in_single_precision(task, tmp_path):
    """spec/methods.md 1.5: the authors fall back on NaN; bfloat16 has the range and needs no such thing."""
    large = load_network(task.teacher)
    with torch.no_grad():
        large.get_parameter("model.enc.8x8_conv.weight").mul_(3e5)
    teacher = save_network(large, tmp_path / "large.safetensors")
    single = scores(METHOD, replace(task, teacher=teacher))
    half = scores(replace(METHOD, precision="float16"), replace(task, teacher=teacher))
    assert half[-1].value == pytest.approx(single[-1].value, rel=1e-3)


def overflowing(network, at_call):
    """The network, whose output is infinite from a call on while it is in half precision."""
    calls = []

    def spoil(module, inputs, output):
        calls.append(1)
        half = output.dtype == torch.float16
        return output * float("inf") if half and len(calls) >= at_call else output

    network.model.register_forward_hook(spoil)
    return network


@pytest.mark.parametrize("at_call", [1, 2])
def test_an_overflow_in_any_micro_batch_begins_the_interval_anew(at_call):
    """Gradients of the micro-batches before it are of half precision: none of them may be lost or counted twice."""
    teacher, method = network(), replace(METHOD, nfe=1)
    grid, noise = sfd.make_grid(method), sfd.latents(0, 0, 4, SHAPE)
    targets = sfd.teacher_states(teacher, noise, grid)[:, grid.first_trained :]
    found = {}
    for precision in ("float32", "float16"):
        student = with_branches(teacher, 4).requires_grad_(True).train()
        trainee = Trainee(student, sfd.adam(student, method), precision)
        if precision == "float16":
            overflowing(trainee.network, at_call)
        weights = torch.tensor(uniform(4))
        steps = sfd.train_intervals(
            trainee, sfd.first_states(noise, grid), targets, weights=weights, grid=grid, micro_batch=2
        )
        found[precision] = [losses for losses, _ in steps], flat(student), trainee.precision
    assert found["float16"][2] == "float32"
    assert torch.equal(found["float16"][0][0], found["float32"][0][0])
    assert torch.equal(found["float16"][1], found["float32"][1])


def test_a_score_in_float16_asks_float32_where_it_overflows():
    """One image of many must not cost a run whose weights are sound."""
    full, grid = network(), sfd.make_grid(METHOD)
    noise = torch.randn(3, *SHAPE)
    careful = HalfDenoiser(overflowing(in_precision(full, "float16"), 1), full)
    assert torch.equal(sfd.sample(careful, noise, grid), sfd.sample(full, noise, grid))


def test_a_half_precision_score_is_that_of_the_written_student(task, tmp_path):
    path = tmp_path / "student.safetensors"
    found = scores(replace(METHOD, precision="bfloat16"), replace(task, output=str(path)))
    student = load_network(HashedFile(path=str(path), sha256=sha256_of_file(path)))
    sampler = sampler_of(str(path))
    prepared = sampler.prepare(student)
    value = Metric(task.evaluation)(lambda z, y: sampler(prepared, z, y), SHAPE, 0)
    assert (sampler.precision, value) == ("bfloat16", found[-1].value)


def test_a_gpu_that_is_not_there_is_said_at_once(task):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BadValue, match=r"device cuda is asked for.*sees 0 GPU"):
        scores(METHOD, replace(task, device="cuda"))


@pytest.mark.parametrize("solver", ["heun", "dpm2", "ipndm", "euler", "deis_tab"])
def test_any_solver_may_be_the_teachers(task, solver):
    found = scores(replace(METHOD, solver=solver, schedule="logsnr"), task)
    assert found[-1].value != scores(METHOD, task)[-1].value


def test_micro_batches_give_the_gradients_of_the_whole_batch(task, tmp_path):
    teacher = save_network(network(), tmp_path / "no-dropout.safetensors")
    paths = [tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"]
    for path, rows in zip(paths, (None, 3), strict=True):
        scores(METHOD, replace(task, teacher=teacher, output=str(path), micro_batch=rows))
    whole, parts = (flat(load_network(HashedFile(path=str(p), sha256=sha256_of_file(p)))) for p in paths)
    start = flat(load_network(teacher))
    # Adam turns the rounding noise of a vanishing gradient into whole steps: compare the moves, not each entry.
    assert (whole - parts).norm() < 0.05 * (whole - start).norm()
