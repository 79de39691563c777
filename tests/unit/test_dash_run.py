"""Whole runs of DASH: its invariants (spec/methods.md, section 4), on networks of a few thousand weights."""

import dataclasses
import gc
from pathlib import Path

import pytest
import torch

from bdense_core import data, discrete, seeds
from bdense_core.branches import freeze
from bdense_core.checkpoints import load_network, save_network
from bdense_core.distill import distill
from bdense_core.errors import BadValue, CheckpointError, TrainingDiverged, UnknownKey, WeightsError
from bdense_core.evaluation import Metric
from bdense_core.files import HashedFile, sha256_of_file
from bdense_core.guidance import GuidedSampler
from bdense_core.integrity import read_metadata
from bdense_core.loops import dash_run
from bdense_core.loops.dash_data import Examples
from bdense_core.loops.dash_run import relative, student_config
from bdense_core.methods.base import with_settings
from bdense_core.methods.dash import DASH, NUM_TIMES, SAMPLING
from bdense_core.networks import Denoiser, NetworkConfig, build
from bdense_core.sampling import sampler_of
from bdense_core.task import Progress, Score, Task
from tests.sfd import make_evaluation, scores

CONFIG = NetworkConfig.ddpm(
    img_resolution=8, img_channels=1, label_dim=10, preconditioning="cosine", model_channels=8, channel_mult=[1, 1],
    num_blocks=1, attn_resolutions=[], norm_groups=4, dropout=0.0, label_dropout=0.1,
)  # fmt: skip
LOGITS = [(-1) ** t * t / 300 for t in range(1000)]
METHOD = DASH(
    lr=1e-3, batch=16, budget_kimg=0.064, ema=0.5, student_channels=4, sampling_steps=2, num_pairs=20, guidance=2.0
)
AUTHORS = (0.1, 1.0, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A drawn teacher with a curriculum, and one without."""
    found = tmp_path_factory.mktemp("dash")
    torch.manual_seed(0)
    network = freeze(build(CONFIG))
    save_network(network, found / "teacher.safetensors", {"tirt": LOGITS})
    save_network(network, found / "plain.safetensors")
    return found


@pytest.fixture(scope="module")
def evaluation(folder):
    return make_evaluation(folder, n_samples=20, batch=10)


def task_of(folder, evaluation, teacher="teacher", **settings):
    path = folder / f"{teacher}.safetensors"
    return Task(
        **{
            "weights": AUTHORS, "seed": 0, "every_kimg": 1, "dataset": "digits", "evaluation": evaluation,
            "teacher": HashedFile(path=str(path), sha256=sha256_of_file(path)), "cache_root": None,
        }
        | settings
    )  # fmt: skip


@pytest.fixture
def task(folder, evaluation):
    return task_of(folder, evaluation)


def result(method, task):
    return scores(method, task)[-1]


def written(method, task, path):
    """The bytes of the student's weights."""
    list(distill(method, dataclasses.replace(task, output=str(path))))
    return load_network(HashedFile(path=str(path), sha256=sha256_of_file(path)))


def equal(one, other):
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_the_same_seed_gives_the_same_score_and_another_seed_another(task):
    one, again, other = (result(METHOD, dataclasses.replace(task, seed=seed)) for seed in (0, 0, 1))
    assert one == again
    assert one.value != other.value
    assert set(one.metrics) == set(METHOD.metrics()) == {"rho", "cos", "gap_mse"}


def test_a_common_factor_of_the_weights_changes_nothing(task, tmp_path):
    """The gradient's limit would tell them apart: they are taken relative to the primary one."""
    one = written(METHOD, task, tmp_path / "one.safetensors")
    other = written(
        METHOD, dataclasses.replace(task, weights=tuple(w / 4 for w in AUTHORS)), tmp_path / "other.safetensors"
    )
    assert equal(one, other)
    assert relative((0.2, 1.0, 2.0)) == (0.1, 0.5, 1.0)
    assert relative((0.4, 2.0, 0.0)) == relative((0.2, 1.0, 0.0)) == (0.2, 1.0, 0.0)


@pytest.mark.parametrize("weights", [(0.1, 0.0, 1.0), (0.0, 1.0, 1.0)])
def test_a_term_of_weight_0_is_as_a_run_that_multiplies_it_by_0(task, tmp_path, weights, monkeypatch):
    """Whole runs: without the term, and with all predictions made and its error times 0."""
    method = dataclasses.replace(METHOD, dropout=0.2)
    without = written(method, dataclasses.replace(task, weights=weights), tmp_path / "without.safetensors")

    class Everything(dash_run.Objective):
        needs_null = matches_cond = True

    monkeypatch.setattr(dash_run, "Objective", Everything)
    multiplied = written(method, dataclasses.replace(task, weights=weights), tmp_path / "times0.safetensors")
    assert equal(without, multiplied)


def test_a_constant_schedule_is_the_run_of_its_weights(task):
    scheduled = dataclasses.replace(task, schedule=((AUTHORS,), (AUTHORS,)))
    assert result(METHOD, scheduled).value == pytest.approx(result(METHOD, task).value, rel=1e-6)


def test_teacher_and_curriculum_are_untouched(task):
    before = sha256_of_file(path := Path(task.teacher.path))
    running = dash_run.Distillation(METHOD, task)
    weights = {name: tensor.clone() for name, tensor in running._teacher.state_dict().items()}
    omega = running._omega.clone()
    list(running.events())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in running._teacher.state_dict().items())
    assert torch.equal(running._omega, omega)
    assert sha256_of_file(path) == before
    assert read_metadata(str(path))["about"]["tirt"] == LOGITS


