"""The weights file that transfer runs read."""

from dataclasses import asdict
from typing import Any

from search.errors import NothingFinished
from search.records import Row
from search.report import curve_of, noise_floor, ranked, verdict
from search.spec import Study
from search.storage import StudyStore

SCHEMA = "bdense-weights/1"


def export_object(store: StudyStore, *, top: int = 1) -> dict[str, Any]:
    """The best searched weights of a study and its top candidates.

    Raises:
        NothingFinished: no searched trial has run to its end.
    """
    rows = store.rows()
    floor = noise_floor(rows)
    candidates = ranked(rows, searched_only=True)[:top]
    if not candidates:
        counts = store.counts()
        raise NothingFinished(
            f"study {store.name!r} has no searched trial that ran to its end ({counts.running} running, "
            f"{counts.waiting} waiting, {counts.failed} failed); run the launcher again, or wait for it"
        )
    study = store.study
    return {
        "schema": SCHEMA,
        "study": store.name,
        "method": study.spec.method.kind,
        "dataset": study.spec.dataset,
        "nfe": study.spec.method.nfe,
        "num_branches": study.num_branches,
        "target_space": study.spec.method.target_space,
        "family": study.spec.space.family,
        "index_origin": study.spec.space.index_origin,
        **_candidate(study, candidates[0]),
        "formula": "w_k = exp(a (k + index_origin) + b), k = 0 .. num_branches - 1, first branch to last",
        "candidates": [_candidate(study, row) for row in candidates],
        "controls": [
            {"role": row.role, **_candidate(study, row), "by_seed": {str(s): v for s, v in row.by_seed.items()}}
            for row in ranked(rows)
            if row.is_control
        ],
        "noise_floor": None if floor is None else asdict(floor),
        "verdict": verdict(rows),
        "protocol": study.evaluation.protocol.to_dict() if study.evaluation else None,
        "provenance": store.provenance(),
        "spec": store.stored_spec,
    }


def _candidate(study: Study, row: Row) -> dict[str, Any]:
    a, b = curve_of(study, row) or (None, None)
    return {
        "a": a,
        "b": b,
        "weights": list(row.weights),
        "shares": list(row.shares),
        "trial": row.number,
        "score": {
            "metric": study.metric,
            "value": row.value,
            "n_samples": study.evaluation.n_samples if study.evaluation else None,
            "seeds": list(row.seeds),
        },
    }
