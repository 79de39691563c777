"""What a worker passes on, and what it makes of things that go wrong on its device."""

import json
from base64 import b64decode
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bdense_core.files import HashedFile
from bdense_core.methods.base import with_settings
from bdense_core.methods.synthetic import Synthetic
from bdense_core.task import Score, Task
from bdense_core.weights import uniform
from search import worker
from search.study_file import load_study, studies_folder
from search.worker import payload, run_trial


@dataclass
class OutOfMemoryError(RuntimeError):
    """As torch's: no MemoryError, and with a text of many lines."""

    text: str = "CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation"

    def __str__(self) -> str:
        return self.text


def results(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[dict[str, Any]]:
    def fail(*_: object) -> Any:
        raise error

    monkeypatch.setattr(worker, "distill", fail)
    task = Task(weights=(1.0, 1.0), seed=0, every_kimg=1, teacher=None, evaluation=None, cache_root=None)
    return list(run_trial(payload(Synthetic(num_branches=2), task, (0,))))


def test_a_full_gpu_is_one_line_with_advice_and_worth_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = results(monkeypatch, OutOfMemoryError())
    assert (result["event"], result["retry"]) == ("failed", True)
    assert "resources.micro_batch" in result["reason"]
    assert "\n" not in result["reason"]


def test_a_failed_device_ends_the_worker_not_the_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"):
        results(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_mistake_in_the_code_is_the_trials_end(monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = results(monkeypatch, KeyError("oops"))
    assert (result["event"], result["retry"]) == ("failed", False)
    assert "KeyError" in result["detail"]


def test_a_score_is_passed_on_whole_as_plain_values() -> None:
    task = Task(weights=(1.0, 3.0), seed=0, every_kimg=3, teacher=None, evaluation=None, cache_root=None)
    task = replace(task, evaluation_seeds=(1, 2))
    method = Synthetic(num_branches=2, noise=0.0, evaluation_noise=0.0)
    *_, score = run_trial(payload(method, task, (0, 1)))
    # At the best share of 3/4 nothing is left but the optimum, 4.
    expected = {"value": 4.0, "surrogate": 4.0, "evaluations": [4.0, 4.0], "repeats": [[1, 3, 4.0]]}
    assert json.loads(json.dumps(score)).items() >= expected.items()


def test_further_figures_are_passed_on_and_those_that_are_no_numbers_are_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = {"rho": 0.75, "cos": float("nan"), "gap": float("inf")}
    last = Score(kimg=3, value=1.0, done=1.0, metrics=figures)
    task = Task(weights=(1.0, 1.0), seed=0, every_kimg=1, teacher=None, evaluation=None, cache_root=None)
    monkeypatch.setattr(worker, "distill", lambda *_: (event for event in [last]))
    (score,) = run_trial(payload(Synthetic(num_branches=2), task, (0,)))
    assert (score["event"], score["value"], score["metrics"]) == ("score", 1.0, [["rho", 0.75]])
    assert score["note"] == "not kept, as no number: cos is nan, gap is inf"
    json.dumps(score, allow_nan=False)


def test_a_trial_with_settings_of_its_own_is_another_run_of_the_method() -> None:
    """By hand: 4 + curvature 4 x (1/2)^2 = 5 at the best share, and half more for bitter."""
    task = Task(weights=(1.0, 3.0), seed=0, every_kimg=3, teacher=None, evaluation=None, cache_root=None)
    method = with_settings(Synthetic(num_branches=2, noise=0.0), {"shift": 0.5, "flavour": "bitter"})
    *_, score = run_trial(payload(method, task, (0,)))
    assert (score["value"], score["metrics"]) == (5.5, [["balance", 0.25]])


def test_images_and_learned_shares_are_passed_on_as_text_and_list(monkeypatch: pytest.MonkeyPatch) -> None:
    last = Score(kimg=3, value=1.0, done=1.0, samples=b"\x89PNG", shares=(0.25, 0.75))
    task = Task(weights=(1.0, 1.0), seed=0, every_kimg=1, teacher=None, evaluation=None, cache_root=None)
    monkeypatch.setattr(worker, "distill", lambda *_: (event for event in [last]))
    (score,) = run_trial(payload(Synthetic(num_branches=2), task, (0,)))
    assert (b64decode(score["samples"]), score["shares_learned"]) == (b"\x89PNG", [0.25, 0.75])


def elsewhere(file: HashedFile) -> HashedFile:
    return replace(file, path=f"/another/installation/{Path(file.path).name}")


def test_what_comes_with_the_package_is_read_from_this_nodes_installation() -> None:
    keys = ("method.budget_kimg=1", "budget.every_kimg=1", "evaluation.n_samples=20", "evaluation.batch=20")
    study = load_study(studies_folder() / "digits.yaml", overrides=keys)
    task = study.task(uniform(4), 0, cache_root=Path())
    assert task.teacher and task.evaluation
    task = replace(
        task,
        teacher=elsewhere(task.teacher),
        evaluation=replace(
            task.evaluation,
            features=elsewhere(task.evaluation.features),
            reference=elsewhere(task.evaluation.reference),
        ),
        cache_root=None,
    )
    *_, last = run_trial(payload(study.spec.method, task, (0,)))
    assert last["event"] == "score", last
    unknown = replace(task, teacher=HashedFile(path="/another/teacher.safetensors", sha256="0" * 64))
    (failed,) = run_trial(payload(study.spec.method, unknown, (0,)))
    assert "/another/teacher.safetensors" in failed["reason"]


def test_a_shared_cache_that_does_not_work_is_told_of_once_each_without_its_password(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ("method.budget_kimg=1", "budget.every_kimg=1", "evaluation.n_samples=20", "evaluation.batch=20")
    study = load_study(studies_folder() / "digits.yaml", overrides=keys)
    task = replace(study.task(uniform(4), 0, cache_root=tmp_path), cache_url="nosuch://me:secret@host/x")
    told = [result["note"] for result in run_trial(payload(study.spec.method, task, (0,))) if "note" in result]
    assert len(told) == 2, "trajectories to learn from, and those that the surrogate compares with"
    for note in told:
        assert note.startswith("the shared teacher cache nosuch://host/x/") and "shards are computed here" in note
    assert "secret" not in caplog.text
