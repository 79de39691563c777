"""A weights file's parts against each other: whatever follows from another part is worked out again and compared.

The content is as the JSON Schema says, and otherwise a stranger's.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from statistics import mean
from typing import Any

import numpy as np

from bdense_core.errors import BadValue, BDenseError
from bdense_core.files import sha256_of
from bdense_core.methods.base import Axis, with_settings
from bdense_core.weights import checked, log_linear, shares
from search import tuning
from search.comparison import compare, to_dict
from search.noise import noise_floor
from search.records import ARM, Row
from search.spec import Study, identity_of

_REL = 1e-9
"""How far numbers may differ that are worked out from others: machines round differently."""
_TABLE_REL = 1e-6
"""The same for what scipy works out, of whatever version."""
_UNUSED = ("budget.", "sampler.", "pruner.")
"""Sections of a study that its confirmation, which searches nothing, has otherwise."""
_LARGEST = 1000.0
"""A parameter of a family beyond stands for no weights: their logarithms would differ by as much."""
_LATER: dict[str, Any] = {"settings": {}, "metrics": {}, "violated": []}
"""What files mean that were written before these keys existed."""
_FAULTS = (BDenseError, ArithmeticError, LookupError, TypeError, ValueError)
"""What values that make no sense may end in."""

_Object = dict[str, Any]


def spec_faults(content: _Object, study: Study) -> Iterator[str]:
    """What was copied from the resolved study is still as there."""
    method, evaluation = study.spec.method, study.evaluation
    if method.needs_teacher and (study.teacher is None or evaluation is None):
        yield f"a study of method {method.kind} has a teacher and an evaluation, this one lacks them"
    expected = {
        "study": study.name,
        "method": method.kind,
        "dataset": study.spec.dataset,
        "nfe": method.nfe,
        "num_branches": study.num_branches,
        "num_intervals": study.num_intervals,
        "terms": list(method.terms),
        "target_space": method.target_space,
        "family": study.spec.space.family,
        "index_origin": study.spec.space.index_origin,
        "protocol": evaluation.protocol.to_dict() if evaluation else None,
        "seeds": {
            "training": list(study.trial_seeds()),
            "controls": list(study.control_seeds()),
            "evaluation": evaluation.seed if evaluation else None,
            "sampler": study.spec.sampler.seed,
        },
        "provenance": {
            "spec_sha256": sha256_of(identity_of(content["spec"])),
            "teacher_sha256": study.teacher.sha256 if study.teacher else None,
            "features_sha256": evaluation.features.sha256 if evaluation else None,
            "reference_sha256": evaluation.reference.sha256 if evaluation else None,
            "device": "cuda" if study.spec.resources.gpus > 0 else "cpu",
        },
    }
    yield from _differences(expected, content)


def weights_faults(content: _Object, study: Study) -> Iterator[str]:
    """Weights, shares, schedules and settings are what a and b, and the parameters, give."""
    chosen = content["candidates"][0]
    yield from _line_faults("", content, study)
    yield from _copy_faults(
        content, chosen, ("name", "trial", "params", "a", "b", "weights", "shares", "settings", "schedule", "rule")
    )
    for entry in (*content["candidates"], *content["controls"]):
        yield from _line_faults(f"{entry['name']}: ", entry, study)
        yield from _refusals(f"{entry['name']}: ", entry, study)
    for index, entry in enumerate(content["candidates"]):
        yield from _differences({"name": f"trial-{entry['trial']}"}, entry, f"candidates[{index}]")
        yield from _family_faults(f"{entry['name']}: ", entry, study)
        yield from _tuned_faults(f"{entry['name']}: ", entry, study)
    known = study.controls()
    for entry in content["controls"]:
        if entry["name"] in known:  # another version may have had others
            arm = known[entry["name"]]
            meant = {"weights": arm.weights, "rule": arm.rule, "is_trained": arm.is_trained}
            yield from _differences(meant, entry, entry["name"])
            yield from _settings_faults(arm.settings, entry, f"{entry['name']}.settings")


def score_faults(content: _Object, study: Study) -> Iterator[str]:
    """Every value is the mean over the training seeds that it names; figures break the constraints that they say."""
    about = {
        "metric": study.metric,
        "n_samples": study.evaluation.n_samples if study.evaluation else None,
        "seeds": list(study.trial_seeds()),
    }
    keys = ("score", "by_seed", "metrics", "violated", "code_version")
    yield from _copy_faults(content, content["candidates"][0], keys)
    for entry in (*content["candidates"], *content["controls"]):
        score, name = entry["score"], entry["name"]
        yield from _differences(about, score, f"{name}: score")
        values = [entry["by_seed"].get(str(seed)) for seed in score["seeds"]]
        if None in values:
            yield f"{name}: by_seed lacks a seed of its score"
        elif not _is_close(score["value"], expected := mean(values)):
            yield f"{name}: the value is {_brief(score['value'])}, but its values by seed give {_brief(expected)}"
        violated = list(study.violations(_of(entry, "metrics")))
        yield from _differences(violated, _of(entry, "violated"), f"{name}: violated")


def floor_object(rows: list[Row]) -> _Object | None:
    """The noise floor of a study's controls, with the smallest difference that is a finding."""
    floor = noise_floor(rows)
    return None if floor is None else {**asdict(floor), "finding": floor.finding}


