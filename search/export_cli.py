"""Commands around the weights file: export it, and verify one from anywhere."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bdense_core.errors import BadValue, BDenseError
from search.console import (
    check_folder,
    format_option,
    load_settings,
    print_table,
    storage_option,
    study_option,
    use_threads,
    write,
    yaml_text,
)
from search.logs import say

if TYPE_CHECKING:
    from search.verify import Check

_file = click.Path(path_type=Path, dir_okay=False)


@click.command()
@study_option
@storage_option
@click.option("--top", default=3, show_default=True, type=click.IntRange(min=1), help="Candidates in the file.")
@click.option("--candidate", metavar="TRIAL", type=click.IntRange(min=0), help="Another trial than the best.")
@format_option("json", "yaml", "safetensors", "python")
@click.option("--output", type=_file, help="A file; default: standard output.")
def export(name: str, storage: str | None, top: int, candidate: int | None, form: str, output: Path | None) -> None:
    """Print the best weights of a study, with all that is needed to use and to trust them."""
    if form == "safetensors" and output is None:
        raise BadValue("--format safetensors is no text; give --output FILE.safetensors beside it")
    from search.export import export_object
    from search.launch import found_studies

    content = export_object(found_studies(load_settings(storage)).open(name), top=top, trial=candidate)
    if not content["confirmed"]:
        say(f"warning: {_doubt(content)}")
    if output is None:
        click.echo(_text(content, form), nl=False)
        return
    if form == "safetensors":
        _write_safetensors(output, content)
    else:
        write(output, _text(content, form))
    say(f"wrote {output}")


@click.command()
@click.argument("file", type=_file)
@click.option("--quick", is_flag=True, help="Without running the trial again.")
@click.option("--device", help="For the run: cpu, cuda or cuda:NUMBER; default: as the study's resources.gpus says.")
@click.option(
    "--dataset",
    help="For the run, of a method that trains on data: a name, folder or file, where it has no known name.",
)
@format_option("table", "json")
def verify(file: Path, quick: bool, device: str | None, dataset: str | None, form: str) -> None:
    """Check a weights file: that it is whole, that its numbers follow from one another, that its trial runs again.

    Exit code 1 if a check fails. The database is not asked, and nothing that the file names is executed.
    """
    from search import weights_file

    content = weights_file.load(file)
    use_threads(_threads(content))
    from search import verify as verifying

    checks = list(verifying.verify(content, load_settings(), quick=quick, device=device, dataset=dataset))
    if form == "json":
        click.echo(json.dumps([vars(check) for check in checks], indent=2))
    else:
        print_table(verifying.table(checks))
    _conclude(file, checks)


def _doubt(content: dict[str, Any]) -> str:
    """Why weights are a proposal: constraints that they break, and the verdict, which may be on others than these."""
    if content["violated"]:
        return f"{content['name']} violates {', '.join(content['violated'])}; {content['verdict']}"
    winner = content["confirmation"]["winner"] if content["confirmation"] else None
    return content["verdict"] if winner is None else f"{content['name']} is not confirmed; {content['verdict']}"


def _conclude(file: Path, checks: "list[Check]") -> None:
    """Exit with 1 if a check failed.

    Raises:
        BDenseError: the checks that failed.
    """
    failed = dict.fromkeys(check.name for check in checks if check.outcome == "failed")
    if failed:
        raise BDenseError(f"{file} does not hold: {', '.join(failed)} failed; do not rely on it, or export it again")


def _threads(content: dict[str, Any]) -> int:
    """As a trial of the study: the same bits. The content is not checked yet, and any number will do."""
    try:
        return min(max(1, int(content["spec"]["resources"]["cpus"])), os.cpu_count() or 1)
    except (LookupError, TypeError, ValueError):
        return 1


def _text(content: dict[str, Any], form: str) -> str:
    from search.export import python_text

    if form == "python":
        return python_text(content)
    return yaml_text(content) if form == "yaml" else json.dumps(content, indent=2) + "\n"


def _write_safetensors(path: Path, content: dict[str, Any]) -> None:
    from bdense_core.files import write_bytes_atomically
    from search.export import safetensors_bytes

    check_folder(path)
    try:
        write_bytes_atomically(path, safetensors_bytes(content))
    except OSError as error:
        raise BDenseError(f"cannot write {path}: {error.strerror or error}") from error


COMMANDS = (export, verify)
