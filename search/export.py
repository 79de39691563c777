"""The weights file: a study's best weights with all that is needed to use, to trust and to rerun them."""

from datetime import datetime
from pprint import pformat
from typing import Any

from bdense_core.errors import BadValue, BDenseError
from bdense_core.files import canonical_json, sha256_of
from search.comparison import compare, to_dict
from search.consistency import floor_object
from search.noise import choosable, ranked, verdict
from search.records import CONTROL, Row
from search.report import curve_of
from search.spec import Study, identity_of
from search.storage import Studies, StudyStore
from search.version import code_version, packages
from search.weights_file import SCHEMA, complaints, sealed

_LINE = "w_k = exp(a (k + index_origin) + b), k = 0 .. num_branches - 1, in the order of terms"
_NO_LINE = "w_k as listed, in the order of terms: these weights are no line, so they have no a and b"

_Object = dict[str, Any]


def export_object(store: StudyStore, *, top: int = 1, trial: int | None = None) -> _Object:
    """The weights file's content: the confirmed weights, else the best ones, and the study's `top` candidates.

    The best are those of the lowest mean over the fresh seeds of a complete confirmation; what did not run there comes
    after them, by the search's scores, which are partly luck.

    Args:
        trial: the searched trial to choose instead, which may violate a constraint: the file says so.

    Raises:
        NothingFinished: no searched trial has run to its end, or all that have violate a constraint.
        BadValue: the study compares weightings of another one, or the trial asked for did not run to its end.
    """
    study, rows = store.study, store.rows()
    if study.spec.comparison is not None:
        of = study.spec.comparison.of
        raise BadValue(f"study {store.name!r} compares weightings of {of!r}; export that one: --study {of}")
    tables = [_table(other) for other in Studies(store.database).comparisons_of(store)]
    confirmation = next((table for table in tables if table["kind"] == "confirm"), None)
    winner = confirmation["winner"] if confirmation else None
    candidates = _chosen_first(store, rows, trial=trial, confirmation=confirmation)[:top]
    content = {
        "schema": SCHEMA,
        "study": store.name,
        "method": study.spec.method.kind,
        "dataset": study.spec.dataset,
        "nfe": study.spec.method.nfe,
        "num_branches": study.num_branches,
        "num_intervals": study.num_intervals,
        "terms": study.spec.method.terms,
        "target_space": study.spec.method.target_space,
        "family": study.spec.space.family,
        "index_origin": study.spec.space.index_origin,
        "formula": _NO_LINE if curve_of(study, candidates[0]) is None else _LINE,
        **_weighting(study, candidates[0]),
        "confirmed": winner is not None and winner == _name(candidates[0]),
        "verdict": confirmation["verdict"] if confirmation else verdict(study, rows),
        "candidates": [_weighting(study, row) for row in candidates],
        "controls": [
            {
                "role": row.role,
                **_weighting(study, row),
                "is_trained": row.is_trained,
                "evaluations": row.evaluations,
            }
            for row in ranked(rows)
            if row.is_control
        ],
        "noise_floor": floor_object(rows),
        "confirmation": confirmation,
        "transfer": [table for table in tables if table["kind"] == "transfer"],
        "protocol": study.evaluation.protocol.to_dict() if study.evaluation else None,
        "seeds": _seeds(study, confirmation),
        "provenance": _provenance(store, candidates[0]),
        "spec": store.stored_spec,
    }
    return _checked(sealed(content))


def python_text(content: _Object) -> str:
    """A module that needs nothing but Python: the weights as a dictionary, and as a function of the term."""
    left_out = ("candidates", "controls", "confirmation", "transfer", "spec")
    kept = {key: value for key, value in content.items() if key not in left_out}
    return _MODULE.format(content=pformat(kept, width=110, sort_dicts=False))


def safetensors_bytes(content: _Object) -> bytes:
    """The weights as the tensor `weights`, float64, [K]; the whole file as JSON in the metadata's `bdense_weights`."""
    import numpy as np
    from safetensors.numpy import save

    weights = np.array(content["weights"], dtype=np.float64)
    return save({"weights": weights}, metadata={"bdense_weights": canonical_json(content)})


def _table(store: StudyStore) -> _Object:
    """A comparison with the study it is of: what is needed to work its verdict out again."""
    spec = store.study.spec
    target = spec.comparison.target if spec.comparison else None
    about = {
        "target": target, "dataset": spec.dataset, "nfe": spec.method.nfe, "num_intervals": spec.num_intervals,
    }  # fmt: skip
    return {**about, **to_dict(compare(store.study, store.rows())), "spec": store.stored_spec}


