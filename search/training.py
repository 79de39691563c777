"""What a study needs and nobody has published: a teacher of one's own, and reference statistics."""

import hashlib
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bdense_core import data
from bdense_core.checkpoints import save_network
from bdense_core.devices import check_device
from bdense_core.errors import BadValue, BDenseError
from bdense_core.evaluation import reference_statistics
from bdense_core.features import load_features
from bdense_core.frechet import save_statistics, statistics_from_npz
from bdense_core.guidance import GuidedSampler
from bdense_core.loops import dash_teacher
from bdense_core.loops.dash_teacher import TeacherTraining
from bdense_core.network_config import NetworkConfig
from bdense_core.networks import Denoiser
from bdense_core.pretraining import Pretraining, preset, pretrain
from bdense_core.snapshots import Snapshots
from bdense_core.task import Progress
from search.judging import draw_samples
from search.model_files import find
from search.progress import Meter
from search.version import code_version

_SHOWN = 64
"""Images in the grid that comes with a teacher."""


Training = Generator[Progress, None, tuple[Denoiser, dict[str, Any]]]
"""Signs of life, then a network, and what its file says of it beside where it comes from."""


@dataclass(frozen=True)
class AsEDM:
    """A denoiser as Karras et al. train it (arXiv 2206.00364), told the classes or not."""

    settings: Pretraining
    channels: int
    conditional: bool = False

    def config(self, images: Tensor, labels: Tensor) -> NetworkConfig:
        return preset(images, int(labels.max()) + 1 if self.conditional else 0, self.channels)

    def run(
        self, images: Tensor, labels: Tensor, config: NetworkConfig, *, device: str, snapshots: Snapshots
    ) -> Training:
        network = yield from pretrain(images, labels, config, self.settings, device=device, snapshots=snapshots)
        return network, {}


@dataclass(frozen=True)
class AsDASH:
    """A DDPM with classes that are dropped now and then, for guidance, and TIRT's curriculum (arXiv 2606.00798)."""

    settings: TeacherTraining
    channels: int
    conditional: Literal[True] = True

    def config(self, images: Tensor, labels: Tensor) -> NetworkConfig:
        return dash_teacher.preset(images, int(labels.max()) + 1, self.channels)

    def run(
        self, images: Tensor, labels: Tensor, config: NetworkConfig, *, device: str, snapshots: Snapshots
    ) -> Training:
        made = yield from dash_teacher.pretrain(
            images, labels, config, self.settings, device=device, snapshots=snapshots
        )
        sampler = GuidedSampler(num_steps=50, guidance=1.5)
        return made.network, {"tirt": made.tirt, "sampler": sampler.to_dict()}


def train(dataset: str, recipe: AsEDM | AsDASH, target: Path, *, device: str) -> dict[str, Any]:
    """Train a teacher on a data set and write it, with a grid of its samples beside it.

    Raises:
        BDenseError: whatever stopped it; run again, it goes on from its last snapshot.
    """
    kind = check_device(device).type
    images, labels = data.load(dataset)
    if recipe.conditional and int(labels.max()) == 0:
        raise BadValue(f"{dataset} has one class or no labels; leave --conditional and --guided out")
    config, settings = recipe.config(images, labels), recipe.settings
    digest = hashlib.sha256(data.to_uint8(images).numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    identity = {"images_sha256": digest, "network": config.to_dict(), "settings": settings.to_dict(), "device": kind}
    snapshots = Snapshots(target.parent / "training", identity=identity)
    resumes = any((target.parent / "training").glob("snapshot-*"))
    with Meter("loss", images=settings.budget_kimg * 1000, resumes=resumes) as meter:
        training = _Kept(recipe.run(images, labels, config, device=device, snapshots=snapshots))
        for _ in meter.watch(training.run()):
            pass
    network, more = training.result
    about = {
        "dataset": {"name": Path(dataset).name, "images": len(images), "images_sha256": digest},
        "training": settings.to_dict(),
        "weights": "moving average",
        "code_version": code_version(),
    } | more
    made = save_network(network, target.parent / "training" / target.name, about)
    draw_samples(made.path, target.with_suffix(".png"), count=_SHOWN, seed=0, device=device)
    Path(made.path).replace(target)  # last: a file of this name ends the matter
    shutil.rmtree(target.parent / "training", ignore_errors=True)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    found = {"teacher": target.parent.name, "path": str(target), "sha256": made.sha256, "parameters": parameters}
    return found | {key: value for key, value in about.items() if key not in more}


class _Kept:
    """A generator that keeps what it returns."""

    result: Any = None

    def __init__(self, generator: Generator[Progress, None, Any]) -> None:
        self._generator = generator

    def run(self) -> Generator[Progress, None, None]:
        self.result = yield from self._generator


def make_reference(
    target: Path,
    models: Path,
    *,
    features: str,
    dataset: str | None,
    statistics: Path | None,
    images: int | None,
    device: str,
) -> dict[str, Any]:
    """Write reference statistics, of a data set or taken over from a published file.

    Raises:
        BDenseError: a file is missing or damaged, or cannot be written.
    """
    check_device(device)
    network = load_features(find(features, "features", folder=Path(), models=models), device)
    if statistics is not None and images is not None:
        made = statistics_from_npz(statistics, features=network.identity, n_samples=images)
    else:
        assert dataset is not None
        made = reference_statistics(data.load(dataset)[0], network)
    try:
        digest = save_statistics(made, target)
    except OSError as error:
        raise BDenseError(f"cannot write {target}: {error.strerror or error}") from error
    return {"path": str(target), "sha256": digest, "features": network.identity, "n_samples": made.n_samples}