@pytest.mark.parametrize("broken_off_at", [1, 3, 5, 8])
def test_a_run_that_is_broken_off_ends_as_an_undisturbed_one_bit_for_bit(task, tmp_path, broken_off_at):
    method = dataclasses.replace(METHOD, dropout=0.2)
    whole = written(method, task, tmp_path / "whole.safetensors")
    kept = dataclasses.replace(
        task, snapshots=str(tmp_path / "kept"), snapshot_every_s=0.0, output=str(tmp_path / "resumed.safetensors")
    )
    events = distill(method, kept)
    for _ in range(broken_off_at):
        next(events)
    events.close()
    resumed = list(distill(method, kept))
    assert resumed[0].phase == "resumed"
    assert [e for e in resumed if isinstance(e, Score)] == scores(method, task)
    path = tmp_path / "resumed.safetensors"
    assert equal(whole, load_network(HashedFile(path=str(path), sha256=sha256_of_file(path))))


def test_a_closed_run_lets_its_networks_and_images_go(task):
    """Actors are reused, and Python's collector does not see a GPU's memory: no cycle may keep what lies there."""

    def kept_by_a_closed_run():
        run = METHOD.run(task)
        next(event for event in run if isinstance(event, Progress) and event.phase == "train" and event.done > 0.5)
        run.close()
        del run
        return sum(type(found) in (Denoiser, Examples) for found in gc.get_objects())

    kept_by_a_closed_run()  # torch's own first use of meta tensors leaves frames behind
    gc.collect()
    gc.disable()
    try:
        assert kept_by_a_closed_run() == kept_by_a_closed_run() == 0
    finally:
        gc.enable()


def test_a_snapshot_of_other_settings_is_refused(task, tmp_path):
    kept = dataclasses.replace(task, snapshots=str(tmp_path / "kept"), snapshot_every_s=0.0)
    list(distill(METHOD, kept))
    with pytest.raises(CheckpointError, match=r"it differs in method\.gamma"):
        list(distill(dataclasses.replace(METHOD, gamma=1.0), kept))


def test_without_a_cache_the_score_is_the_same(task, tmp_path):
    cached = dataclasses.replace(task, cache_root=str(tmp_path / "cache"))
    assert result(METHOD, cached) == result(METHOD, cached) == result(METHOD, task)


def test_the_written_student_is_an_ordinary_network_that_knows_its_sampler(task, tmp_path):
    path = tmp_path / "student.safetensors"
    student = written(METHOD, task, path)
    sampler = sampler_of(str(path))
    assert sampler == GuidedSampler(num_steps=2, guidance=2.0, tag_min=1.0, tag_beta=5.0)
    assert sampler.nfe == METHOD.nfe == 4
    assert student.config.model_channels == 4
    value = Metric(task.evaluation)(sampler.bind(student), (1, 8, 8), 10)
    assert value == result(METHOD, task).value


def test_a_student_is_scored_at_other_settings_of_sampling_too(task):
    """What it is scored at once is what a run with those settings scores: nothing is trained anew."""
    others = ({"guidance": 1, "tag": False}, {"sampling_steps": 3, "eta": 0.5, "clip": None})
    method = dataclasses.replace(METHOD, also_sampled=others)
    found = result(method, task)
    names = ["fd[guidance=1,tag=false]", "fd[sampling_steps=3,eta=0.5,clip=none]"]
    assert list(method.metrics())[3:] == names
    for name, other in zip(names, others, strict=True):
        assert found.metrics[name] == result(dataclasses.replace(METHOD, **other), task).value
    assert found.value == result(METHOD, task).value
    assert [method.sampled_at(other).nfe for other in others] == [2, 8]


