"""What a network makes, to look at and to measure: grids of images, Fréchet distances."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdense_core import data, seeds
from bdense_core.checkpoints import load_network
from bdense_core.devices import check_device, place
from bdense_core.errors import BadValue, BDenseError, CheckpointError
from bdense_core.evaluation import Metric, reference_statistics
from bdense_core.features import load_features
from bdense_core.files import write_atomically
from bdense_core.images import readable, write_grid, write_pngs
from bdense_core.networks import Denoiser
from bdense_core.sampling import AnySampler, draw, sampler_of, teacher_sampler
from bdense_core.task import Evaluation
from search.model_files import check_reference, features_name, find, is_teacher
from search.progress import Meter

_SAMPLES = 50_000
"""As everybody's FID."""


def draw_samples(
    source: str,
    output: Path,
    *,
    count: int,
    seed: int,
    models: Path | None = None,
    columns: int | None = None,
    scale: int | None = None,
    label: int | None = None,
    solver: str | None = None,
    steps: int | None = None,
    png: Path | None = None,
    npz: Path | None = None,
    batch: int = 64,
    device: str = "cpu",
) -> int:
    """Write images of a network as a grid, and on request one by one and as an array; returns the NFE."""
    network, sampler = _opened(source, models, solver, steps, device)
    parts: list[Tensor] = []
    if png is not None:
        _make(png)
    for images in draw(network, sampler, count=count, seed=seed, label=label, batch=batch):
        if png is not None:
            write_pngs(images, png, first=sum(map(len, parts)))
        parts.append(images)
    images = torch.cat(parts)
    if npz is not None:
        pixels = images.permute(0, 2, 3, 1).numpy()
        _write_npz(npz, pixels)
    large = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3) if scale else readable(images)
    write_grid(large, output, columns or math.ceil(math.sqrt(count)))
    return sampler.nfe


def score(
    source: str,
    models: Path,
    *,
    features: str,
    reference: str,
    count: int | None,
    seed: int,
    solver: str | None,
    steps: int | None,
    batch: int,
    device: str,
) -> dict[str, Any]:
    """The Fréchet distance of a network's samples, or of images, and what it may be compared with.

    Args:
        count: samples, or images drawn by `seed`; None: 50,000 samples, or all images.

    Raises:
        BDenseError: a file is missing or damaged, or the reference was made with other features.
    """
    files = [find(features, "features", folder=Path(), models=models)]
    files.append(find(reference, "reference", folder=Path(), models=models))
    check_reference(*files)
    is_network = source.endswith(".safetensors") or is_teacher(source, models)
    if is_network:
        count = count or _SAMPLES
    else:
        images, _ = data.load(source)
        count = count or len(images)
        if len(images) < count:
            raise BadValue(f"{source} holds {len(images)} images, fewer than --count {count}")
        chosen = torch.randperm(len(images), generator=seeds.generator(seed, "subset"))[:count].sort().values
    evaluation = Evaluation(
        features_name=features_name(files[0]), features=files[0], reference=files[1], n_samples=count, seed=seed,
        batch=batch,
    )  # fmt: skip
    metric = Metric(evaluation, str(check_device(device)))
    if is_network:
        network, sampler = _opened(source, models, solver, steps, device)
        config = network.config
        shape = (config.img_channels, config.img_resolution, config.img_resolution)
        with Meter(evaluation.protocol.metric, images=count) as meter:
            value = meter.count(metric.measure(sampler.bind(network), shape, config.label_dim))
        about: dict[str, Any] = {"nfe": sampler.nfe, "seed": seed}
    else:
        value = metric.distance(reference_statistics(images[chosen], load_features(files[0], device)))
        about = {"seed": seed} if count < len(images) else {}
    name = evaluation.protocol.metric
    return {"metric": name, "value": value, **about, "source": source, "protocol": evaluation.protocol.to_dict()}


def _opened(
    source: str, models: Path | None, solver: str | None, steps: int | None, device: str
) -> tuple[Denoiser, AnySampler]:
    """A network on its device, and how it makes images.

    Raises:
        BadValue: a solver for a student, which has its own.
        CheckpointError: it cannot be read.
    """
    if Path(source).suffix == ".pkl":
        raise CheckpointError(f"{source} is a pickle; make it a teacher with: bdense-weights import-teacher {source}")
    file = find(source, "teacher", folder=Path(), models=models)
    own = sampler_of(file.path)
    if own is not None and (solver or steps):
        raise BadValue(f"{source} has a sampler of its own, of NFE {own.nfe}; leave --solver and --steps out")
    network = place(load_network(file), check_device(device))
    return network, own or teacher_sampler(solver or "dpmpp", steps or 12)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BDenseError(f"cannot make the folder {folder}: {error.strerror or error}") from error


def _write_npz(path: Path, pixels: "np.ndarray[Any, Any]") -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, images=pixels)

    try:
        write_atomically(path, write)
    except OSError as error:
        raise BDenseError(f"cannot write {path}: {error.strerror or error}") from error
