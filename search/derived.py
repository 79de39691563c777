"""Comparisons: weightings with their settings on fresh seeds, each a study, made from a search or a weights file."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bdense_core.errors import BadValue, ConfigError
from bdense_core.files import sha256_of
from bdense_core.methods.base import with_settings
from search.comparison import are_equal
from search.errors import NothingFinished
from search.noise import choosable
from search.records import CONTROL, Row
from search.sections import Arm, ComparisonSection
from search.spec import LONGEST_NAME, Study, validate
from search.storage import Studies, StudyStore
from search.study_file import load_study
from search.tuning import value_of

_FRESH = 1000
"""Fresh training seeds begin so far above a study's own, of which there are at most a hundred."""
_FRESH_OF_TRANSFER = 2000
"""Those of a transfer lie above: a study that is its own target has been confirmed below."""


def confirmation_name(study: str) -> str:
    """What the study is called that confirms another one."""
    return _fitting(f"{study}.confirm")


def transfer_name(target: str, source: str, nfe: int) -> str:
    """What the study is called that runs a source's weights on a target."""
    return _fitting(f"{target}.{source}.nfe{nfe}")


def _fitting(name: str) -> str:
    """A name that the database takes: the end of one that is too long gives way to its hash."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}-{sha256_of(name)[:8]}"


def confirmation(studies: Studies, name: str, *, top: int, seeds: int) -> Study:
    """The best `top` searched trials of a study and its controls, each on `seeds` fresh seeds.

    Where it is stored already, what it lacks is added (`Studies.create_or_resume`), and nothing is repeated.

    Raises:
        NothingFinished: no searched trial has run to its end.
        BadValue: it is a comparison itself.
    """
    store = studies.open(name)
    if store.study.spec.comparison is not None:
        raise BadValue(f"study {name!r} is a comparison itself; confirm {store.study.spec.comparison.of!r} instead")
    comparison = ComparisonSection(
        kind="confirm",
        of=name,
        of_created=store.created,
        target=name,
        arms=(*best_arms(store, top), *_controls(store)),
        seeds=_seeds(store.study.spec.seeds.training + _FRESH, seeds),
    )
    return _derived(store.study, confirmation_name(name), comparison)


def best_arms(store: StudyStore, top: int) -> tuple[Arm, ...]:
    """The best searched weightings, best first, without those that are equal to a better one or to a control.

    Raises:
        NothingFinished: no searched trial has run to its end and keeps the constraints.
    """
    chosen: list[Arm] = []
    for arm in map(_arm, choosable(store.name, store.rows())):
        if len(chosen) < top and not any(
            are_equal(arm, other) for other in (*chosen, *store.study.controls().values())
        ):
            chosen.append(arm)
    if not chosen:
        raise NothingFinished(
            f"all finished trials of study {store.name!r} are as a control is, in weights and settings; search more"
        )
    return tuple(chosen)


def _arm(row: Row) -> Arm:
    return Arm(
        name=f"trial-{row.number}", weights=row.weights, settings=row.settings, schedule=row.schedule, rule=row.rule,
        trial=row.number, source_value=row.value,
    )  # fmt: skip


def _controls(store: StudyStore) -> tuple[Arm, ...]:
    values = {row.role: row.value for row in store.rows() if row.is_control and row.state == "COMPLETE"}
    arms = store.study.controls().values()
    return tuple(arm.model_copy(update={"source_value": values.get(CONTROL + arm.name)}) for arm in arms)


def _seeds(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


def transfers(
    exported: dict[str, Any], target: Path, *, nfe: Sequence[int], top: int, seeds: int, models: Path
) -> list[Study]:
    """The best `top` candidates of a weights file and a target's controls, a study for each NFE of the target.

    Args:
        exported: a weights file's content, checked.
        target: a study file.
        nfe: of the target's students, a study for each; none: the target's own.

    Raises:
        BadValue: the weights or the settings mean nothing to the target's students, or no NFE can be set there.
    """
    arms, source = _exported_arms(exported)[:top], exported["study"]
    worth = {control["role"].removeprefix(CONTROL): control["score"]["value"] for control in exported["controls"]}
    confirmed = _confirmed_means(exported)
    found = []
    for number in nfe or (None,):
        study = load_study(target, models=models) if number is None else _at_nfe(target, number, models)
        for arm in arms:
            _check_fits(exported, arm, study)
        controls = [arm.model_copy(update={"source_value": worth.get(arm.name)}) for arm in study.controls().values()]
        comparison = ComparisonSection(
            kind="transfer",
            of=source,
            of_created=exported["provenance"]["created"],
            target=study.name,
            arms=tuple(
                arm.model_copy(update={"confirmed_value": confirmed.get(arm.name)}) for arm in (*arms, *controls)
            ),
            seeds=_seeds(_unseen(study, exported["seeds"]), seeds),
        )
        found.append(_derived(study, transfer_name(study.name, source, study.spec.method.nfe), comparison))
    return found


def _confirmed_means(exported: dict[str, Any]) -> dict[str, float]:
    """By weighting, of those that have run on all of the confirmation's seeds."""
    confirmation = exported["confirmation"] or {"arms": []}
    return {arm["name"]: arm["mean"]["mean"] for arm in confirmation["arms"] if not arm["missing"]}


