"""Rules that learn the weights: what they measure, what they make of it, and that they disturb nothing."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity
from torch.utils.flop_counter import FlopCounterMode

from bdense_core.branches import with_branches
from bdense_core.checkpoints import save_network
from bdense_core.errors import BadValue
from bdense_core.loops import sfd, sfd_rules, sfd_run, sfd_targets
from bdense_core.loops.sfd_rules import head_cosines, lookahead_cosines, make_rule, relative_work
from bdense_core.loops.sfd_targets import Batch
from bdense_core.methods.sfd import SFD
from bdense_core.networks import NetworkConfig, forward_flops
from bdense_core.task import Progress, Score, Task
from bdense_core.weights import endpoint_only, uniform
from tests.sfd import CONFIG, METHOD, SHAPE, make_evaluation, network, scores

ADM = NetworkConfig.adm(
    img_resolution=8,
    img_channels=1,
    model_channels=32,
    channel_mult=[1],
    num_blocks=1,
    attn_resolutions=[],
    label_dim=3,
)
CONFIGS = {"ddpm++": CONFIG, "vp": replace(CONFIG, preconditioning="vp"), "adm with labels": ADM}
GRID = sfd.make_grid(METHOD)
CPU = torch.device("cpu")
MANY = SFD(nfe=1, num_branches=2, lr=1e-3, batch=20, budget_kimg=0.5)
"""25 iterations: looks at 0, 10 and 20."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(sfd_targets, "SHARD_ROWS", 32)


def student_and_batch(config=CONFIG, rows=6):
    """A student whose heads have gone their own ways, and what it may be trained on."""
    teacher = network(config)
    student = with_branches(teacher, 4).requires_grad_(True).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    noise = sfd.latents(0, 0, rows, SHAPE)
    labels = sfd.uniform_labels(0, 0, rows, config.label_dim)
    targets = sfd.teacher_states(teacher, noise, GRID, labels)[:, GRID.first_trained :]
    return student, Batch(noise, labels, targets)


def walk(student, batch):
    """Losses [K] of each interval, with their graphs, and the endpoint's states where each begins."""
    x, losses = sfd.first_states(batch.noise, GRID), []
    for j in range(2):
        states = sfd.branch_states(student, x, GRID.student[j + 1], GRID.inner[j + 1], batch.labels)
        losses.append(sfd.branch_losses(states, batch.states[:, j]))
        x = states[:, -1].detach()
    return losses


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gates_cosines_are_those_of_backpropagation_to_the_heads_input(name):
    student, batch = student_and_batch(CONFIGS[name])
    student.eval()
    shared = []
    student.get_submodule(student.head_name).register_forward_pre_hook(lambda _, inputs: shared.append(inputs[0]))
    expected = []
    for losses, j in zip(walk(student, batch), range(2), strict=True):
        gradients = [torch.autograd.grad(loss, shared[j], retain_graph=True)[0].flatten() for loss in losses]
        expected.append(torch.stack([cosine_similarity(g, gradients[-1], dim=0) for g in gradients]))
    found = head_cosines(student, batch, GRID)
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)
    assert (found[:, :-1] < 0.99).all(), "the case tells nothing apart"


