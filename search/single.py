"""One distillation of a study file, in a folder, without a database: what a trial does, for a person to look at."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from bdense_core.devices import check_device
from bdense_core.errors import BadValue, BDenseError
from bdense_core.files import sha256_of_file, write_text_atomically
from bdense_core.methods.base import with_settings
from bdense_core.task import Score
from bdense_core.weights import shares
from search.judging import draw_samples
from search.preflight import preflight
from search.progress import Meter
from search.sections import Arm
from search.settings import Settings
from search.spec import Study, identity_of
from search.version import code_version, packages

_OURS = {"student.safetensors", "samples.png", "result.json", "snapshots"}
_SHOWN = 64
"""Images in the grid that comes with a result."""


def distill(
    study: Study, arm: Arm, settings: Settings, *, output: Path, seed: int | None, device: str | None
) -> dict[str, Any]:
    """One distillation of a study, in a folder: `student.safetensors`, `samples.png`, `result.json`.

    Args:
        arm: the weights, and settings of the method that take the place of the study's.

    Raises:
        BDenseError: whatever stopped it; run again, it goes on from its last snapshot.
    """
    weights, method = arm.weights, with_settings(study.spec.method, arm.settings)
    if not method.needs_teacher or not arm.is_trained:
        raise BadValue(f"{arm.name} of the method {method.kind} trains no network; there is nothing to distil")
    task = study.task(weights, study.spec.seeds.training if seed is None else seed, cache_root=settings.cache)
    task = dataclasses.replace(
        task,
        device=device or task.device,
        snapshots=str(output / "snapshots"),
        output=str(output / "student.safetensors"),
    )
    _check_output(output)
    asked = {
        "study": identity_of(study.to_dict()),
        "weights": list(weights),
        **({"settings": dict(arm.settings)} if arm.settings else {}),
        "seed": task.seed,
        "device": task.device.partition(":")[0],
    }
    if (done := _earlier(output / "result.json", asked)) is not None:
        return done
    check_device(task.device)
    preflight(study, settings)
    begin = time.monotonic()
    torch.set_num_threads(max(1, int(study.spec.resources.cpus)))  # as a trial of the study: the same value
    resumes = any((output / "snapshots").glob("snapshot-*"))
    with Meter(study.metric, images=method.budget_kimg * 1000, resumes=resumes) as meter:
        scores = [event for event in meter.watch(method.run(task)) if isinstance(event, Score)]
    assert task.output is not None and study.evaluation is not None
    result = {
        "schema": "bdense-run/1",
        "metric": study.metric,
        "value": scores[-1].value,
        "metrics": scores[-1].metrics,
        "scores": [{"kimg": score.kimg, "value": score.value} for score in scores],
        "weights": list(weights),
        "settings": dict(arm.settings),
        "shares": list(shares(weights)),
        "seed": task.seed,
        "nfe": method.nfe,
        "student": {"path": task.output, "sha256": sha256_of_file(Path(task.output))},
        "protocol": study.evaluation.protocol.to_dict(),
        "device": task.device,
        "last_session_s": round(time.monotonic() - begin, 1),
        "code_version": code_version(),
        "packages": packages(),
        "asked": asked,
    }
    draw_samples(task.output, output / "samples.png", count=_SHOWN, seed=study.evaluation.seed, device=task.device)
    write_text_atomically(output / "result.json", json.dumps(result, indent=2) + "\n")
    shutil.rmtree(output / "snapshots", ignore_errors=True)
    return result


def _check_output(output: Path) -> None:
    """A folder of its own: what else is in it would be mixed with the result.

    Raises:
        BadValue: it is a file, or holds something else.
    """
    if output.exists() and not output.is_dir():
        raise BadValue(f"--output {output} is a file; name a folder, which may not exist yet")
    if output.is_dir() and (others := sorted({path.name for path in output.iterdir()} - _OURS)):
        raise BadValue(f"--output {output} holds other things, such as {others[0]}; name a new folder")


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
    if not (path.parent / "student.safetensors").exists():
        return None
    if found.get("asked") != json.loads(json.dumps(asked)):
        raise BDenseError(f"{path.parent} holds the result of another run; choose another --output")
    return found