def test_the_gap_is_measured_on_pairs_that_all_trials_share(task):
    """Whatever a student was trained on: a fresh network of the teacher's own size and weights keeps all of it."""
    running = dash_run.Distillation(METHOD, task)
    *_, found = finish(running._gap(running._teacher))
    assert found == pytest.approx({"rho": 1.0, "cos": 1.0, "gap_mse": 0.0}, abs=1e-6)
    pairs = [
        dash_run.Distillation(METHOD, dataclasses.replace(task, seed=seed))._examples.pairs(5, 20, num_times=1000)
        for seed in (0, 1)
    ]
    assert torch.equal(pairs[0][0].noise, pairs[1][0].noise)


def finish(generator):
    """What a generator gives, and then returns."""
    while True:
        try:
            yield next(generator)
        except StopIteration as end:
            yield end.value
            return


def test_a_run_s_first_updates_are_computed_from_real_images(task):
    """The batch of the first iteration holds images of the data set, as bytes have them."""
    running = dash_run.Distillation(METHOD, task)
    known = {image.numpy().tobytes() for image in data.to_uint8(data.load("digits")[0])}
    batch = running._examples.batch(0, 0, size=16, num_times=1000)
    assert all(image.numpy().tobytes() in known for image in data.to_uint8(batch.clean))


@pytest.mark.parametrize("name", sorted(METHOD.controls()))
def test_every_control_runs_to_its_end(task, name):
    control = METHOD.controls()[name]
    method = with_settings(METHOD, control.settings)
    events = list(distill(method, dataclasses.replace(task, weights=control.weights)))
    assert events[-1].done == 1
    assert all(event.loss is None or event.loss > 0 for event in events if isinstance(event, Progress))


def test_scratch_trains_without_a_teacher_and_drops_labels(task):
    method = dataclasses.replace(METHOD, objective="scratch", label_dropout=0.3)
    running = dash_run.Distillation(method, dataclasses.replace(task, weights=(0.0, 0.0, 1.0)))
    calls = []
    running._teacher.model.register_forward_hook(lambda *_: calls.append(1))
    running.advance()
    assert not calls
    assert running.config.label_dropout == 0.3
    assert student_config(METHOD, CONFIG).label_dropout == 0
    with pytest.raises(WeightsError, match="the objective scratch has no terms but im"):
        list(distill(method, task))


def test_a_curriculum_that_the_teacher_has_not_learned_is_refused(folder, evaluation):
    plain = task_of(folder, evaluation, teacher="plain")
    with pytest.raises(BadValue, match=r"method\.curriculum is tirt, but the teacher has none"):
        list(distill(METHOD, plain))
    assert result(dataclasses.replace(METHOD, curriculum="min_snr"), plain).done == 1


def test_a_student_beyond_the_limit_ends_before_it_begins(task):
    size = sum(p.numel() for p in build(student_config(METHOD, CONFIG)).parameters())
    assert result(dataclasses.replace(METHOD, max_parameters=size), task).done == 1
    with pytest.raises(BadValue, match=f"1 blocks has {size} parameters, more than method.max_parameters"):
        list(distill(dataclasses.replace(METHOD, max_parameters=size - 1), task))


def test_a_width_that_no_network_has_is_one_line(task):
    with pytest.raises(BadValue, match=r"network\.model_channels is 6"):
        list(distill(dataclasses.replace(METHOD, student_channels=6), task))


def test_a_study_without_images_and_a_rule_that_learns_are_refused(task):
    with pytest.raises(BadValue, match="set dataset"):
        list(distill(METHOD, dataclasses.replace(task, dataset=None)))
    with pytest.raises(BadValue, match="the weights of DASH are not learned"):
        list(distill(METHOD, dataclasses.replace(task, rule="gate")))


def test_a_damaged_teacher_is_named_before_any_student_is_blamed(folder, evaluation):
    network = build(CONFIG)
    with torch.no_grad():
        network.model.conv_in.weight[0, 0, 0, 0] = torch.nan
    save_network(network, folder / "damaged.safetensors", {"tirt": LOGITS})
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors .*model\.conv_in\.weight"):
        list(distill(METHOD, task_of(folder, evaluation, teacher="damaged")))


