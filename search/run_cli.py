"""Commands for one network at a time, without a study: distil it, sample from it, score it."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdense_core.errors import BadValue
from search.console import (
    check_folder,
    device_option,
    format_option,
    load_settings,
    print_values,
    threads_option,
    use_threads,
)
from search.logs import say

if TYPE_CHECKING:
    from search.sections import Arm
    from search.spec import Study

_path = click.Path(path_type=Path)
_file = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("file", metavar="STUDY.yaml", type=_path)
@click.option("--a", type=float, help="Slope of w_k = exp(a k + b), k along the method's loss terms.")
@click.option("--b", type=float, help="Intercept, at least -5.")
@click.option("--weights", metavar="W1,...,WK", help="The weights themselves, instead of --a and --b.")
@click.option("--control", metavar="NAME", help="A control, such as endpoint_only: its weights and its settings.")
@click.option("--seed", type=int, help="Training seed; default: the study's.")
@click.option("--output", required=True, type=_path, help="A folder for the student, its samples and its scores.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of the file; repeatable.")
@click.option("--device", help="cpu, cuda or cuda:NUMBER; default: as resources.gpus says.")
@format_option("yaml", "json")
def distill(
    file: Path,
    a: float | None,
    b: float | None,
    weights: str | None,
    control: str | None,
    seed: int | None,
    output: Path,
    overrides: tuple[str, ...],
    device: str | None,
    form: str,
) -> None:
    """Run one distillation of a study file, without a database; again after an interruption, and it goes on."""
    from search.study_file import load_study

    settings = load_settings()
    study = load_study(file, overrides=overrides, models=settings.models)
    chosen = _chosen(study, a, b, weights, control)
    use_threads(int(study.spec.resources.cpus))
    from search.single import distill as run

    result = run(study, chosen, settings, output=output, seed=seed, device=device)
    if form == "yaml":
        shown = ("metric", "value", "metrics", "scores", "shares", "settings", "seed", "nfe", "last_session_s")
        result = {key: result[key] for key in shown if result.get(key) not in ({}, None)}
    print_values(result, form)
    say(f"in {output}: student.safetensors, samples.png, result.json")


@click.command()
@click.argument("network", metavar="NETWORK")
@click.option("--output", required=True, type=_file, help="A PNG: a grid of images.")
@click.option("--count", "-n", default=64, show_default=True, type=click.IntRange(min=1), help="Images.")
@click.option("--columns", type=click.IntRange(min=1), help="Of the grid; default: as square as it gets.")
@click.option("--scale", type=click.IntRange(min=1), help="Of the grid; default: 32 pixels an image or more.")
@click.option("--seed", default=0, show_default=True, help="Of the noise; that of an evaluation gives its images.")
@click.option("--label", type=int, help="One class for all images.")
@click.option("--solver", help="For a teacher: euler, heun, dpm2, ipndm, deis_tab or dpmpp (the default).")
@click.option("--steps", type=click.IntRange(min=1), help="For a teacher: steps of the solver; default 12.")
@click.option("--png", type=click.Path(path_type=Path, file_okay=False), help="A folder for each image as a file too.")
@click.option("--npz", type=_file, help="A file for all images as an array too.")
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1))
@device_option
@threads_option
def sample(
    network: str,
    output: Path,
    count: int,
    columns: int | None,
    scale: int | None,
    seed: int,
    label: int | None,
    solver: str | None,
    steps: int | None,
    png: Path | None,
    npz: Path | None,
    batch: int,
    device: str,
) -> None:
    """Draw images from a student or a teacher: a file, or the name of a teacher."""
    from search.judging import draw_samples

    if output.suffix.lower() != ".png":
        raise BadValue(f"--output is {output}; the grid is a PNG, so name it {output.with_suffix('.png')}")
    for target in (output, npz):
        if target is not None:
            check_folder(target)
    nfe = draw_samples(
        network, output, models=load_settings().models, count=count, columns=columns, scale=scale, seed=seed,
        label=label, solver=solver, steps=steps, png=png, npz=npz, batch=batch, device=device,
    )  # fmt: skip
    say(f"wrote {output}: {count} images at NFE {nfe}")


@click.command()
@click.argument("source", metavar="NETWORK|IMAGES")
@click.option("--features", default="inception", show_default=True, help="A feature network's name or file.")
@click.option("--reference", help="Reference statistics' name or file; default: as the features are called.")
@click.option("--count", "-n", type=click.IntRange(min=2), help="Default: 50000 samples of a network, or all images.")
@click.option("--seed", default=0, show_default=True, help="Of the samples' noise, or of the choice among images.")
@click.option("--solver", help="For a teacher; default dpmpp.")
@click.option("--steps", type=click.IntRange(min=1), help="For a teacher: steps of the solver; default 12.")
@click.option("--batch", default=500, show_default=True, type=click.IntRange(min=1))
@device_option
@threads_option
@format_option("yaml", "json")
def fid(
    source: str,
    features: str,
    reference: str | None,
    count: int | None,
    seed: int,
    solver: str | None,
    steps: int | None,
    batch: int,
    device: str,
    form: str,
) -> None:
    """The Fréchet distance of a network's samples, or of images (a folder, .zip or .npz), with its protocol."""
    from search.judging import score

    print_values(
        score(
            source, load_settings().models, features=features, reference=reference or features, count=count, seed=seed,
            solver=solver, steps=steps, batch=batch, device=device,
        ),
        form,
    )  # fmt: skip


COMMANDS = (distill, sample, fid)


def _chosen(study: "Study", a: float | None, b: float | None, weights: str | None, control: str | None) -> "Arm":
    """What is to be run, in the one way in which weights were given.

    Raises:
        BadValue: none or several ways, an unknown control, or not numbers.
    """
    from bdense_core.weights import MIN_INTERCEPT, checked, log_linear
    from search.sections import Arm

    given = sum(value is not None for value in (a, weights, control))
    if given != 1 or (a is None) != (b is None):
        raise BadValue("give the weights in one way: --a A --b B, or --weights W1,...,WK, or --control NAME")
    num_terms, controls = study.num_branches, study.controls()
    if control is not None:
        if control not in controls:
            raise BadValue(f"there is no control {control!r}; known are {', '.join(controls)}")
        return controls[control]
    if a is not None and b is not None:
        if not (math.isfinite(a) and math.isfinite(b)):
            raise BadValue(f"--a and --b must be finite numbers, got {a:g} and {b:g}")
        if b < MIN_INTERCEPT:
            raise BadValue(f"--b is {b:g}, below the paper's limit of {MIN_INTERCEPT:g}; give more")
        line = log_linear(a, b, num_terms, index_origin=study.spec.space.index_origin)
        return Arm(name="given", weights=line)
    try:
        numbers = tuple(float(part) for part in (weights or "").split(","))
    except ValueError as error:
        raise BadValue(f"--weights is {weights!r}; give {num_terms} numbers with commas between them") from error
    if len(numbers) != num_terms:
        terms = ", ".join(study.spec.method.terms)
        raise BadValue(f"--weights has {len(numbers)} numbers; this method has {num_terms} loss terms: {terms}")
    return Arm(name="given", weights=checked(numbers))
