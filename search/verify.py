"""Is a weights file what it says? Its parts against each other, against the files here, and against a run of its own.

Files come from strangers: nothing that one holds is executed, and a path in one is opened only to be hashed.
"""

import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from bdense_core import assets
from bdense_core.dataset_names import DATASET_NAMES
from bdense_core.distill import distill
from bdense_core.errors import BDenseError
from bdense_core.files import HashedFile, sha256_of_file
from bdense_core.methods.base import with_settings
from bdense_core.task import Score
from search.consistency import floor_faults, rewordings, score_faults, spec_faults, verdict_faults, weights_faults
from search.datasets import PUBLISHED, fetched_file
from search.errors import MissingFile
from search.model_files import Role, check_reference, features_name, find
from search.preflight import preflight
from search.progress import Meter
from search.sections import EvaluationSection
from search.settings import Settings
from search.spec import Study
from search.statistics import residual_deviation
from search.version import NUMERIC, code_version, package_version
from search.weights_file import complaints, seal_of

Outcome = Literal["passed", "failed", "warning", "skipped"]

_MODEL_FILES = (".safetensors", ".pt")
"""What a path of a stranger must end in to be hashed: no device, no pipe, no file of the system's."""
_TWO_RUNS = 2 * math.sqrt(2)
"""Two standard deviations of a difference of two runs, in those of one."""
_STYLES = {"passed": "green", "failed": "bold red", "warning": "yellow", "skipped": "dim"}

_Object = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at. A check with several faults comes once for each of them."""

    name: str
    outcome: Outcome
    detail: str


def verify(
    content: _Object, settings: Settings, *, quick: bool, device: str | None = None, dataset: str | None = None
) -> Iterator[Check]:
    """Every check of what a weights file holds, each as soon as it is known.

    Args:
        quick: without running the trial again.
        device: for that run; None: as the study says.
        dataset: for that run, of a method that trains on data; None: as the study says, if that goes by a known name.
    """
    misshapen = complaints(content)
    yield from _judged("schema", misshapen, "as the format says")
    yield from _judged("sha256", _seal_faults(content), "of all the content, as the export wrote it")
    if misshapen:
        yield Check(name="all else", outcome="skipped", detail="what is not as the format says cannot be read")
        return
    try:
        study = Study.from_dict(content["spec"])
    except (BDenseError, TypeError) as error:
        yield Check(name="spec", outcome="failed", detail=f"this version cannot read it: {error}")
        return
    needed = [
        *_judged("spec", spec_faults(content, study), "has the hash named, and what was copied from it is as there"),
        *_judged(
            "weights", weights_faults(content, study), "as a and b, or the parameters, give them and the settings"
        ),
    ]
    yield from needed
    yield from _judged("scores", score_faults(content, study), "each the mean of its values by seed")
    yield from _judged("noise floor", floor_faults(content), "as the controls' values give it")
    yield from _judged("verdict", verdict_faults(content, study), _verdict_words(content))
    yield from _wording(content)
    here, missing = _located(study, settings.models)
    are_here = "teacher, features and reference are here, with the hashes named"
    files = [*_judged("files", missing, are_here if study.teacher else "the method trains no network, and needs none")]
    yield from files
    yield _version(content)
    if not quick:
        is_sound = all(check.outcome != "failed" for check in (*needed, *files))
        here = replace(here, dataset=dataset or _known_data(here, settings.models))
        yield from _rerun(content, here, settings, device, is_sound=is_sound)


def table(checks: list[Check]) -> Table:
    """The checks, one a line. What comes from the file is shown as it is: no markup, no control characters."""
    shown = Table()
    for column in ("check", "outcome", "what was found"):
        shown.add_column(column, overflow="fold")
    for check in checks:
        detail = Text("".join(letter if letter.isprintable() else "?" for letter in check.detail))
        shown.add_row(check.name, check.outcome, detail, style=_STYLES[check.outcome])
    return shown


def _judged(name: str, faults: Iterable[str], passed: str) -> Iterator[Check]:
    """A failed check for each fault, else a passed one."""
    found: list[str] = []
    try:
        found.extend(faults)
    except ArithmeticError as error:  # a stranger's numbers may be as large as a float can be
        found.append(f"its numbers cannot be worked out: {error}")
    for fault in found:
        yield Check(name=name, outcome="failed", detail=fault)
    if not found:
        yield Check(name=name, outcome="passed", detail=passed)


def _seal_faults(content: _Object) -> Iterator[str]:
    expected, found = seal_of(content), content.get("sha256")
    if found != expected:
        yield f"the file was altered after its export: sha256 is {str(found)[:64]}, the content has {expected}"


def _verdict_words(content: _Object) -> str:
    num_tables = (content["confirmation"] is not None) + len(content["transfer"])
    if num_tables == 0:
        return "no comparison, and no confirmation claimed"
    return f"{num_tables} comparison(s) follow from their values by seed"


def _wording(content: _Object) -> Iterator[Check]:
    """The same version says the same of the same values; another one may have found better words."""
    version = content["provenance"]["exported_by"]
    is_ours = version == code_version() and not version.endswith(".dirty")
    for line in rewordings(content):
        yield Check(name="wording", outcome="failed" if is_ours else "warning", detail=line)


# -- the files here


def _located(study: Study, models: Path) -> tuple[Study, list[str]]:
    """The study with this machine's files of the hashes that it names, and what is not as it should be."""
    if study.teacher is None or study.evaluation is None:
        return study, []
    evaluation, section = study.evaluation, study.spec.evaluation or EvaluationSection()
    wanted: dict[Role, tuple[str, HashedFile]] = {
        "teacher": (study.spec.teacher or "", study.teacher),
        "features": (section.features, evaluation.features),
        "reference": (section.reference or section.features, evaluation.reference),
    }
    found = {role: _here(role, name, file, models) for role, (name, file) in wanted.items()}
    faults = [_absence(role, *wanted[role], models) for role, file in found.items() if file is None]
    teacher, features, reference = (found[role] for role in wanted)
    if teacher is None or features is None or reference is None:
        return study, faults
    try:
        check_reference(features, reference)
        if (name := features_name(features)) != evaluation.features_name:
            faults.append(f"the features are called {name}, the file calls them {evaluation.features_name}")
    except BDenseError as error:
        faults.append(str(error))
    evaluation = replace(evaluation, features=features, reference=reference)
    return replace(study, teacher=teacher, evaluation=evaluation), faults


