"""Train the feature network and the teacher of a digits study, and describe what came out.

Writes into `bdense_core/assets/NAME`, NAME being `digits` or `digits16`: `features.safetensors`,
`reference.safetensors`, `teacher.safetensors`, `card.json` (the hashes that loading checks, and the figures) and
`CARD.md` (the same for people).
One thread and fixed seeds: on one machine a second run gives the same three files bit for bit.

    python tools/make_digits_assets.py                     # the 8x8 digits, five to eight minutes
    python tools/make_digits_assets.py digits16            # the 16x16 ones, about six minutes
    python tools/make_digits_assets.py digits16 --check    # retrain elsewhere, compare hashes and figures
"""

import datetime
import json
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy
import sklearn
import torch

from bdense_core import assets, data
from bdense_core.branches import freeze
from bdense_core.checkpoints import load_network, save_network
from bdense_core.evaluation import Metric, reference_statistics
from bdense_core.feature_training import FeatureTraining, train_features
from bdense_core.features import load_features, save_features
from bdense_core.files import HashedFile, canonical_json, write_text_atomically
from bdense_core.frechet import save_statistics
from bdense_core.loops import sfd
from bdense_core.methods.sfd import SFD
from bdense_core.networks import Denoiser, NetworkConfig
from bdense_core.pretraining import Pretraining, pretrain
from bdense_core.protocol import UINT8
from bdense_core.task import Evaluation

FEATURES = FeatureTraining(seed=0)
N_SAMPLES, EVALUATION_SEED = 2000, 0
FIGURES_TOLERANCE = 0.15
"""Largest relative difference on another machine: other CPUs round otherwise, and training amplifies it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One folder of assets: the data set of that name, and what is trained on it."""

    name: str
    title: str
    dataset: str
    """Where the images are from, for people."""
    command: str
    network: NetworkConfig
    teacher: Pretraining

    @property
    def folder(self) -> Path:
        return Path(assets.__file__).parent / self.name


DIGITS = Recipe(
    name="digits",
    title="The digits assets",
    dataset="scikit-learn's digits: 1797 images of 8x8, test part of UCI's Optical Recognition of Handwritten Digits",
    command="python tools/make_digits_assets.py",
    network=NetworkConfig.ddpmpp(
        img_resolution=8,
        img_channels=1,
        model_channels=16,
        channel_mult=(1, 2, 2),
        channel_mult_emb=2,
        num_blocks=1,
        attn_resolutions=(),  # the middle block at 2x2 has attention anyway
        dropout=0.0,
    ),
    teacher=Pretraining(seed=0),
)
DIGITS16 = Recipe(
    name="digits16",
    title="The digits16 assets",
    dataset="scikit-learn's digits (1797 images, test part of UCI's Optical Recognition of Handwritten Digits), "
    "enlarged to 16x16 by Pillow's bicubic filter, with their ten classes",
    command="python tools/make_digits_assets.py digits16",
    network=NetworkConfig.adm(
        img_resolution=16,
        img_channels=1,
        label_dim=10,
        model_channels=8,
        channel_mult=(1, 2, 8),  # most weights are where pixels are few; 64 channels make ADM's one head
        num_blocks=1,
        attn_resolutions=(4,),
        dropout=0.0,
    ),
    teacher=Pretraining(seed=0, budget_kimg=100.0, batch=64, ema_halflife_kimg=10.0),
)
RECIPES = {recipe.name: recipe for recipe in (DIGITS, DIGITS16)}


def make(recipe: Recipe, folder: Path, *, keep_teacher: bool = False) -> dict[str, Any]:
    """Train everything, write the three files into `folder`, return the card."""
    images, labels = data.load(recipe.name)
    trained, found = train_features(data.to_uint8(images), labels, FEATURES)
    features = save_features(trained, folder / "features.safetensors", name=recipe.name)
    path = folder / "reference.safetensors"
    reference = HashedFile(
        path=str(path), sha256=save_statistics(reference_statistics(images, load_features(features)), path)
    )
    click.echo(f"features: {found}; now the teacher", err=True)
    if keep_teacher:
        teacher = assets.hashed(f"{recipe.name}/teacher.safetensors")
    else:
        about = {
            "dataset": recipe.name,
            "training": recipe.teacher.to_dict(),
            "command": recipe.command,
            "weights": "moving average",
        }
        network = train_teacher(recipe, images, labels)
        teacher = save_network(network, folder / "teacher.safetensors", about)
    return {
        "dataset": recipe.dataset,
        "command": recipe.command,
        "files": {Path(f.path).name: _file(f) for f in (features, reference, teacher)},
        "settings": {
            "features": asdict(FEATURES), "teacher": recipe.teacher.to_dict(), "network": recipe.network.to_dict(),
            "evaluation": {"n_samples": N_SAMPLES, "seed": EVALUATION_SEED, "preparation": UINT8},
        },
        "figures": {
            "features_accuracy": found.accuracy, "features_rebuild_mse": found.rebuild_mse,
            **measure(recipe, teacher, features, reference),
        },
        "made": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
            "scikit-learn": sklearn.__version__, "machine": f"{platform.machine()}, {_cpu()}, 1 thread",
        },
    }  # fmt: skip


