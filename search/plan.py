"""What a launch of a study would do and need, told before anything is started."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdense_core.integrity import read_metadata
from bdense_core.methods.base import with_settings
from bdense_core.network_config import NetworkConfig
from search import throughput
from search.catalogue import CATALOGUE
from search.preflight import free_bytes, lacking_room
from search.records import Row
from search.sections import Arm, EvaluationSection
from search.settings import Settings
from search.spec import Study
from search.throughput import Seconds, Throughput

PAPER_TFLOPS = 59.0
"""The rate behind the paper's 44 minutes on one A100 for CIFAR-10 at NFE 2 (arXiv 2602.15971): 200,000 trajectories
of 18 forward passes and 50,000 samples of 2, each of 42.4 GFLOP. Not a measurement of this code."""


def plan(study: Study, settings: Settings, *, price: float | None = None) -> dict[str, Any]:
    """Runs, network evaluations, disk, compute and time, JSON-able.

    An upper bound, since pruned trials stop early; of trials whose settings are tuned, with the study's own settings.

    Args:
        price: of one hour of one device: a GPU, or a CPU core where the study asks for no GPU.
    """
    spec, controls = study.spec, study.controls()
    trial = Cost.of(study)
    fixed = [(len(seeds), Cost.of(study, arm)) for _, seeds, arm in study.fixed_runs()]
    all_runs = [(spec.budget.trials * len(study.trial_seeds()), trial), *fixed]
    runs = sum(count for count, _ in all_runs)
    teacher = sum(count * cost.teacher for count, cost in all_runs)
    most = max(cost.teacher for _, cost in all_runs)
    evaluations = {
        "teacher_cache": most * len(study.all_seeds()) if is_cached(study) else teacher,
        "student_training": sum(count * cost.student for count, cost in all_runs),
        "student_scoring": sum(count * cost.scores for count, cost in all_runs) + sum(cost.again for _, cost in fixed),
    }
    network = _network(study)
    flops = _flops(study, network)
    return {
        "trials": spec.budget.trials,
        "controls": list(controls),
        "control_repeats": spec.seeds.control_repeats,
        "runs": runs,
        "scored_at_kimg": list(study.steps),
        "network_evaluations": evaluations,
        "without_cache": {"teacher": teacher},
        "disk": _disk(study, network, settings.cache),
        "compute": _compute(flops, evaluations),
        "time": _time(study, settings, flops, evaluations, trial, price),
        "missing": [*study.missing, *_room(study, network, settings), *_devices(study, settings)],
    }


def is_cached(study: Study) -> bool:
    """Whether runs of one training seed share what their teacher says."""
    return study.spec.cache.enabled and study.spec.method.cache_bytes(1) > 0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Network evaluations of one training run."""

    teacher: int
    student: int
    scores: int
    again: int
    """Once for a trial: the last score on further evaluation seeds."""

    @classmethod
    def of(cls, study: Study, what: Arm | Row | None = None, *, until: int | None = None) -> "Cost":
        """Of an arm or a trial, with its own settings; of a searched trial to come with the study's.

        Args:
            until: the kimg of the last score that it came to; None: the whole budget.
        """
        spec = study.spec
        method = with_settings(spec.method, what.settings) if what else spec.method
        kimg = method.budget_kimg if until is None else min(until, method.budget_kimg)
        images = kimg * 1000 if what is None or what.is_trained else 0.0
        teacher, student = method.forward_units()
        section = spec.evaluation or EvaluationSection()
        early = section.early_samples or section.n_samples
        steps, calls = method.steps(spec.budget.every_kimg), method.calls_to_score(spec.budget.every_kimg)
        samples = [*(early for _ in steps[:-1]), section.n_samples]
        scored = [n * at for n, at, step in zip(calls, samples, steps, strict=True) if until is None or step <= until]
        is_search = what is None or (isinstance(what, Row) and what.is_search)
        repeats = 0 if is_search or spec.comparison else spec.seeds.evaluation_repeats - 1
        return cls(
            teacher=round(teacher * images),
            student=round(student * images),
            scores=sum(scored),
            again=repeats * section.n_samples * method.nfe if len(scored) == len(steps) else 0,
        )


def _network(study: Study) -> NetworkConfig | None:
    """The teacher's, from its file, or as it is published; None where nobody knows yet."""
    if study.teacher is not None:
        return NetworkConfig.from_dict(read_metadata(study.teacher.path)["config"])
    published = CATALOGUE.get(study.spec.teacher or "")
    return published.network if published else None