def test_the_lookahead_is_the_derivative_of_the_held_out_endpoints_loss_along_each_branchs_gradient():
    """By central differences in double precision: a step along g_k, and along the held-out gradient itself."""
    student, batch = student_and_batch()
    student.double().eval()
    batch = Batch(batch.noise.double(), None, batch.states.double())
    tried, held_out = (Batch(batch.noise[rows], None, batch.states[rows]) for rows in (slice(3), slice(3, None)))
    shared = [p for name, p in student.named_parameters() if not name.startswith(student.head_name)]

    def unit(loss):
        gradient = torch.autograd.grad(loss, shared, retain_graph=True, materialize_grads=True)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient))
        return [g / norm for g in gradient]

    def slope(direction, x, interval, size=1e-7):
        found = []
        with torch.no_grad():
            for step in (size, -2 * size):
                torch._foreach_add_(shared, direction, alpha=step)
                states = sfd.branch_states(student, x, GRID.student[interval], GRID.inner[interval])
                found.append(float(sfd.branch_losses(states, held_out.states[:, interval - 1])[-1]))
            torch._foreach_add_(shared, direction, alpha=size)
        return (found[0] - found[1]) / (2 * size)

    cosines = lookahead_cosines(student, batch, GRID)
    x = sfd.first_states(held_out.noise, GRID)
    losses = zip(walk(student, tried), walk(student, held_out), strict=True)
    gradients = [[unit(loss) for loss in (theirs[-1], *mine)] for mine, theirs in losses]
    for j, (steepest, *steps) in enumerate(gradients):
        with torch.no_grad():
            states = sfd.branch_states(student, x, GRID.student[j + 1], GRID.inner[j + 1])
        expected = [slope(step, x, j + 1) / slope(steepest, x, j + 1) for step in steps]
        assert cosines[j].tolist() == pytest.approx(expected, abs=1e-4)
        x = states[:, -1]


def opposed(student, batch):
    """Targets on the same side of every endpoint pixel, and of branch 2's; on the other side of branch 1's."""
    x, targets = sfd.first_states(batch.noise, GRID), []
    with torch.no_grad():
        for j in range(2):
            states = sfd.branch_states(student, x, GRID.student[j + 1], GRID.inner[j + 1])
            targets.append(states + torch.tensor([-1.0, 1.0, 1.0, 1.0]).view(1, 4, 1, 1, 1))
            x = states[:, -1]
    return Batch(batch.noise, None, torch.stack(targets, dim=1))


def test_the_gate_closes_for_a_branch_that_pulls_the_other_way_and_opens_for_one_that_agrees():
    """Heads are equal before training: their gradients differ by the signs of the errors alone."""
    student = with_branches(network(), 4)
    batch = opposed(student.eval(), student_and_batch()[1])
    gate = make_rule("gate", METHOD, GRID, CPU, micro_batch=None, num_looks=1)
    gate.look(student, batch)
    expected = torch.tensor([0.0, 1.0, 1.0, 1.0]).expand(2, 4)
    assert torch.allclose(gate.factors, expected, atol=1e-6)
    assert torch.allclose(gate.applied(torch.full((2, 4), 0.25)), expected / 4, atol=1e-6)


def test_meta_moves_shares_from_a_branch_that_pulls_the_other_way_to_those_that_agree():
    student = with_branches(network(), 4).requires_grad_(True)
    batch = opposed(student.eval(), student_and_batch(rows=20)[1])
    meta = make_rule("meta", replace(METHOD, batch=20), GRID, CPU, micro_batch=None, num_looks=1)
    meta.look(student, batch)
    found = meta.applied(torch.full((2, 4), 0.25))
    assert (found[:, 0] < 0.25).all()
    assert (found[:, 1:] > 0.25).all()
    assert torch.allclose(found.sum(1), torch.ones(2))


def test_a_look_leaves_gradients_random_numbers_and_the_networks_mode_alone():
    student, batch = student_and_batch(replace(CONFIG, dropout=0.5))
    for rule in ("gate", "meta"):
        learned = make_rule(rule, METHOD, GRID, CPU, micro_batch=None, num_looks=1)
        before, state = {n: p.clone() for n, p in student.named_parameters()}, torch.get_rng_state()
        learned.look(student, batch)
        assert torch.equal(torch.get_rng_state(), state)
        assert student.training
        assert all(p.grad is None and torch.equal(p, before[n]) for n, p in student.named_parameters())


def test_a_look_takes_no_more_rows_than_a_micro_batch():
    student, batch = student_and_batch()
    first = Batch(batch.noise[:4], None, batch.states[:4])
    method = replace(METHOD, batch=6)
    for rule in ("gate", "meta"):
        small = make_rule(rule, method, GRID, CPU, micro_batch=4, num_looks=1)
        whole = make_rule(rule, replace(method, batch=4), GRID, CPU, micro_batch=None, num_looks=1)
        small.look(student, batch)
        whole.look(student, first)
        assert torch.equal(small.factors, whole.factors)