def train_teacher(recipe: Recipe, images: torch.Tensor, labels: torch.Tensor) -> Denoiser:
    """The trained teacher; says on the way how far it is."""
    training = pretrain(images, labels, recipe.network, recipe.teacher)
    said = -1
    while True:
        try:
            progress = next(training)
        except StopIteration as end:
            teacher: Denoiser = end.value
            return teacher
        if int(progress.done * 10) > said:
            said = int(progress.done * 10)
            budget = recipe.teacher.budget_kimg
            click.echo(f"teacher: {progress.kimg:.0f} of {budget:g} kimg, loss {progress.loss:.4f}", err=True)


def measure(recipe: Recipe, teacher_file: HashedFile, features: HashedFile, reference: HashedFile) -> dict[str, float]:
    """The figures of a teacher: its size, its distance, and that of a student that has learned nothing."""
    teacher = load_network(teacher_file)
    freeze(teacher)
    metric = Metric(
        Evaluation(
            features_name=recipe.name, features=features, reference=reference, n_samples=N_SAMPLES,
            seed=EVALUATION_SEED, batch=500,
        )
    )  # fmt: skip
    method = SFD(num_branches=4)
    grid = sfd.make_grid(method)
    network = recipe.network
    shape = (network.img_channels, network.img_resolution, network.img_resolution)

    def distance(sample: Any) -> float:
        return metric(sample, shape, network.label_dim)

    return {
        "teacher_parameters": _parameters(teacher),
        "teacher_12_steps_fd": distance(lambda z, y: sfd.teacher_states(teacher, z, grid, y)[:, -1, -1]),
        "untrained_student_nfe2_fd": distance(lambda z, y: sfd.sample(teacher, z, grid, y)),
    }


def _parameters(network: Denoiser) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _file(file: HashedFile) -> dict[str, Any]:
    return {"sha256": file.sha256, "bytes": Path(file.path).stat().st_size}


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


USE = """Intended use: searches, comparisons and tests that take minutes on a CPU. Not for reading digits or making
images, and no evidence about methods at full size: images so few and so small are a toy. A distance also rewards
remembering the images.

Licence: Apache-2.0, no published weights are in it. Data: Optical Recognition of Handwritten Digits, E. Alpaydin and
C. Kaynak, 1998, UCI Machine Learning Repository (doi 10.24432/C50P49), CC BY 4.0. More: `docs/cards.md`.
"""
"""How the card of every shipped folder ends."""


def describe(recipe: Recipe, card: dict[str, Any]) -> str:
    """The card for people, in Markdown."""
    figures, made = card["figures"], card["made"]
    files = "\n".join(f"| `{name}` | {f['bytes']} | `{f['sha256']}` |" for name, f in card["files"].items())
    name = recipe.name
    return f"""# {recipe.title}

Made by `{card["command"]}` on {made["date"]}
(Python {made["python"]}, torch {made["torch"]}, numpy {made["numpy"]}, scikit-learn {made["scikit-learn"]};
{made["machine"]}).
Data: {card["dataset"]}.
Run again on the same machine it gives the same files bit for bit; `--check` retrains and compares.

| file | bytes | sha256 |
| --- | --- | --- |
{files}

| figure | value |
| --- | --- |
| features: accuracy on the {FEATURES.held_out:.0%} of images held out | {figures["features_accuracy"]:.4f} |
| features: squared error of their rebuilt pixels (-1 to 1) | {figures["features_rebuild_mse"]:.4f} |
| teacher: parameters | {figures["teacher_parameters"]} |
| teacher, DPM-Solver++(3M), 12 steps: fd-{name} | {figures["teacher_12_steps_fd"]:.3f} |
| untrained student, NFE 2: fd-{name} | {figures["untrained_student_nfe2_fd"]:.2f} |

fd-{name} is a Fréchet distance of these features, not an FID. Here: {N_SAMPLES} samples of seed
{EVALUATION_SEED}, `{UINT8}`, against all 1797 images, which the teacher was trained on too.

Settings of the teacher: `{canonical_json(card["settings"]["teacher"])}`.
Its network: `{canonical_json(card["settings"]["network"])}`.
Settings of the feature network: `{canonical_json(card["settings"]["features"])}`.

{USE}"""


def compare(made: dict[str, Any], shipped: dict[str, Any]) -> bool:
    """Say how a retrained set differs from the shipped one; whether the figures agree."""
    for name, file in shipped["files"].items():
        same = made["files"][name]["sha256"] == file["sha256"]
        click.echo(f"{name}: {'the same bytes' if same else 'other bytes (another machine or version?)'}")
    agree = True
    for name, value in shipped["figures"].items():
        close = abs(made["figures"][name] - value) <= FIGURES_TOLERANCE * abs(value)
        agree &= close
        click.echo(f"{name}: {made['figures'][name]:.6g}, shipped {value:.6g}{'' if close else '  DIFFERS'}")
    return agree


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.argument("name", type=click.Choice(sorted(RECIPES)), default="digits")
@click.option("--check", is_flag=True, help="Retrain in a temporary folder and compare; write nothing.")
@click.option("--keep-teacher", is_flag=True, help="Train the features and the reference only.")
def main(name: str, check: bool, keep_teacher: bool) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    recipe = RECIPES[name]
    if check:
        with tempfile.TemporaryDirectory() as folder:
            agree = compare(make(recipe, Path(folder)), assets.card(name))
        sys.exit(0 if agree else 1)
    card = make(recipe, recipe.folder, keep_teacher=keep_teacher)
    write_text_atomically(recipe.folder / "card.json", json.dumps(card, indent=2, sort_keys=True) + "\n")
    write_text_atomically(recipe.folder / "CARD.md", describe(recipe, card))
    click.echo(json.dumps(card["figures"], indent=2))


if __name__ == "__main__":
    main()
