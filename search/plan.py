"""What a launch of a study would do and need, told before anything is started."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdense_core.integrity import read_metadata
from bdense_core.methods.base import with_settings
from bdense_core.network_config import NetworkConfig
from search.catalogue import CATALOGUE
from search.preflight import free_bytes, lacking_room
from search.sections import Arm, EvaluationSection
from search.settings import Settings
from search.spec import Study

PAPER_TFLOPS = 59.0
"""The rate behind the paper's 44 minutes on one A100 for CIFAR-10 at NFE 2 (arXiv 2602.15971): 200,000 trajectories
of 18 forward passes and 50,000 samples of 2, each of 42.4 GFLOP. Not a measurement of this code."""


def plan(study: Study, settings: Settings) -> dict[str, Any]:
    """Runs, network evaluations, disk and compute, JSON-able.

    An upper bound, since pruned trials stop early; of trials whose settings are tuned, with the study's own settings.
    """
    spec, controls = study.spec, study.controls()
    trial = _cost(study, None)
    fixed = [(len(seeds), _cost(study, arm)) for _, seeds, arm in study.fixed_runs()]
    all_runs = [(spec.budget.trials * len(study.trial_seeds()), trial), *fixed]
    runs = sum(count for count, _ in all_runs)
    is_cached = spec.cache.enabled and spec.method.cache_bytes(1) > 0
    teacher = sum(count * cost.teacher for count, cost in all_runs)
    evaluations = {
        "teacher_cache": max(cost.teacher for _, cost in all_runs) * len(study.all_seeds()) if is_cached else teacher,
        "student_training": sum(count * cost.student for count, cost in all_runs),
        "student_scoring": sum(count * cost.scores for count, cost in all_runs) + sum(cost.again for _, cost in fixed),
    }
    network = _network(study)
    return {
        "trials": spec.budget.trials,
        "controls": list(controls),
        "control_repeats": spec.seeds.control_repeats,
        "runs": runs,
        "scored_at_kimg": list(study.steps),
        "network_evaluations": evaluations,
        "without_cache": {"teacher": teacher},
        "disk": _disk(study, network, settings.cache),
        "compute": _compute(study, network, evaluations, per_run=trial.student + trial.scores),
        "missing": [*study.missing, *_room(study, network, settings), *_devices(study, settings)],
    }


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """Network evaluations of one training run."""

    teacher: int
    student: int
    scores: int
    again: int
    """Once for a trial: the last score on further evaluation seeds."""


def _cost(study: Study, arm: Arm | None) -> _Cost:
    """Of an arm, with its own settings; of a searched trial with the study's."""
    spec = study.spec
    method = with_settings(spec.method, arm.settings) if arm else spec.method
    images = method.budget_kimg * 1000 if arm is None or arm.is_trained else 0.0
    teacher, student = method.forward_units()
    section = spec.evaluation or EvaluationSection()
    early = section.early_samples or section.n_samples
    *calls_early, calls_last = method.calls_to_score(spec.budget.every_kimg)
    repeats = 0 if arm is None or spec.comparison else spec.seeds.evaluation_repeats - 1
    return _Cost(
        teacher=round(teacher * images),
        student=round((student + (method.learning_units(arm.rule) if arm else 0.0)) * images),
        scores=sum(calls_early) * early + calls_last * section.n_samples,
        again=repeats * section.n_samples * method.nfe,
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


def _compute(
    study: Study, network: NetworkConfig | None, evaluations: dict[str, int], per_run: float
) -> dict[str, Any]:
    """Floating-point work, and for a study on GPUs the hours it means at the rate of the paper's own runs."""
    if network is None:
        return {"gflop_per_forward": None, "gpu_hours": None}
    from bdense_core.networks import forward_flops

    flops, of_student = forward_flops(network), forward_flops(study.spec.method.student_network(network))
    work = {name: count * (flops if name == "teacher_cache" else of_student) for name, count in evaluations.items()}
    found: dict[str, Any] = {
        "gflop_per_forward": round(flops / 1e9, 3),
        "gflop_per_forward_of_student": round(of_student / 1e9, 3),
        "pflop": {name: round(count / 1e15, 3) for name, count in work.items()},
        "gpu_hours": None,
    }
    if study.spec.resources.gpus:
        rate = PAPER_TFLOPS * 1e12 * 3600
        found["gpu_hours"] = round(sum(work.values()) / rate, 2)
        found["gpu_minutes_per_run_with_cache"] = round(per_run * of_student / rate * 60, 1)
        found["assumed"] = f"{PAPER_TFLOPS:g} TFLOP/s, the rate behind the paper's times on an A100; not measured here"
    return found


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
