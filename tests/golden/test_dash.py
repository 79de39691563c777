"""TIRT, DASH's losses, guided sampling, metrics and both training loops against the numbers of its authors' code.

The loops are those of a real run: its gradients, its update, its curriculum; only the drawn numbers are stored.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from bdense_core import discrete, guidance, tirt
from bdense_core.guidance import GuidedSampler, noise_predictor
from bdense_core.loops.dash import Batch, Objective, Predictions, accumulate, importance, noised
from bdense_core.loops.dash_gap import gap_metrics, gap_rows
from bdense_core.loops.dash_learner import Learner, cosine_rate
from bdense_core.loops.dash_teacher import denoising_errors, tirt_loss
from bdense_core.methods.dash import DASH
from tests.golden import dash
from tests.golden.test_dash_networks import stored_unet

pytestmark = pytest.mark.golden
in_both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
SCHEDULE = discrete.cosine()
"""Of the networks, 1,000 steps; where the vectors name another number the test takes that."""


def logits_of(stored, name):
    assert name in ("rand", "zero")
    return stored["lambda"] if name == "rand" else torch.zeros_like(stored["lambda"])


def test_the_stored_noising(vectors_root):
    stored = dash.read(vectors_root, "schedule")
    stored.check("q.x_t", noised(SCHEDULE, Batch(stored["q.x0"], stored["q.eps"], stored["q.t"], torch.empty(0))))


@in_both_types
def test_every_stored_curriculum(vectors_root, dtype):
    stored = dash.read(vectors_root, "tirt")
    schedule = discrete.cosine(len(stored["lambda"]))
    for case in stored.cases:
        assert set(case) == {"prefix", "gamma", "lam"}
        prefix, gamma = case["prefix"], case["gamma"]
        logits = logits_of(stored, case["lam"]).to(dtype)
        omega = tirt.tirt(schedule.snr.to(dtype), logits, gamma=gamma)
        stored.check(f"{prefix}omega", omega)
        stored.check(f"{prefix}omega_hat_all", tirt.batch_weights(omega))
        for name, t in (("", stored["t"]), ("noisy_", stored["t_noisy"])):
            errors, learned = (
                value.clone().requires_grad_() for value in (stored["loss_per_sample"].to(dtype), logits)
            )
            loss = tirt_loss(errors, t, learned, schedule, gamma=gamma)
            found = torch.autograd.grad(loss, [errors, learned])
            stored.check(f"{prefix}{name}omega_hat_batch", tirt.batch_weights(omega[t]))
            stored.check(f"{prefix}{name}loss", loss)
            stored.check(f"{prefix}{name}grad_loss_per_sample", found[0])
            stored.check(f"{prefix}{name}grad_lambda", found[1])
    assert not stored.unchecked()


@in_both_types
def test_every_stored_loss(vectors_root, dtype):
    stored = dash.read(vectors_root, "losses")
    names = ("eps_S_cond", "eps_S_uncond", "eps_T_cond", "eps_T_uncond", "eps_true")
    for case in stored.cases:
        assert set(case) == {"prefix", "gamma", "lam", "lam_im", "lam_un", "lam_an"}
        mine_cond, mine_null, cond, null, noise = (stored[name].to(dtype) for name in names)
        learned = [mine_cond.requires_grad_(), mine_null.requires_grad_()]
        snr, logits = discrete.cosine(len(stored["lambda"])).snr.to(dtype), logits_of(stored, case["lam"]).to(dtype)
        omega = tirt.tirt(snr, logits, gamma=case["gamma"])
        weights = torch.tensor([case["lam_an"], case["lam_un"], case["lam_im"]], dtype=dtype)
        objective = Objective(weights=tuple(weights.tolist()), omega=omega)
        batch = Batch(torch.zeros_like(noise), noise, stored["t"], torch.empty(0))
        errors = objective.errors(Predictions(mine_cond, mine_null), Predictions(cond, null), batch)
        scale = tirt.batch_weights(omega[stored["t"]])
        terms = (errors * scale).mean(1)
        total = (weights * terms).sum()
        gradients = torch.autograd.grad(total, learned)
        prefix = case["prefix"]
        for name, error, term in zip(DASH().terms, errors, terms, strict=True):
            stored.check(f"{prefix}mse_{name}", error)
            stored.check(f"{prefix}{name}", term)
        stored.check(f"{prefix}omega_hat", scale)
        stored.check(f"{prefix}total", total)
        stored.check(f"{prefix}grad_S_cond", gradients[0])
        stored.check(f"{prefix}grad_S_uncond", gradients[1])
    assert not stored.unchecked()


def mixture(stored, dtype):
    """The exact noise predictor of a mixture of Gaussians, whose weights depend on the class (the vectors' README)."""
    means, spreads = stored["gmm.mu"].to(dtype), stored["gmm.s"].to(dtype)

    def predict(x, t, labels):
        share = SCHEDULE.alphas_cumprod.to(dtype)[t]  # [B]
        priors = stored["gmm.pi"].to(dtype).expand(len(x), -1)
        priors = priors if labels is None else labels.to(dtype) @ stored["gmm.class_pi"].to(dtype)  # [B, M]
        spread = share[:, None] * spreads**2 + 1 - share[:, None]  # [B, M]
        away = x[:, None] - share.sqrt().view(-1, 1, 1, 1, 1) * means  # [B, M, C, H, W]
        fit = -away.square().flatten(2).sum(2) / (2 * spread) - away[0, 0].numel() / 2 * spread.log()
        part = (priors.log() + fit).softmax(1)
        pull = (share.sqrt()[:, None] * spreads**2 / spread).view(*spread.shape, 1, 1, 1)
        image = (part.view(*part.shape, 1, 1, 1) * (means + pull * away)).sum(1)
        return (x - share.sqrt().view(-1, 1, 1, 1) * image) / (1 - share).sqrt().view(-1, 1, 1, 1)

    return predict


@in_both_types
def test_every_stored_guidance_and_walk(vectors_root, dtype, monkeypatch):
    stored = dash.read(vectors_root, "guidance_ddim")
    predict, num_classes = mixture(stored, dtype), len(stored["gmm.class_pi"])
    labels = functional.one_hot(stored["labels"], num_classes)
    x, t = stored["pred.x"].to(dtype), stored["pred.t"]
    cond, null = predict(x, t, labels), predict(x, t, None)
    stored.check("pred.eps_cond", cond)
    stored.check("pred.eps_null", null)
    for name in stored.below("pred.cfg_w"):
        stored.check(f"pred.cfg_w{name}", guidance.guided(cond, null, float(name)))
    monkeypatch.setattr(guidance, "noise_predictor", lambda network, precision: predict)
    network = SimpleNamespace(config=SimpleNamespace(preconditioning="cosine"))
    for case in stored.cases:
        name = case["array"]
        if case["kind"] == "tag":
            assert set(case) == {"kind", "array", "T", "w_min", "w_max", "beta"}
            limits = {key: case[key] for key in ("w_min", "w_max", "beta")}
            weights = [guidance.tag_weight(step, case["T"], **limits) for step in range(case["T"])]
            stored.check(name, torch.tensor(weights, dtype=torch.float64))
            continue
        known = {"null_label", "w_min", "tag_beta", "ddim_steps", "w_eval", "use_tag", "n_model_steps"}
        assert set(case) == known | {"kind", "array"}
        assert case["kind"] == "run"
        assert case["null_label"] == num_classes
        sampler = GuidedSampler(
            num_steps=case["ddim_steps"],
            guidance=case["w_eval"],
            tag_min=case["w_min"] if case["use_tag"] else None,
            tag_beta=case["tag_beta"],
        )
        states = list(sampler.walk(network, stored["x_init"].to(dtype), labels))
        times = guidance.ddim_times(SCHEDULE.num_steps, case["ddim_steps"])
        assert sampler.nfe == case["n_model_steps"] * (1 if sampler.guidance == 1 and not case["use_tag"] else 2)
        stored.check(f"{name}.t", torch.tensor(times))
        stored.check(f"{name}.states", torch.stack(states))
    assert not stored.unchecked()


@in_both_types
def test_every_stored_gap(vectors_root, dtype):
    stored = dash.read(vectors_root, "metrics")
    for case in stored.cases:
        names = ("eps_S_c", "eps_S_u", "eps_T_c", "eps_T_u")
        mine_cond, mine_null, cond, null = (stored[name].to(dtype) for name in names)
        if case["prefix"] == "zero.":
            mine_cond = torch.cat([mine_null[:5], mine_cond[5:]])
        else:
            assert case["prefix"] == "base."
        rows = gap_rows(Predictions(mine_cond, mine_null), Predictions(cond, null))
        assert len(rows) == case["n_pairs"]
        for name, value in gap_metrics(rows).items():
            stored.check(f"{case['prefix']}{name}", value)
    assert not stored.unchecked()


class Tiny(torch.nn.Module):
    """The vectors' own net: h = tanh(conv1(x) + emb[y] + (t / 1000) tvec), conv2(h); the last row stands for null."""

    def __init__(self, state, dtype):
        super().__init__()
        channels, hidden = state["conv2.weight"].shape[:2]
        self.conv1 = torch.nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(hidden, channels, 3, padding=1)
        self.emb = torch.nn.Embedding(*state["emb.weight"].shape)
        self.tvec = torch.nn.Parameter(torch.empty(hidden))
        self.load_state_dict(state)
        self.to(dtype)

    def forward(self, x, t, labels):
        if labels is None:
            labels = x.new_zeros(len(x), len(self.emb.weight) - 1)
        rows = torch.cat([labels.to(x), 1 - labels.to(x).sum(1, keepdim=True)], 1)
        told = rows @ self.emb.weight + t.to(x)[:, None] / 1000 * self.tvec
        return self.conv2(torch.tanh(self.conv1(x) + told[:, :, None, None]))


def batch_of(inputs, draws, index, num_classes, dtype):
    """The stored batch and draws of an update."""
    labels = functional.one_hot(inputs[f"batch{index}.y"], num_classes).to(dtype)
    clean, noise = inputs[f"batch{index}.x0"].to(dtype), draws[f"it{index}.eps"].to(dtype)
    return Batch(clean, noise, draws[f"it{index}.t"], labels)


def learner_of(network, config, weight_decay, logits=None):
    return Learner(
        network,
        lr=config["lr"],
        weight_decay=weight_decay,
        ema=config["ema_decay"],
        grad_clip=config.get("grad_clip", config.get("grad_clip_norm")),
        logits=logits,
    )


STUDENT = {"num_classes", "lr", "lr_min", "num_epochs", "ema_decay", "grad_clip", "weight_decay"}
STUDENT |= {"lam_im", "lam_un", "lam_an", "tirt_snr_gamma"}


@in_both_types
def test_every_stored_training_of_a_student(vectors_root, dtype):
    stored, weights = dash.read(vectors_root, "student_loop"), dash.read(vectors_root, "unet_weights")
    for case in stored.cases:
        assert case["kind"] == "loop"
        assert (set(case["config"]), case["dropout"]) == (STUDENT, 0)
        prefix = case["prefix"]
        if prefix == "tiny.":
            student, teacher = (Tiny(stored.below(f"tiny.{who}."), dtype) for who in ("student", "teacher"))
            watch = check_tiny
        else:
            assert prefix == "unet."
            nets = {net["prefix"]: stored_unet(weights, net, dtype) for net in weights.cases}
            student, teacher = nets["s."], nets["t."]
            watch = check_unet
        train_student(stored, case, student, teacher, watch, dtype)
    assert not stored.unchecked()


def train_student(stored, case, student, teacher, watch, dtype):
    config, prefix = case["config"], case["prefix"]
    method = DASH(lr=config["lr"], lr_min=config["lr_min"], gamma=config["tirt_snr_gamma"], curriculum="tirt")
    objective = Objective(
        weights=(config["lam_an"], config["lam_un"], config["lam_im"]),
        omega=importance(method, SCHEDULE, stored["lambda"].tolist()).to(dtype),
    )
    learner = learner_of(student, config, config["weight_decay"])
    mine, theirs = predictor(learner.network), predictor(teacher)
    frozen = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    for index in range(config["num_epochs"] * case["updates_per_epoch"]):
        batch = batch_of(stored, stored, index, config["num_classes"], dtype)
        assert len(batch) == case["batch"]
        at = f"{prefix}it{index}."
        if f"{at}eps_S_cond" in stored:
            asked = noised(SCHEDULE, batch), batch.t, batch.labels
            for who, network in (("S", mine), ("T", theirs)):
                predictions = Predictions.of(network, *asked)
                stored.check(f"{at}eps_{who}_cond", predictions.cond)
                stored.check(f"{at}eps_{who}_uncond", predictions.null)
        terms = accumulate(mine, theirs, batch, objective, SCHEDULE)
        for name, term in zip(method.terms, terms, strict=True):
            stored.check(f"{at}{name}", term)
        stored.check(f"{at}loss", sum(w * term for w, term in zip(objective.weights, terms, strict=True)))
        gradients = {name: p.grad.clone() for name, p in learner.network.named_parameters()}
        epoch = index // case["updates_per_epoch"]
        norm = learner.step(cosine_rate(method.lr, method.lr_min, epoch, config["num_epochs"]))
        stored.check(f"{at}gradnorm", norm)
        stored.check(f"{at}lr", learner.optimizer.param_groups[0]["lr"])
        watch(stored, case, at, gradients, learner)
    assert all(torch.equal(frozen[name], tensor) for name, tensor in teacher.state_dict().items())


def predictor(network):
    """A U-Net as a run asks it; the tiny net as it is."""
    return network if isinstance(network, Tiny) else noise_predictor(SimpleNamespace(model=network))


def check_tiny(stored, case, at, gradients, learner):
    for name, gradient in gradients.items():
        stored.check(f"{at}grad.{name}", gradient)
        stored.check(f"{at}param.{name}", learner.network.get_parameter(name))
        stored.check(f"{at}ema.{name}", learner.average.get_parameter(name))


def check_unet(stored, case, at, gradients, learner):
    """Some elements of each parameter, and its sums."""
    listed = case["param_order"]
    assert [name for name, *_ in listed] == list(gradients)
    found = {
        "grad": gradients,
        "param": dict(learner.network.named_parameters()),
        "ema": dict(learner.average.named_parameters()),
    }
    for kind, tensors in found.items():
        picks, sums = [], []
        for name, shape, count in listed:
            values = tensors[name].detach().flatten().double()
            assert list(tensors[name].shape) == shape
            picks.append(values[torch.linspace(0, len(values) - 1, count, dtype=torch.float64).floor().long()])
            sums.append(torch.stack([values.sum(), values.square().sum()]))
        stored.check(f"{at}{kind}_pick", torch.cat(picks))
        stored.check(f"{at}{kind}_sums", torch.stack(sums))


@in_both_types
def test_every_stored_training_of_a_teacher(vectors_root, dtype):
    """The curriculum is learned with it: decayed like the network, outside the gradient's limit, and moved by momentum
    where a batch has no such timestep."""
    stored, inputs = dash.read(vectors_root, "teacher_loop"), dash.read(vectors_root, "student_loop")
    for case in stored.cases:
        assert (case["kind"], case["weight_decay_on_lambda"]) == ("teacher loop", True)
        config, network = case["config"], Tiny(stored.below("init."), dtype)
        schedule = discrete.cosine(config["timesteps"])
        logits = torch.nn.Parameter(torch.zeros(config["timesteps"], dtype=dtype))
        learner = learner_of(network, config, case["weight_decay"], logits)
        for index in range(config["num_epochs"] * case["updates_per_epoch"]):
            batch = batch_of(inputs, stored, index, config["num_classes"], dtype)
            errors = denoising_errors(learner.network, batch, schedule)
            loss = tirt_loss(errors, batch.t, logits, schedule, gamma=config["tirt_snr_gamma"])
            loss.backward()
            at = f"it{index}."
            stored.check(f"{at}loss_per_sample", errors)
            stored.check(f"{at}loss", loss)
            stored.check(f"{at}grad_lambda", logits.grad.clone())
            epoch = index // case["updates_per_epoch"]
            norm = learner.step(cosine_rate(config["lr"], config["lr_min"], epoch, config["num_epochs"]))
            stored.check(f"{at}gradnorm", norm)
            stored.check(f"{at}lr", learner.optimizer.param_groups[0]["lr"])
            stored.check(f"{at}lambda", logits)
            for name in stored.below("init."):
                stored.check(f"{at}param.{name}", learner.network.get_parameter(name))
                stored.check(f"{at}ema.{name}", learner.average.get_parameter(name))
    assert not stored.unchecked()