def _here(role: Role, name: str, file: HashedFile, models: Path) -> HashedFile | None:
    """The file of that hash: shipped, among the models, or where the file's maker had it."""
    for path in (*_known(role, name, models), Path(file.path)):
        with suppress(OSError, ValueError):
            if path.suffix in _MODEL_FILES and path.is_file() and sha256_of_file(path) == file.sha256:
                return HashedFile(path=str(path.absolute()), sha256=file.sha256)
    return None


def _known(role: Role, name: str, models: Path) -> list[Path]:
    """This machine's files of a role, those of that name first."""
    shipped = [assets.path(asset) for asset in assets.names() if asset.endswith(f"/{role}.safetensors")]
    return sorted((*shipped, *models.glob(f"*/{role}.*")), key=lambda path: (path.parent.name != name, path))


def _absence(role: Role, name: str, file: HashedFile, models: Path) -> str:
    """What to say where there is no file of that hash."""
    wanted = f"no {role} with sha256 {file.sha256} is here"
    if named := [path for path in _known(role, name, models) if path.parent.name == name]:
        return f"{wanted}: the one called {name!r} has {sha256_of_file(named[0])}"
    if Path(name).name != name:
        return f"{wanted}: it was a file of its own, {name!r}; put it into {models}/NAME/ as {role}.safetensors"
    try:
        find(name, role, folder=models, models=models)
    except MissingFile as error:
        return f"{wanted}: {error}"
    return wanted


# -- the run of its own


def _version(content: _Object) -> Check:
    """Whether this code and these packages are the ones that ran the trial."""
    there = {"code": content["code_version"], **_numerics(content)}
    here = {"code": code_version(), **{name: package_version(name) for name in _numerics(content)}}
    unlike = [f"{name} {there[name]} there, {here[name]} here" for name in there if there[name] != here[name]]
    if unlike:
        return Check(
            name="version", outcome="warning", detail="; ".join(unlike) + ": a run may differ in its last digits"
        )
    return Check(name="version", outcome="passed", detail=f"code {here['code']}, and the same packages")


def _numerics(content: _Object) -> dict[str, str]:
    """The packages that numbers depend on."""
    packages = content["provenance"]["packages"]
    return {name: packages[name] for name in NUMERIC if name in packages}


def _rerun(
    content: _Object, study: Study, settings: Settings, device: str | None, *, is_sound: bool
) -> Iterator[Check]:
    """The trial once more, on its own training seeds: the same noise, so the same bits where nothing else differs."""
    values = {seed: content["by_seed"].get(str(seed)) for seed in study.trial_seeds()}
    if not is_sound or None in values.values():
        detail = "it needs the study, the weights, the files and the values by seed that are meant"
        yield Check(name="rerun", outcome="skipped", detail=detail)
        return
    if study.spec.method.needs_data and study.dataset is None:
        detail = (
            f"it trains on {study.spec.dataset}, which is no data set that goes by a name here; give --dataset DATA"
        )
        yield Check(name="rerun", outcome="skipped", detail=detail)
        return
    try:
        by_seed, metrics = _run(content, study, settings, device)
    except BDenseError as error:
        yield Check(name="rerun", outcome="failed", detail=f"it does not run: {error}")
        return
    is_alike = _version(content).outcome == "passed"
    found, expected = ({f"seed {seed}": value for seed, value in of.items()} for of in (by_seed, values))
    outcome, detail = _compared(found, expected, _limit(content), is_alike=is_alike)
    yield Check(name="rerun", outcome=outcome, detail=detail)
    if content.get("metrics"):
        yield _figures(content, metrics, is_equal=found == expected, is_alike=is_alike)


