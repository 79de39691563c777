"""One network at a time: train a teacher, distil a student, draw from it, score it. No database, no Ray."""

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdense_core import data
from bdense_core.checkpoints import load_network, save_network
from bdense_core.devices import check_device, place
from bdense_core.errors import BadValue, BDenseError
from bdense_core.evaluation import Metric, reference_statistics
from bdense_core.features import load_features
from bdense_core.files import HashedFile, sha256_of_file, write_atomically, write_text_atomically
from bdense_core.frechet import save_statistics, statistics_from_npz
from bdense_core.images import write_grid, write_pngs
from bdense_core.integrity import check_file
from bdense_core.networks import Denoiser
from bdense_core.pretraining import Pretraining, preset, pretrain
from bdense_core.sampling import Sampler, draw, sampler_of, teacher_sampler
from bdense_core.snapshots import Snapshots
from bdense_core.task import Evaluation, Progress, Score
from bdense_core.weights import Weights, shares
from search.model_files import check_reference, features_name, find
from search.preflight import preflight
from search.progress import Meter
from search.settings import Settings
from search.spec import Study, identity_of
from search.version import PACKAGES, code_version, package_version

_SHOWN = 64
"""Images in the grid that comes with a result."""


# --- distil ---------------------------------------------------------------------------------------------


def distill(
    study: Study, weights: Weights, settings: Settings, *, output: Path, seed: int | None, device: str | None
) -> dict[str, Any]:
    """One distillation of a study, in a folder: `student.safetensors`, `samples.png`, `result.json`.

    Raises:
        BDenseError: whatever stopped it; run again, it goes on from its last snapshot.
    """
    if not study.spec.method.needs_teacher:
        raise BadValue(f"method {study.spec.method.kind} trains no network; there is nothing to distil")
    task = study.task(weights, study.spec.seeds.training if seed is None else seed, cache_root=settings.cache)
    task = dataclasses.replace(
        task,
        device=device or task.device,
        snapshots=str(output / "snapshots"),
        output=str(output / "student.safetensors"),
    )
    asked = {"study": identity_of(study.to_dict()), "weights": list(weights), "seed": task.seed}
    if (done := _earlier(output / "result.json", asked)) is not None:
        return done
    check_device(task.device)
    preflight(study, settings)
    begin = time.monotonic()
    with Meter(study.metric, images=study.spec.method.budget_kimg * 1000) as meter:
        events = meter.watch(study.spec.method.run(task))
        scores = [(event.kimg, event.value) for event in events if isinstance(event, Score)]
    assert task.output is not None and study.evaluation is not None
    result = {
        "schema": "bdense-run/1",
        "metric": study.metric,
        "value": scores[-1][1],
        "scores": [{"kimg": kimg, "value": value} for kimg, value in scores],
        "weights": list(weights),
        "shares": list(shares(weights)),
        "seed": task.seed,
        "nfe": study.spec.method.nfe,
        "student": {"path": task.output, "sha256": sha256_of_file(Path(task.output))},
        "protocol": study.evaluation.protocol.to_dict(),
        "device": task.device,
        "seconds": round(time.monotonic() - begin, 1),
        "code_version": code_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "asked": asked,
    }
    draw_samples(
        Path(task.output), output / "samples.png", count=_SHOWN, seed=study.evaluation.seed, device=task.device
    )
    write_text_atomically(output / "result.json", json.dumps(result, indent=2) + "\n")
    shutil.rmtree(output / "snapshots", ignore_errors=True)
    return result