def floor_faults(content: _Object) -> Iterator[str]:
    """The noise floor is what the controls' values give."""
    step = int((content["noise_floor"] or {}).get("step") or 0)
    rows = []
    for number, entry in enumerate(content["controls"]):
        own, by_seed = str(entry["score"]["seeds"][0]), entry["by_seed"]
        if own in by_seed:  # a file's keys are in no order
            scores = {own: by_seed[own], **by_seed}
            row = _row(number, entry["role"], scores, step=step, evaluations=entry["evaluations"])
            rows.append(replace(row, rule=entry["rule"], is_trained=entry.get("is_trained", True)))
    with np.errstate(over="raise"):
        expected = floor_object(rows)
    yield from _differences(expected, content["noise_floor"], "noise_floor", rel=_TABLE_REL)


def verdict_faults(content: _Object, study: Study) -> Iterator[str]:
    """Every gain and winner follows from the values by seed, and `confirmed` from the winner."""
    confirmation = content["confirmation"]
    if confirmation is not None:
        yield from _freshness_faults(confirmation, content)
        yield from _differences(confirmation["verdict"], content["verdict"], "verdict")
        with suppress(*_FAULTS):  # what cannot be read is told below
            yield from _identity_faults(study, Study.from_dict(confirmation["spec"]))
    for where, table in _tables(content).items():
        yield from _table_faults(where, table, content)
    winner = confirmation["winner"] if confirmation else None
    if content["confirmed"] != (winner == content["name"]):
        yield (
            f"confirmed is {_brief(content['confirmed'])}, but the confirmation's winner is "
            f"{winner or 'none'} and these weights are {content['name']}"
        )


def rewordings(content: _Object) -> Iterator[str]:
    """Comparisons of which this version would say something else, or the same in other words."""
    for where, table in _tables(content).items():
        with suppress(*_FAULTS):
            yield from _differences({"verdict": _worked_out(table)["verdict"]}, table, where)


def _tables(content: _Object) -> dict[str, _Object]:
    """All comparisons, by where they stand."""
    confirmation = {"confirmation": content["confirmation"]} if content["confirmation"] else {}
    return confirmation | {f"transfer[{index}]": table for index, table in enumerate(content["transfer"])}


def _line_faults(who: str, entry: _Object, study: Study) -> Iterator[str]:
    """a, b and shares of one weighting against its weights."""
    weights, origin = entry["weights"], study.spec.space.index_origin
    a, b = entry["a"], entry["b"]
    if (a is None) != (b is None):
        yield f"{who}one of a and b is null, the other is not"
    elif a is not None and not _are_close(line := _line(a, b, len(weights), origin), weights):
        yield (
            f"{who}a and b do not give these weights: exp(a (k + {origin}) + b) with a = {_brief(a)}, b = {_brief(b)} "
            f"is {_brief(line)}, the file has {_brief(weights)}"
        )
    try:
        expected = shares(checked(weights))
    except BDenseError as error:
        yield f"{who}{error}"
        return
    if not _are_close(expected, entry["shares"]):
        total = math.fsum(entry["shares"])
        yield (
            f"{who}the shares are {_brief(entry['shares'])} with sum {_brief(total)}, the weights divided by their sum "
            f"are {_brief(expected)}"
        )


def _line(a: float, b: float, num_branches: int, origin: int) -> Sequence[float]:
    try:
        return log_linear(a, b, num_branches, index_origin=origin)
    except BDenseError:
        return ()


