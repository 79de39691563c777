"""What a worker makes of things that go wrong on its device."""

from dataclasses import dataclass
from typing import Any

import pytest

from bdense_core.methods.synthetic import Synthetic
from bdense_core.task import Task
from search import worker
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