@pytest.mark.parametrize("rule", ["gate", "meta"])
def test_the_extra_work_is_what_is_said(rule):
    """Counted by torch. Going back costs a little less than twice the way, as the first layer's input needs nothing."""
    student, batch = student_and_batch()
    learned = make_rule(rule, replace(METHOD, batch=6), GRID, CPU, micro_batch=None, num_looks=1)
    with FlopCounterMode(display=False) as counter:
        learned.look(student, batch)
    forwards = counter.get_total_flops() / (forward_flops(student.config) * len(batch.noise) * 2)
    assert forwards / sfd_rules.EVERY == pytest.approx(3 * (relative_work(rule, 4) - 1), rel=0.1)


def test_nothing_can_be_held_out_of_a_single_row():
    with pytest.raises(BadValue, match="holds out half of a batch"):
        make_rule("meta", replace(METHOD, batch=1), GRID, CPU, micro_batch=None, num_looks=1)


# --- whole runs -----------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path):
    teacher = save_network(network(replace(CONFIG, dropout=0.2)), tmp_path / "teacher.safetensors")
    return Task(
        weights=uniform(2),
        seed=7,
        every_kimg=1,
        teacher=teacher,
        evaluation=make_evaluation(tmp_path),
        cache_root=str(tmp_path / "cache"),
    )


@pytest.mark.parametrize("rule", ["gate", "meta"])
def test_a_learned_run_ends_with_other_weights_than_it_began_with_and_says_so(task, rule):
    (learned,), (fixed,) = scores(MANY, replace(task, rule=rule)), scores(MANY, task)
    assert sum(learned.shares) == pytest.approx(1)
    assert learned.shares != pytest.approx(task.weights, abs=1e-3)
    assert learned.value != fixed.value
    assert fixed.shares == ()


@pytest.mark.parametrize("rule", ["gate", "meta"])
def test_a_rule_pays_for_its_looks_with_iterations(task, rule):
    """So that a rule and fixed weights have had the same compute wherever both are scored."""
    fixed, learned = (list(MANY.run(replace(task, rule=chosen))) for chosen in ("fixed", rule))
    iterations = [sum(isinstance(e, Progress) and e.phase == "train" for e in events) for events in (fixed, learned)]
    work = relative_work(rule, 2)
    assert iterations[1] < iterations[0] and iterations[1] * work <= iterations[0] < (iterations[1] + 1) * work
    assert [e.kimg for e in learned if isinstance(e, Score)] == [e.kimg for e in fixed if isinstance(e, Score)]
    used = max(e.kimg for e in learned if isinstance(e, Progress))
    assert used == pytest.approx(iterations[1] * work * MANY.batch / 1000) and used <= MANY.budget_kimg


@pytest.mark.parametrize("rule", ["gate", "meta"])
def test_no_rule_gives_a_weight_to_a_branch_that_has_none(task, rule, monkeypatch):
    """Endpoint only stays plain SFD, bit for bit, but for the iterations that the looks cost."""
    monkeypatch.setattr(sfd_run, "relative_work", lambda rule, num_branches: 1.0)
    task = replace(task, weights=endpoint_only(2))
    (learned,), (fixed,) = scores(MANY, replace(task, rule=rule)), scores(MANY, task)
    assert replace(learned, shares=()) == fixed
    assert learned.shares == (0.0, 1.0)


@pytest.mark.parametrize("rule", ["gate", "meta"])
@pytest.mark.parametrize("broken_off_at", [0.3, 0.5, 0.9])
def test_a_learned_run_that_is_broken_off_ends_as_an_undisturbed_one_bit_for_bit(task, tmp_path, rule, broken_off_at):
    task = replace(task, rule=rule)
    expected = scores(MANY, task)
    resumable = replace(task, snapshots=str(tmp_path / "run"), snapshot_every_s=0.0)
    begun = MANY.run(resumable)
    next(event for event in begun if event.done >= broken_off_at)
    begun.close()
    events = list(MANY.run(resumable))
    assert events[0].done >= broken_off_at - 0.05, "it began anew"
    assert [event for event in events if isinstance(event, Score)] == expected