def _chosen_first(store: StudyStore, rows: list[Row], *, trial: int | None, confirmation: _Object | None) -> list[Row]:
    """The searched trials that ran to their end: the one asked for, or the confirmed one, and then best first."""
    best = ranked(rows, searched_only=True) if trial is not None else choosable(store.name, rows)
    chosen = None
    if confirmation is not None:
        arms = [arm for arm in confirmation["arms"] if not arm["violated"]]  # best first
        is_whole = not any(arm["missing"] for arm in arms)  # else who failed once would stand behind who is worse
        places = {arm["name"]: place for place, arm in enumerate(arms)} if is_whole else {}
        best = sorted(best, key=lambda row: places.get(_name(row), len(places)))  # stable: the others stay in order
        chosen = next((row for row in best if _name(row) == confirmation["winner"]), None)
    if trial is not None:
        chosen = _asked_for(store, rows, trial)
    chosen = chosen or best[0]
    return [chosen, *(row for row in best if row is not chosen)]


def _asked_for(store: StudyStore, rows: list[Row], trial: int) -> Row:
    for row in ranked(rows):
        if row.is_search and row.number == trial:
            return row
    raise BadValue(
        f"trial {trial} of study {store.name!r} is no searched trial that ran to its end; "
        f"`bdense-weights trials --study {store.name}` lists them"
    )


def _name(row: Row) -> str:
    """What a comparison calls it."""
    return f"trial-{row.number}" if row.is_search else row.role.removeprefix(CONTROL)


def _weighting(study: Study, row: Row) -> _Object:
    a, b = curve_of(study, row) or (None, None)
    return {
        "name": _name(row),
        "trial": row.number,
        "params": row.params,
        "a": a,
        "b": b,
        "weights": row.weights,
        "shares": row.shares,
        "settings": row.settings,
        "schedule": row.schedule,
        "rule": row.rule,
        "score": {
            "metric": study.metric,
            "value": row.value,
            "n_samples": study.evaluation.n_samples if study.evaluation else None,
            "seeds": row.seeds[: len(study.trial_seeds())],  # a control has run on further ones
        },
        "by_seed": {str(seed): value for seed, value in row.by_seed.items()},
        "metrics": row.metrics,
        "violated": row.violated,
        "code_version": row.code,
    }


def _seeds(study: Study, confirmation: _Object | None) -> _Object:
    return {
        "training": study.trial_seeds(),
        "controls": study.control_seeds(),
        "evaluation": study.evaluation.seed if study.evaluation else None,
        "sampler": study.spec.sampler.seed,
        "confirmation": confirmation["seeds"] if confirmation else [],
    }


def _provenance(store: StudyStore, chosen: Row) -> _Object:
    """Where the weights come from. Versions are those that ran the chosen trial."""
    study = store.study
    return {
        **store.provenance(),
        "spec_sha256": sha256_of(identity_of(store.stored_spec)),
        "features_sha256": study.evaluation.features.sha256 if study.evaluation else None,
        "reference_sha256": study.evaluation.reference.sha256 if study.evaluation else None,
        "exported": datetime.now().astimezone().isoformat(timespec="seconds"),
        "exported_by": code_version(),
        "device": "cuda" if study.spec.resources.gpus > 0 else "cpu",
        "packages": chosen.packages or packages(),  # older trials did not keep them
    }


def _checked(content: _Object) -> _Object:
    """The content, if it is as the format's schema says.

    Raises:
        BDenseError: it is not; a fault of this program or of what is stored, which nobody should export.
    """
    if wrong := complaints(content):
        raise BDenseError(
            f"study {content['study']!r} gives no file of format {SCHEMA}: {'; '.join(wrong)}; it may have been stored "
            "by another version of this package, which can export it"
        )
    return content


_MODULE = '''"""Loss weights for diffusion distillation, made by `bdense-weights export --format python`.

It needs nothing but Python. docs/weights-file.md of bdense-search says what the keys mean.
"""

import math

WEIGHTS = {content}


def weights(k, done=0.0, interval=0):
    """The weight of term k, 0 (the first) to K - 1 (the primary one).

    Where WEIGHTS["schedule"] is not empty, weights differ in time and between intervals: `done` of 1.0 of the
    training is over, in trained interval `interval`, 0 (at the noise) to J - 1.
    """
    schedule = WEIGHTS["schedule"]
    if not schedule:
        return WEIGHTS["weights"][k]
    position = done * (len(schedule) - 1)
    before = min(int(position), max(len(schedule) - 2, 0))
    early, late = (schedule[min(i, len(schedule) - 1)] for i in (before, before + 1))
    u, v = (row[interval if len(row) > 1 else 0][k] for row in (early, late))
    part = position - before
    if u > 0 and v > 0 and u != v:
        return math.exp((1 - part) * math.log(u) + part * math.log(v))
    return u + (v - u) * part
'''
