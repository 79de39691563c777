"""Distillations of a few seconds: a network of a few thousand weights, drawn ones, and what a run of it needs."""

from pathlib import Path

import torch

from bdense_core import data
from bdense_core.branches import freeze
from bdense_core.distill import distill
from bdense_core.evaluation import reference_statistics
from bdense_core.features import DigitsFeatures, load_features, save_features
from bdense_core.files import HashedFile
from bdense_core.frechet import save_statistics
from bdense_core.methods.sfd import SFD
from bdense_core.networks import NetworkConfig, build
from bdense_core.task import Evaluation, Score

CONFIG = NetworkConfig.ddpmpp(
    img_resolution=8,
    img_channels=1,
    model_channels=8,
    channel_mult=[1, 2],
    num_blocks=1,
    attn_resolutions=[4],
    dropout=0.0,
)
METHOD = SFD(nfe=2, num_branches=4, lr=1e-3, batch=4, budget_kimg=0.012)
SHAPE = (1, 8, 8)


def network(config=CONFIG, seed=0):
    """A teacher whose every weight is drawn, so that no layer hides behind its zero start."""
    torch.manual_seed(seed)
    denoiser = build(config)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.normal_(0, 0.2)
    return freeze(denoiser)


def make_evaluation(folder: Path, **settings) -> Evaluation:
    """With features of random weights: a distance all the same."""
    torch.manual_seed(0)
    features = save_features(DigitsFeatures(width=8), folder / "features.safetensors", name="digits")
    path = folder / "reference.safetensors"
    digest = save_statistics(reference_statistics(data.load("digits")[0], load_features(features)), path)
    return Evaluation(
        features_name="digits",
        features=features,
        reference=HashedFile(path=str(path), sha256=digest),
        **{"n_samples": 40, "seed": 5, "batch": 40} | settings,
    )


def scores(method, task, repeats=()):
    return [event for event in distill(method, task, repeats) if isinstance(event, Score)]


def flat(student):
    return torch.cat([p.detach().flatten() for p in student.parameters()])
