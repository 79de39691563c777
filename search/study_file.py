"""From a study file to a resolved study: read, overridden, validated, its files found and hashed. No torch."""

import itertools
import math
from pathlib import Path
from typing import Any

import yaml

from bdense_core import assets
from bdense_core.errors import BadValue, ConfigError, WeightsError
from bdense_core.files import HashedFile
from bdense_core.task import Evaluation
from search import tuning
from search.datasets import find_dataset
from search.errors import MissingFile
from search.model_files import Role, features_name, find
from search.sections import EvaluationSection
from search.space import family_of, free_axes
from search.spec import Study, StudySpec, flatten, validate

_LARGEST_GRID = 100_000
"""Points: all of them are held in memory."""


def load_study(
    path: Path,
    *,
    name: str | None = None,
    overrides: tuple[str, ...] = (),
    models: Path | None = None,
    tolerate_missing: bool = False,
) -> Study:
    """Read a study file, apply `KEY=VALUE` overrides, validate, and hash the files it names.

    Args:
        models: where fetched and imported teachers, features and references are.
        tolerate_missing: list what is not there in `Study.missing` instead of raising, for a plan.

    Raises:
        ConfigError: the file is missing or wrong; the message says which key and what is known.
        MissingFile: a file that it names is missing.
    """
    path = path if path.exists() else _shipped(path)
    values = _read(path)
    for override in overrides:
        values = _merged(values, _override(values, override))
    if name is not None:
        values["name"] = name
    spec = validate(values, str(path))
    _check_sense(spec)
    return _resolve(spec, path.parent, models, tolerate_missing)


def _shipped(path: Path) -> Path:
    """A shipped study by its name, with or without the ending, or as it is called in a checkout; else the path."""
    shipped = studies_folder() / path.with_suffix(".yaml").name
    is_name = path.parent in (Path(), Path("studies")) and path.suffix in ("", ".yaml")
    return shipped if is_name and shipped.exists() else path