def _family_faults(who: str, entry: _Object, study: Study) -> Iterator[str]:
    """The weights and the schedule of a proposal against what the study's family makes of its parameters."""
    space = study.spec.space
    about = f"{who}params {_brief(entry['params'])} of family {space.family}"
    try:
        params = {axis: _bounded(float(entry["params"][axis])) for axis in study.spec.axes}
        weights = space.weights(params, study.num_branches)
        schedule = space.schedule(params, study.num_branches, study.num_intervals)
    except _FAULTS as error:
        yield f"{about} give no weights: {error}"
        return
    if not _are_close(weights, entry["weights"]):
        yield f"{about} do not give these weights but {_brief(weights)}, the file has {_brief(entry['weights'])}"
    yield from _differences(schedule, entry["schedule"], f"{about}: schedule")


def _bounded(value: float) -> float:
    if not abs(value) <= _LARGEST:
        raise ValueError(f"{value:g} is too large")
    return value


def _refusals(who: str, entry: _Object, study: Study) -> Iterator[str]:
    """Settings that are none of the method's, or have values that it refuses."""
    try:
        with_settings(study.spec.method, _of(entry, "settings"))
    except _FAULTS as error:
        yield f"{who}{error}"


def _tuned_faults(who: str, entry: _Object, study: Study) -> Iterator[str]:
    """The settings of a proposal are its parameters beside those of the family, and lie where the study searches."""
    params, tuned = entry["params"], study.spec.tuned
    meant = {name: params[name] for name in tuned if name in params}
    yield from _settings_faults(meant, entry, f"{who}settings")
    for name, axis in tuned.items():
        if name not in meant or not _is_value(axis, meant[name]):
            yield f"{who}params.{name} is {_brief(meant.get(name))}, which lies not in what the study searches"


def _is_value(axis: Axis, value: Any) -> bool:
    """Whether an axis has a value, of that very type, but for a float without a fraction."""
    try:
        found = tuning.value_of("it", axis, value)
    except BadValue:
        return False
    return type(value) is type(found) or (type(value) is int and type(found) is float)


def _settings_faults(expected: _Object, entry: _Object, where: str) -> Iterator[str]:
    """Settings that are not as expected; a name that one side alone has is a difference."""
    found = _of(entry, "settings")
    if expected.keys() != found.keys() or any(_differences(expected, found)):
        yield f"{where} is {_brief(found)}, expected {_brief(expected)}"


def _of(entry: _Object, key: str) -> Any:
    return entry.get(key, _LATER.get(key))


def _copy_faults(content: _Object, chosen: _Object, keys: Sequence[str]) -> Iterator[str]:
    """The chosen weights stand in the file twice: on top, and first among the candidates."""
    for key in keys:
        if _of(content, key) != _of(chosen, key):
            yield f"{key} is {_brief(_of(content, key))}, but of the first candidate it is {_brief(_of(chosen, key))}"


def _table_faults(where: str, table: _Object, content: _Object) -> Iterator[str]:
    """A comparison's means, gains and winner, worked out again; and that it is of these weights."""
    try:
        expected = _worked_out(table)
    except _FAULTS as error:
        yield f"{where} cannot be worked out again: {error}"
        return
    numbers = {key: value for key, value in expected.items() if key != "verdict"}
    yield from _differences(numbers, table, where, rel=_TABLE_REL)
    meant = {"of": content["study"], "of_created": content["provenance"]["created"]}
    is_confirmation = where == "confirmation"
    meant |= {"kind": "confirm", "target": content["study"]} if is_confirmation else {"kind": "transfer"}
    yield from _differences(meant, expected, f"{where}.spec.comparison")
    by_name = {candidate["name"]: candidate for candidate in content["candidates"]}
    by_trial = {candidate["trial"]: candidate for candidate in content["candidates"]}
    for arm in expected["arms"]:
        if listed := by_trial.get(arm["trial"]) or by_name.get(arm["name"]):
            meant = {key: listed[key] for key in ("name", "trial", "weights", "schedule", "rule")}
            about = f"{where}: what it ran as {arm['name']}"
            yield from _differences(meant, arm, about)
            yield from _settings_faults(_of(listed, "settings"), arm, f"{about}.settings")