def _disk(study: Study, network: NetworkConfig | None, cache: Path) -> dict[str, Any]:
    """Gigabytes of the teacher cache: all seeds together, and what is free where it would be."""
    if network is None or not study.spec.cache.enabled:
        return {"teacher_cache_gb": None if study.spec.cache.enabled else 0.0}
    return {
        "teacher_cache_gb": round(study.cache_bytes(network) / 1e9, 3),
        "seeds": len(study.all_seeds()),
        "folder": str(cache),
        "free_gb": round(free_bytes(cache) / 1e9, 1),
        "budget_gb": study.spec.cache.budget_gb,
    }


def _room(study: Study, network: NetworkConfig | None, settings: Settings) -> list[str]:
    problem = None if network is None else lacking_room(study, network, settings.cache)
    return [problem] if problem else []


def _flops(study: Study, network: NetworkConfig | None) -> dict[str, float] | None:
    """Floating-point operations of one network evaluation of each kind."""
    if network is None:
        return None
    from bdense_core.networks import forward_flops

    of_student = forward_flops(study.spec.method.student_network(network))
    return {
        "teacher_cache": forward_flops(network),
        "student_training": of_student,
        "student_scoring": of_student,
    }


def _compute(flops: dict[str, float] | None, evaluations: dict[str, int]) -> dict[str, Any]:
    """Floating-point work."""
    if flops is None:
        return {"gflop_per_forward": None}
    return {
        "gflop_per_forward": round(flops["teacher_cache"] / 1e9, 3),
        "gflop_per_forward_of_student": round(flops["student_scoring"] / 1e9, 3),
        "pflop": {name: round(count * flops[name] / 1e15, 3) for name, count in evaluations.items()},
    }


def _time(
    study: Study,
    settings: Settings,
    flops: dict[str, float] | None,
    evaluations: dict[str, int],
    trial: Cost,
    price: float | None,
) -> dict[str, Any]:
    """Hours, by what was measured on this device; else, for a study on GPUs, at the rate of the paper's own runs."""
    found = throughput.stored(study, settings)
    seconds, source = _seconds(study, found, flops)
    if seconds is None:
        return {"source": source, "is_measured": False, "device_hours": None, "hours_at": None, "cost": None}
    hours = {name: count * seconds[name] / 3600 for name, count in evaluations.items()}
    device_hours, places = sum(hours.values()) * devices(study), _places(study, settings)
    per_run = trial.student * seconds["student_training"] + trial.scores * seconds["student_scoring"]
    return {
        "source": source,
        "is_measured": found is not None,
        "seconds_per_evaluation": {name: _short(value) for name, value in seconds.items()},
        "minutes_per_run_with_cache": _short(per_run / 60),
        "hours": {name: _short(value) for name, value in hours.items()},
        "devices_per_trial": devices(study),
        "device_hours": _short(device_hours),
        "hours_at": {"trials_at_once": places, "hours": _short(sum(hours.values()) / places)} if places else None,
        "cost": None if price is None else _short(device_hours * price),
    }


def devices(study: Study) -> float:
    """What a trial takes: GPUs, or CPU cores where it asks for none."""
    return study.spec.resources.gpus or study.spec.resources.cpus


def _seconds(study: Study, found: Throughput | None, flops: dict[str, float] | None) -> tuple[Seconds | None, str]:
    """Of one network evaluation, and where they come from."""
    if found is not None:
        return found.seconds, found.source
    if study.spec.resources.gpus and flops is not None:
        rate = PAPER_TFLOPS * 1e12
        source = f"assumed: {PAPER_TFLOPS:g} TFLOP/s, the rate behind the paper's times on an A100; not measured here"
        return {name: count / rate for name, count in flops.items()}, source
    return None, "not known; --calibrate measures it on this device"


def _places(study: Study, settings: Settings) -> int | None:
    """Trials at once: what this machine holds, unless a cluster runs them, and `resources.max_parallel`."""
    from search.room import Node

    resources, most = study.spec.resources, study.spec.resources.max_parallel
    if settings.ray_address is not None:
        return most
    cpus, gpus = float(os.cpu_count() or 1), 0.0
    if resources.gpus:
        import torch

        gpus = float(torch.cuda.device_count()) if torch.cuda.is_available() else 0.0
    held = Node(cpus, gpus, cpus, gpus).fits(resources)
    return min(held, most or held) if held else most


def _short(value: float) -> float:
    """Three digits: the rest is not known."""
    return float(f"{value:.3g}")


def _devices(study: Study, settings: Settings) -> list[str]:
    """What this machine lacks to run a trial by itself."""
    wanted = study.spec.resources.gpus
    if wanted == 0 or settings.ray_address is not None:
        return []
    import torch

    if torch.cuda.is_available():
        return []
    return [
        f"a trial asks for {wanted:g} GPU(s), and torch sees none on this machine; run it on a cluster that has some: "
        "--ray-address HOST:PORT"
    ]