def _earlier(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The result that is there already, if it is the one that is asked for.

    Raises:
        BDenseError: it is another run's.
    """
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BDenseError(f"{path} cannot be read: {error}; choose another --output") from error
    if found.get("asked") != json.loads(json.dumps(asked)):
        raise BDenseError(f"{path.parent} holds the result of another run; choose another --output")
    return found


# --- teachers -------------------------------------------------------------------------------------------


def train(
    dataset: str, settings: Pretraining, target: Path, *, channels: int, conditional: bool, device: str
) -> dict[str, Any]:
    """Train a teacher on a data set and write it, with a grid of its samples beside it.

    Raises:
        BDenseError: whatever stopped it; run again, it goes on from its last snapshot.
    """
    kind = check_device(device).type
    images, labels = data.load(dataset)
    config = preset(images, int(labels.max()) + 1 if conditional else 0, channels)
    digest = hashlib.sha256(data.to_uint8(images).numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    identity = {"images_sha256": digest, "network": config.to_dict(), "settings": settings.to_dict(), "device": kind}
    snapshots = Snapshots(target.parent / "training", identity=identity)
    with Meter("loss", images=settings.budget_kimg * 1000) as meter:
        training = _kept(pretrain(images, labels, config, settings, device=device, snapshots=snapshots))
        for _ in meter.watch(training):
            pass
    network: Denoiser = training.result
    about = {
        "dataset": {"name": Path(dataset).name, "images": len(images), "images_sha256": digest},
        "training": settings.to_dict(),
        "weights": "moving average",
        "code_version": code_version(),
    }
    made = save_network(network, target, about)
    draw_samples(target, target.with_suffix(".png"), count=_SHOWN, seed=0, device=device)
    snapshots.clear()
    shutil.rmtree(target.parent / "training", ignore_errors=True)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"teacher": target.parent.name, "path": made.path, "sha256": made.sha256, "parameters": parameters, **about}


class _kept(Iterator[Progress]):  # noqa: N801  (reads as a function)
    """A generator that keeps what it returns."""

    result: Any = None

    def __init__(self, generator: Generator[Progress, None, Any]) -> None:
        self._generator = generator

    def __next__(self) -> Progress:
        try:
            return next(self._generator)
        except StopIteration as end:
            self.result = end.value
            raise


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


# --- sample and score -----------------------------------------------------------------------------------


def draw_samples(
    path: Path,
    output: Path,
    *,
    count: int,
    seed: int,
    columns: int | None = None,
    label: int | None = None,
    solver: str | None = None,
    steps: int | None = None,
    png: Path | None = None,
    npz: Path | None = None,
    batch: int = 64,
    device: str = "cpu",
) -> int:
    """Write images of a network as a grid, and on request one by one and as an array; returns the NFE."""
    network, sampler = _opened(path, solver, steps, device)
    parts: list[Tensor] = []
    for images in draw(network, sampler, count=count, seed=seed, label=label, batch=batch):
        if png is not None:
            png.mkdir(parents=True, exist_ok=True)
            write_pngs(images, png, first=sum(map(len, parts)))
        parts.append(images)
    images = torch.cat(parts)
    if npz is not None:
        pixels = images.permute(0, 2, 3, 1).numpy()
        _write_npz(npz, pixels)
    write_grid(images, output, columns or math.ceil(math.sqrt(count)))
    return sampler.nfe


def score(
    source: str,
    models: Path,
    *,
    features: str,
    reference: str,
    count: int,
    seed: int,
    solver: str | None,
    steps: int | None,
    batch: int,
    device: str,
) -> dict[str, Any]:
    """The Fréchet distance of a network's samples, or of images, and what it may be compared with.

    Raises:
        BDenseError: a file is missing or damaged, or the reference was made with other features.
    """
    files = [find(features, "features", folder=Path(), models=models)]
    files.append(find(reference, "reference", folder=Path(), models=models))
    check_reference(*files)
    evaluation = Evaluation(
        features_name=features_name(files[0]), features=files[0], reference=files[1], n_samples=count, seed=seed,
        batch=batch,
    )  # fmt: skip
    metric = Metric(evaluation, str(check_device(device)))
    if source.endswith(".safetensors"):
        network, sampler = _opened(Path(source), solver, steps, device)
        config = network.config
        shape = (config.img_channels, config.img_resolution, config.img_resolution)
        with Meter(evaluation.protocol.metric, images=count) as meter:
            value = meter.count(metric.measure(lambda z, y: sampler(network, z, y), shape, config.label_dim))
        about: dict[str, Any] = {"nfe": sampler.nfe, "seed": seed}
    else:
        images, _ = data.load(source)
        if len(images) < count:
            raise BadValue(f"{source} holds {len(images)} images, fewer than --count {count}")
        value = metric.distance(reference_statistics(images[:count], load_features(files[0], device)))
        about = {}
    name = evaluation.protocol.metric
    return {"metric": name, "value": value, **about, "source": source, "protocol": evaluation.protocol.to_dict()}


def _opened(path: Path, solver: str | None, steps: int | None, device: str) -> tuple[Denoiser, Sampler]:
    """A network on its device, and how it makes images.

    Raises:
        BadValue: a solver for a student, which has its own.
    """
    try:
        file = HashedFile(path=str(path), sha256=sha256_of_file(path))
    except OSError as error:
        raise BadValue(f"cannot read the network {path}: {error.strerror or error}") from error
    own = sampler_of(str(path))
    if own is not None and (solver or steps):
        raise BadValue(f"{path} is a student for NFE {own.nfe}; leave --solver and --steps out")
    check_file(file)
    network = place(load_network(file), check_device(device))
    return network, own or teacher_sampler(solver or "dpmpp", steps or 12)


def _write_npz(path: Path, pixels: "np.ndarray[Any, Any]") -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, images=pixels)

    try:
        write_atomically(path, write)
    except OSError as error:
        raise BDenseError(f"cannot write {path}: {error.strerror or error}") from error
