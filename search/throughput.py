"""How fast a device works on a study: what was measured on it, and kept for later plans."""

import json
import logging
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bdense_core.files import sha256_of, write_text_atomically
from search.settings import Settings
from search.spec import Study
from search.version import package_version

FORMAT = 1
"""Of what is kept; older ones are not found any more once this is raised."""
_CPUINFO = Path("/proc/cpuinfo")
_OF_NO_MATTER = ("budget_kimg", "lr")
"""Settings that every trained method has and that change how long a run is, or how good, but not how fast."""

Seconds = dict[str, float]
"""Of one network evaluation, by the names of a plan's `network_evaluations`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What was measured, where and when."""

    seconds: Seconds
    device: str
    measured: str
    """ISO 8601, in UTC."""

    @property
    def source(self) -> str:
        """In words for people."""
        return f"measured here on {self.device} at {self.measured}"


def threads(study: Study) -> int:
    """CPU threads of a trial."""
    return max(1, int(study.spec.resources.cpus))


def device_name(study: Study) -> str | None:
    """What the study's trials would compute on here; None if they need a GPU and torch sees none."""
    if study.spec.resources.gpus:
        import torch

        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines() if _CPUINFO.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, None) or platform.processor() or platform.machine()


def stored(study: Study, settings: Settings) -> Throughput | None:
    """What was measured for such a study on this device, if it was; one that cannot be read counts as not measured."""
    if study.teacher is None or study.evaluation is None or not settings.throughput.is_dir():
        return None
    device = device_name(study)
    if device is None or not (path := _path(study, device, settings)).exists():
        return None
    try:
        return Throughput(**json.loads(path.read_text(encoding="utf-8"))["throughput"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s); measure again: launch --dry-run --calibrate", path, error)
        return None


def keep(study: Study, throughput: Throughput, settings: Settings) -> Path:
    """Write what was measured where `stored` looks for it.

    Raises:
        OSError: the folder cannot be written.
    """
    settings.create(settings.throughput)
    path = _path(study, throughput.device, settings)
    content = {"of": _identity(study, throughput.device), "throughput": asdict(throughput)}
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")
    return path


def _path(study: Study, device: str, settings: Settings) -> Path:
    return settings.throughput / f"{sha256_of(_identity(study, device))[:24]}.json"


def _identity(study: Study, device: str) -> dict[str, Any]:
    """All that the speed depends on: the device, the networks by their files, the method, and how they are used."""
    assert study.teacher is not None and study.evaluation is not None
    method: dict[str, Any] = asdict(study.spec.method)
    return {
        "format": FORMAT,
        "device": device,
        "torch": package_version("torch"),
        "threads": threads(study),
        "method": {name: value for name, value in method.items() if name not in _OF_NO_MATTER},
        "teacher_sha256": study.teacher.sha256,
        "features_sha256": study.evaluation.features.sha256,
        "evaluation_batch": study.evaluation.batch,
        "micro_batch": study.spec.resources.micro_batch,
        "compile": study.spec.resources.compile,
    }