def _at_nfe(target: Path, number: int, models: Path) -> Study:
    """A target with students of so many network calls.

    Raises:
        BadValue: with its method that follows from other settings.
    """
    method = load_study(target, models=models).spec.method
    if "nfe" not in {found.name for found in fields(method)}:
        raise BadValue(
            f"the method {method.kind} has no setting nfe: it follows from others, and is {method.nfe} in {target}; "
            "leave --nfe out, or change the target's file"
        )
    return load_study(target, overrides=(f"method.nfe={number}",), models=models)


def _unseen(target: Study, seen: dict[str, Any]) -> int:
    """The first of a hundred seeds that neither the target's own searches nor the weights' study has run on."""
    used = {*seen["training"], *seen["controls"], *seen["confirmation"]}
    first = target.spec.seeds.training + _FRESH_OF_TRANSFER
    while used & set(range(first, first + 100)):
        first += _FRESH
    return first


def _exported_arms(exported: dict[str, Any]) -> list[Arm]:
    try:
        return [
            Arm(
                name=f"trial-{candidate['trial']}", weights=candidate["weights"],
                settings=candidate.get("settings", {}),  # older files have none
                schedule=candidate["schedule"], rule=candidate["rule"], trial=candidate["trial"],
                source_value=candidate["score"]["value"],
            )
            for candidate in exported["candidates"]
        ]  # fmt: skip
    except ValidationError as error:
        complaint = error.errors()[0]
        raise BadValue(f"a candidate of the weights file cannot be run: {complaint['msg']}") from error


def _check_fits(exported: dict[str, Any], arm: Arm, target: Study) -> None:
    terms = target.spec.method.terms
    theirs = tuple(exported.get("terms", ())) or terms[: len(arm.weights)]  # older files do not name them
    if len(arm.weights) != len(terms):
        raise BadValue(
            f"the weights are for {len(arm.weights)} loss terms, the target {target.name!r} has {len(terms)} "
            f"({', '.join(terms)}); choose a target with as many"
        )
    if theirs != terms:
        raise BadValue(
            f"the weights are for the loss terms {', '.join(theirs)}, the target {target.name!r} has "
            f"{', '.join(terms)}; choose a target of the same terms"
        )
    space = target.spec.method.target_space
    if exported["target_space"] != space:
        raise BadValue(
            f"the weights were found for losses in {exported['target_space']} space, the target {target.name!r} has "
            f"them in {space} space, where the same weights mean something else; choose another target"
        )
    try:
        _check_settings(arm, target)
    except ConfigError as error:
        raise BadValue(f"{arm.name} has settings that the target {target.name!r} cannot take: {error}") from error
    rows = {len(row) for row in arm.schedule}
    if not rows <= {1, target.num_intervals}:
        raise BadValue(
            f"{arm.name} has weights for each of {max(rows)} intervals, the target has {target.num_intervals} at NFE "
            f"{target.spec.method.nfe}; transfer it where there are as many"
        )


def _check_settings(arm: Arm, target: Study) -> None:
    """Whether they are such as a study may search: the budget, for one, has to be that of the target's controls.

    Raises:
        ConfigError: they are not.
    """
    method = target.spec.method
    with_settings(method, arm.settings)
    axes = method.axes()
    for name, value in arm.settings.items():
        if name not in axes:
            raise BadValue(f"method.{name} is nothing to search; what may be searched: {', '.join(axes) or 'none'}")
        if axes[name].choices:
            value_of(f"method.{name}", axes[name], value)


def _derived(source: Study, name: str, comparison: ComparisonSection) -> Study:
    """A study with the settings of another one that runs a comparison and nothing else."""
    values = source.spec.model_dump(mode="json") | {
        "name": name,
        "comparison": comparison.model_dump(mode="json"),
        "description": f"{comparison.kind} of {comparison.of}",
    }
    values["budget"] |= {"trials": 0, "every_kimg": source.steps[-1]}  # nothing is pruned: one score, at the end
    values["sampler"] |= {"kind": "random"}
    values["pruner"] |= {"kind": "none"}
    return replace(source, spec=validate(values, f"the comparison {name}"))