def _read(path: Path) -> dict[str, Any]:
    """A study file's values, on top of those of the file that its key `base` names."""
    values = _raw(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or "base" in (below := _raw(path.parent / base)):
        raise ConfigError(f"base in {path} must name one study file without a base of its own, got {base!r}")
    return _merged(below, values)


def _raw(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = ", ".join(sorted(p.name for p in studies_folder().glob("*.yaml")))
        raise ConfigError(f"there is no study file {path}; shipped studies: {known}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the study file {path}: {error}") from error
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{path} is no valid YAML: {detail}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, as in studies/digits.yaml")
    return values


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested values, those of `above` before those of `below`.

    Another method, or another family of weights, has other settings: such a section replaces the one below it. With a
    method goes what is said of its settings and figures.
    """
    result = dict(below)
    if _is_another("method", _section(below, "method"), _section(above, "method")):
        result = {key: value for key, value in below.items() if key not in ("tune", "constraints")}
    for key, value in above.items():
        inner = result.get(key)
        if isinstance(inner, dict) and isinstance(value, dict) and not _is_another(key, inner, value):
            result[key] = _merged(inner, value)
        else:
            result[key] = value
    return result


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _is_another(section: str, below: dict[str, Any], above: dict[str, Any]) -> bool:
    if section == "space":
        return "family" in above and family_of(above) != family_of(below)
    return section == "method" and "kind" in above and above["kind"] != below.get("kind")


def _override(values: dict[str, Any], text: str) -> dict[str, Any]:
    """One `a.b=value` as nested values to lay above `values`."""
    key, above = assignment(text, "--set")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.get(parent, {})
        if not isinstance(values, dict):
            raise BadValue(f"--set {text}: {parent} is a value, not a section")
    for name in (last, *reversed(parents)):
        above = {name: above}
    return dict(above)


def assignment(text: str, command: str) -> tuple[str, Any]:
    """The dotted key and the value, which is YAML, of one `a.b=value` that was given to a command.

    Raises:
        BadValue: it is none.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise BadValue(f"{command} wants KEY=VALUE, got {text!r}; for example {command} budget.trials=20")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise BadValue(f"{command} {text}: the value is no valid YAML") from error


def _resolve(spec: StudySpec, folder: Path, models: Path | None, tolerate_missing: bool) -> Study:
    missing: list[str] = []
    found = _files(spec, folder, models, missing) if spec.method.needs_teacher else {}
    dataset = None
    if spec.method.needs_data:
        try:
            dataset = find_dataset(spec.dataset, folder=folder, models=models)
        except MissingFile as error:
            missing.append(str(error))
    if missing and not tolerate_missing:
        raise MissingFile("; and ".join(missing))
    section, evaluation = spec.evaluation or EvaluationSection(), None
    if "features" in found and "reference" in found:
        evaluation = Evaluation(
            features_name=features_name(found["features"]),
            features=found["features"],
            reference=found["reference"],
            n_samples=section.n_samples,
            seed=section.seed,
            batch=section.batch,
            early_samples=section.early_samples,
        )
    return Study(
        spec=spec, teacher=found.get("teacher"), evaluation=evaluation, dataset=dataset, missing=tuple(missing)
    )


def _files(spec: StudySpec, folder: Path, models: Path | None, missing: list[str]) -> dict[Role, HashedFile]:
    """The files that a study names, as far as they are there; a line for each other one goes to `missing`."""
    if spec.teacher is None:
        raise BadValue("the study names no teacher; add `teacher: digits`, or the path of one")
    section = spec.evaluation or EvaluationSection()
    wanted: dict[Role, str] = {
        "teacher": spec.teacher,
        "features": section.features,
        "reference": section.reference or section.features,
    }
    found: dict[Role, HashedFile] = {}
    for role, name in wanted.items():
        try:
            found[role] = find(name, role, folder=folder, models=models)
        except MissingFile as error:
            missing.append(str(error))
    return found


def _check_sense(spec: StudySpec) -> None:
    """What each section alone cannot know."""
    for key, value in flatten(spec.model_dump(mode="python")).items():
        if not _is_finite(value):
            raise BadValue(f"{key} must be finite, got {value}")
    if len(spec.method.terms) < 2 and (free_axes(spec.axes) or not spec.tune):
        raise BadValue(
            "method.num_branches must be at least 2: a single loss term has no weights to search (with `tune` and "
            "`space: {family: free}` settings alone are searched)"
        )
    if spec.method.budget_kimg != int(spec.method.budget_kimg):
        raise BadValue(f"method.budget_kimg must be whole, as scores come at whole kimg; got {spec.method.budget_kimg}")
    for corner in itertools.product(*spec.axes.values()):
        try:
            spec.space.weights(dict(zip(spec.axes, corner, strict=True)), len(spec.method.terms))
        except WeightsError as error:
            raise BadValue(f"space reaches {corner}, which gives no weights: {error}") from error
    check_search(spec)
    if spec.method.needs_teacher:
        _check_dataset(spec)


def _check_dataset(spec: StudySpec) -> None:
    """Whether what is shipped and named was made for the study's data."""
    made_for = {folder: folder.partition("-")[0] for folder in {asset.partition("/")[0] for asset in assets.names()}}
    features = spec.evaluation.features if spec.evaluation else "digits"
    if (data := made_for.get(spec.teacher or "")) not in (None, spec.dataset):
        raise BadValue(f"dataset is {spec.dataset!r}, but the teacher {spec.teacher!r} was trained on {data!r}")
    if (data := made_for.get(features)) not in (None, spec.dataset):
        raise BadValue(
            f"dataset is {spec.dataset!r}, but evaluation.features {features!r} look at {data!r}; name others"
        )


def _is_finite(value: Any) -> bool:
    """Whether a value, and each value within it, is no infinity and no NaN."""
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def check_search(spec: StudySpec) -> None:
    """Whether sampler and pruner can do anything with what is searched and this budget.

    Raises:
        BadValue: they cannot.
    """
    sampler, pruner, free = spec.sampler, spec.pruner, spec.searched
    numbers = [name for name, axis in free.items() if not axis.choices]
    if sampler.kind == "cmaes" and len(numbers) < 2:
        raise BadValue(
            f"sampler.kind cmaes needs two axes, and this space searches {' and '.join(numbers) or 'none'}"
            f"{'' if len(numbers) == len(free) else ' that are numbers'}; use tpe or gp"
        )
    size = _grid_size(spec) if sampler.kind == "grid" else 0
    if sampler.kind == "grid" and size > _LARGEST_GRID:
        raise BadValue(
            f"the grid over {len(free)} axes has {size} points, more than {_LARGEST_GRID}; lower sampler.grid_points "
            f"(now {sampler.grid_points}), or use another sampler.kind"
        )
    if sampler.kind == "grid" and spec.budget.trials > size:
        raise BadValue(
            f"budget.trials is {spec.budget.trials}, but the grid over {' and '.join(free) or 'no axis'} has "
            f"{size} points; lower it, or raise sampler.grid_points (now {sampler.grid_points})"
        )
    end = spec.steps[-1]
    if pruner.kind in ("successive_halving", "hyperband") and pruner.min_resource_kimg >= end:
        raise BadValue(
            f"pruner.min_resource_kimg is {pruner.min_resource_kimg}, but trials end at {end} kimg, where none is "
            "stopped; lower it"
        )


def _grid_size(spec: StudySpec) -> int:
    """How many points it has; of an axis with far too many, that axis' alone."""
    num_points = spec.sampler.grid_points
    if num_points > _LARGEST_GRID:
        return num_points
    return math.prod(len(tuning.grid(axis, num_points)) for axis in spec.searched.values())


def studies_folder() -> Path:
    """Where the shipped study files are: beside the checkout's packages, or inside the installed wheel."""
    here = Path(__file__).resolve().parent
    installed = here / "studies"
    return installed if installed.is_dir() else here.parent / "studies"