def _worked_out(table: _Object) -> _Object:
    """A comparison from its study and its values by seed alone."""
    study = Study.from_dict(table["spec"])
    runs = [(arm["name"], seed, value) for arm in table["arms"] for seed, value in arm["by_seed"].items()]
    rows = [
        replace(
            _row(number, ARM + name, {seed: value}, protocol=study.protocol_hash()), metrics=_figures(table, name, seed)
        )
        for number, (name, seed, value) in enumerate(runs)
    ]
    section = study.spec.comparison
    about: _Object = {"of_created": section.of_created, "target": section.target} if section else {}
    with np.errstate(over="raise"):
        compared = to_dict(compare(study, rows))
    about |= {"nfe": study.spec.method.nfe, "num_intervals": study.num_intervals, "dataset": study.spec.dataset}
    return {**compared, **about}


def _figures(table: _Object, arm: str, seed: str) -> dict[str, float]:
    """The further figures of one run."""
    return {
        name: by_arm[arm]["by_seed"][seed]
        for name, by_arm in table.get("metrics", {}).items()
        if seed in by_arm.get(arm, {}).get("by_seed", {})
    }


def _identity_faults(study: Study, confirmation: Study) -> Iterator[str]:
    """A confirmation runs with the very settings of the search: method, teacher, data, metric, seeds, device."""
    wanted, found = study.identity(), confirmation.identity()
    for key in sorted(wanted.keys() | found.keys()):
        if not key.startswith(_UNUSED) and wanted.get(key) != found.get(key):
            yield f"confirmation.spec.{key} is {_brief(found.get(key))}, expected {_brief(wanted.get(key))}"


def _freshness_faults(confirmation: _Object, content: _Object) -> Iterator[str]:
    """A confirmation is on seeds that the search has not seen."""
    seen = sorted({*content["seeds"]["training"], *content["seeds"]["controls"]} & {*confirmation["seeds"]})
    if seen:
        yield f"confirmation: seed {seen[0]} is not fresh, the search ran on it too"
    if confirmation["seeds"] != content["seeds"]["confirmation"]:
        yield f"seeds.confirmation is {_brief(content['seeds']['confirmation'])}, the confirmation has other seeds"


def _row(
    number: int,
    role: str,
    by_seed: dict[str, float],
    *,
    step: int = 0,
    evaluations: Sequence[float] = (),
    protocol: str = "",
) -> Row:
    """A finished trial as the database would hold it, with what its numbers need."""
    (first, value), *others = by_seed.items()
    return Row(
        number=number, state="COMPLETE", role=role, params={}, weights=(), seeds=(int(first),), value=value,
        intermediate={step: value}, repeats=tuple((int(seed), step, score) for seed, score in others),
        evaluations=tuple(evaluations), duration_s=None, reason=None, is_final=False, owner=None, retry_of=None,
        protocol=protocol,
    )  # fmt: skip


def _differences(expected: Any, found: Any, where: str = "", *, rel: float = _REL) -> Iterator[str]:
    """One line for each value that is not as expected.

    Keys that one side alone has are not looked at: the schema says which must be there, versions may add others.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [key for key in expected if key in found]:
            yield from _differences(expected[key], found[key], f"{where}.{key}" if where else key, rel=rel)
    elif isinstance(expected, list | tuple) and isinstance(found, list) and len(expected) == len(found):
        for index, (value, other) in enumerate(zip(expected, found, strict=True)):
            yield from _differences(value, other, f"{where}[{index}]", rel=rel)
    elif not _is_same(expected, found, rel):
        yield f"{where} is {_brief(found)}, expected {_brief(expected)}"


def _is_same(expected: Any, found: Any, rel: float) -> bool:
    if isinstance(expected, float) and isinstance(found, float | int) and not isinstance(found, bool):
        return _is_close(expected, found, rel)
    return bool(expected == found) and isinstance(expected, bool) == isinstance(found, bool)


def _are_close(first: Sequence[float], second: Sequence[float]) -> bool:
    return len(first) == len(second) and all(map(_is_close, first, second))


def _is_close(first: float, second: float, rel: float = _REL) -> bool:
    return math.isclose(first, second, rel_tol=rel, abs_tol=1e-12)


def _brief(value: Any) -> str:
    """A value in a line for people."""
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, list | tuple) and all(isinstance(item, float | int) for item in value):
        return "[" + ", ".join(f"{item:.6g}" for item in value[:8]) + (", ...]" if len(value) > 8 else "]")
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