def test_a_rate_far_too_large_diverges_in_one_line(task):
    with pytest.raises(TrainingDiverged, match=r"the loss is not finite at 0\.0\d+ kimg"):
        list(distill(dataclasses.replace(METHOD, lr=1e30), task))


def test_micro_batches_give_nearly_the_same_student(task, tmp_path):
    method = dataclasses.replace(METHOD, dropout=0.0)  # a mask differs with the shape it is drawn for
    whole = written(method, task, tmp_path / "whole.safetensors")
    parts = written(method, dataclasses.replace(task, micro_batch=5), tmp_path / "parts.safetensors")
    start = build_from_seed()
    moved = [flat(whole) - start, flat(parts) - start]
    assert (moved[0] - moved[1]).norm() < 0.05 * moved[0].norm()


def build_from_seed():
    torch.manual_seed(seeds.derive(0, "student", "weights"))
    return flat(build(student_config(METHOD, CONFIG)))


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_half_precision_trains_and_its_student_says_so(task, tmp_path):
    path = tmp_path / "half.safetensors"
    half = written(dataclasses.replace(METHOD, precision="bfloat16", dropout=0.0), task, path)
    full = written(dataclasses.replace(METHOD, dropout=0.0), task, tmp_path / "full.safetensors")
    assert sampler_of(str(path)).precision == "bfloat16"
    assert next(half.parameters()).dtype == torch.float32
    assert not equal(half, full)
    start = build_from_seed()
    moved = [flat(half) - start, flat(full) - start]
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.8


# --- the settings


def test_terms_weights_and_figures_are_named_in_one_order():
    assert METHOD.terms == ("an", "un", "im")
    assert METHOD.controls()["authors"].weights == AUTHORS
    assert METHOD.controls()["conditional_only"].weights[METHOD.terms.index("un")] == 0
    assert METHOD.forward_units() == (2.0, 6.0)
    assert all(axis in {field.name for field in dataclasses.fields(DASH)} for axis in METHOD.axes())
    assert not set(METHOD.axes()) & set(SAMPLING)


def test_the_method_and_the_networks_have_as_many_timesteps():
    assert discrete.NUM_STEPS == NUM_TIMES
    unguided = {"guidance": 1.0, "tag_min": 1.0}
    for settings in (*({"sampling_steps": steps} for steps in (1, 7, 30, 50)), unguided, unguided | {"tag": False}):
        method = dataclasses.replace(METHOD, **settings)
        assert method.nfe == dash_run.sampler_for(method).nfe


def test_the_defaults_are_the_authors_sizes():
    """6,082,627 parameters (spec/methods.md 3)."""
    teacher = NetworkConfig.ddpm(img_resolution=32, label_dim=10, preconditioning="cosine", label_dropout=0.1)
    config = student_config(DASH(), teacher)
    with torch.device("meta"):
        assert sum(p.numel() for p in build(config).parameters()) == 6_082_627
    assert DASH().num_iterations == 234_375


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"lr": 0.0}, "method.lr must be positive"),
        ({"ema": 1.0}, r"method\.ema must lie in \[0, 1\)"),
        ({"lr_min": 1.0}, "method.lr_min must lie in"),
        ({"weight_decay": -1.0}, "method.weight_decay must not be negative"),
        ({"sampling_steps": 1001}, "method.sampling_steps must be 1 to 1000"),
        ({"eta": 2.0}, "method.eta must lie in"),
        ({"clip": 0.0}, "clip be positive or null"),
        ({"also_sampled": ({"lr": 1.0},)}, "method.also_sampled names lr"),
        ({"also_sampled": ({"eta": 2.0},)}, "method.eta must lie in"),
        ({"also_sampled": ({"sampling_steps": 2.5},)}, r"method.also_sampled has sampling_steps: 2\.5"),
        ({"also_sampled": ({"guidance": None},)}, "method.also_sampled has guidance: None"),
        ({"also_sampled": ({"guidance": True},)}, "method.also_sampled has guidance: True"),
        ({"also_sampled": ({"tag": 1},)}, "method.also_sampled has tag: 1"),
    ],
)
def test_a_setting_out_of_range_is_one_line(wrong, says):
    with pytest.raises(BadValue, match=says):
        dataclasses.replace(METHOD, **wrong)


def test_a_trial_s_settings_are_the_method_s_own_fields():
    assert with_settings(METHOD, {"lr": 2e-4, "curriculum": "uniform"}).curriculum == "uniform"
    with pytest.raises(UnknownKey, match="the method dash has no setting rate"):
        with_settings(METHOD, {"rate": 1.0})