def _figures(content: _Object, found: dict[str, float], *, is_equal: bool, is_alike: bool) -> Check:
    """The figures beside the metric, of that run. `is_equal`: it reached its values to the last bit."""
    expected = content["metrics"]
    if lacking := [name for name in expected if name not in found]:
        return Check(name="figures", outcome="failed", detail=f"the run gives no {', '.join(lacking)}")
    judged = []
    for name, value in expected.items():
        limit = 0.0 if is_equal else _figure_limit(content, name)
        outcome, detail = _compared({name: found[name]}, {name: value}, limit, is_alike=is_alike)
        outcome = "warning" if outcome == "failed" and limit is None else outcome
        judged.append(Check(name="figures", outcome=outcome, detail=detail))
    worst: tuple[Outcome, ...] = ("failed", "warning", "passed")
    first = min(judged, key=lambda check: worst.index(check.outcome))
    return first if first.outcome != "passed" else replace(first, detail="; ".join(check.detail for check in judged))


def _figure_limit(content: _Object, name: str) -> float | None:
    """As `_limit`, of a further figure: from the confirmation's runs of it, each beside the others on its seed."""
    table = content["confirmation"] or {}
    trained = {arm["name"] for arm in table.get("arms", ()) if arm.get("is_trained", True)}
    runs = [of["by_seed"] for arm, of in table.get("metrics", {}).get(name, {}).items() if arm in trained]
    shared = sorted(set.intersection(*map(set, runs))) if runs else []
    found = residual_deviation([[by_seed[seed] for seed in shared] for by_seed in runs])
    return None if found is None else _TWO_RUNS * found.sd


def _compared(
    found: dict[str, float], expected: dict[str, float], limit: float | None, *, is_alike: bool
) -> tuple[Outcome, str]:
    """What a rerun shows. `limit` is the largest difference that is noise, `is_alike`: no version differs."""
    if found == expected:
        values = ", ".join(f"{name}: {value:.6g}" for name, value in found.items())
        return "passed", f"{values} again, equal to the last bit"
    distances = {name: abs(found[name] - expected[name]) for name in expected}
    farthest = max(distances, key=lambda name: distances[name])
    differ = f"{farthest} gives {found[farthest]:.9g}, the file says {expected[farthest]:.9g}"
    if limit is None:
        return "failed", f"{differ}; without a noise floor nobody can say whether that is chance"
    if not distances[farthest] <= limit:
        return "failed", f"{differ}: {distances[farthest]:.3g} apart, more than the {limit:.3g} that noise explains"
    within = f"{differ}: {distances[farthest]:.3g} apart, within the {limit:.3g} that noise explains"
    if is_alike:
        return "warning", f"{within}, but the same code on a like machine gives the same bits"
    return "passed", within


def _limit(content: _Object) -> float | None:
    """The largest difference of two runs on one seed that is mere noise: 2 standard deviations of a difference.

    The seed's common part cancels, so it is the noise beside it that counts, where that was measured.
    """
    floor = content["noise_floor"]
    if floor is None:
        return None
    sd = floor["sd"] if floor.get("paired_sd") is None else floor["paired_sd"]
    return _TWO_RUNS * float(sd)


def _known_data(study: Study, models: Path) -> str | None:
    """A data set that goes by a name, shipped or fetched; a path in a stranger's file is not opened."""
    name = study.spec.dataset
    if name in PUBLISHED and (file := fetched_file(name, models)).is_file():
        return str(file)
    return name if name in DATASET_NAMES else None


def _run(
    content: _Object, study: Study, settings: Settings, device: str | None
) -> tuple[dict[int, float], dict[str, float]]:
    """The value on each training seed, and the further figures of the first.

    An interrupted run goes on; its state lies in the home's folder `verify`.

    Raises:
        BDenseError: whatever stopped it.
    """
    seeds, method = study.trial_seeds(), with_settings(study.spec.method, content.get("settings", {}))
    schedule = tuple(tuple(map(tuple, rows)) for rows in content["schedule"])
    task = study.task(
        tuple(content["weights"]), seeds[0], cache_root=settings.cache, schedule=schedule, rule=content["rule"]
    )
    state = settings.create(settings.home / "verify") / content["sha256"]
    task = replace(task, snapshots=str(state), device=device or task.device)
    if method.needs_teacher:
        import torch

        from bdense_core.devices import check_device

        check_device(task.device)
        preflight(study, settings)
        # as a trial of the study, so that the value is the same, but no more than there are: the file is a stranger's
        torch.set_num_threads(max(1, int(min(study.spec.resources.cpus, os.cpu_count() or 1))))
    images = method.budget_kimg * 1000 * len(seeds)
    with Meter(study.metric, images=images, resumes=any(state.rglob("snapshot-*"))) as meter:
        *_, last = (e for e in meter.watch(distill(method, task, seeds[1:])) if isinstance(e, Score))
    shutil.rmtree(state, ignore_errors=True)
    repeats = {seed: value for seed, kimg, value in last.repeats if kimg == last.kimg}
    return {seeds[0]: last.value} | repeats, last.metrics
