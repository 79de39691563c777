"""Commands that compare weightings on fresh seeds: on the study that found them, and on a target."""

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdense_core.errors import BadValue
from search import logs
from search.console import (
    INTERRUPTED,
    format_option,
    load_settings,
    print_table,
    ray_option,
    storage_comment,
    storage_option,
    study_option,
    typed_again,
)
from search.logs import say
from search.trackers import NAMES

if TYPE_CHECKING:
    from search.comparison import Comparison
    from search.settings import Settings
    from search.spec import Study
    from search.storage import StudyStore


_log_option = click.option(
    "--log-format", default="text", show_default=True, type=click.Choice(logs.FORMATS),
    help="What goes to standard error: lines for people, or one JSON object a line.",
)  # fmt: skip
tracker_option = click.option(
    "--tracker", "tracked_by", multiple=True, type=click.Choice(NAMES), help="Send runs to a tracker; repeatable.",
)  # fmt: skip


@click.command()
@study_option
@storage_option
@ray_option
@click.option("--top", default=3, show_default=True, type=click.IntRange(1, 100), help="Searched trials, best first.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(2, 100), help="Fresh training seeds.")
@_log_option
@tracker_option
@format_option("table", "json")
def confirm(
    name: str,
    storage: str | None,
    ray_address: str | None,
    top: int,
    seeds: int,
    log_format: str,
    tracked_by: tuple[str, ...],
    form: str,
) -> None:
    """Run the best trials and the controls again on fresh seeds, and say whether any is better.

    It continues where it was interrupted; asked for more trials or seeds, it runs what is missing.
    """
    logs.configure(log_format)
    from search import comparison, derived
    from search.launch import found_studies

    settings = load_settings(storage, ray_address)
    study = derived.confirmation(found_studies(settings), name, top=top, seeds=seeds)
    (found,) = _compared(_run([study], settings, storage, log_format, tracked_by))
    if form == "json":
        click.echo(json.dumps(comparison.to_dict(found), indent=2))
        return
    print_table(comparison.table(found))
    if (figures := comparison.further_table(found)) is not None:
        print_table(figures)
    click.echo(found.verdict)
    say(f"export: bdense-weights export --study {shlex.quote(name)}" + storage_comment(storage))


@click.command()
@click.option("--weights", required=True, type=click.Path(path_type=Path, dir_okay=False), help="An exported file.")
@click.option("--to", "target", required=True, metavar="STUDY.yaml", type=click.Path(path_type=Path))
@click.option("--nfe", default=None, metavar="N,...", help="NFEs of the target.  [default: the target's own]")
@click.option("--top", default=3, show_default=True, type=click.IntRange(1, 100), help="Candidates of the file.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(2, 100), help="Training seeds of each.")
@storage_option
@ray_option
@_log_option
@tracker_option
@format_option("table", "json")
def transfer(
    weights: Path,
    target: Path,
    nfe: str | None,
    top: int,
    seeds: int,
    storage: str | None,
    ray_address: str | None,
    log_format: str,
    tracked_by: tuple[str, ...],
    form: str,
) -> None:
    """Run exported weights and the controls on a target, and print what they are worth there.

    It continues where it was interrupted; asked for more, it runs what is missing.
    """
    logs.configure(log_format)
    from search import derived
    from search.comparison import further_table
    from search.transfer import to_object, transfer_table, transfer_tables
    from search.weights_file import read

    settings = load_settings(storage, ray_address)
    exported = read(weights)
    numbers = _numbers(nfe) if nfe else []
    found = derived.transfers(exported, target, nfe=numbers, top=top, seeds=seeds, models=settings.models)
    tables = transfer_tables(_compared(_run(found, settings, storage, log_format, tracked_by)))
    if form == "json":
        click.echo(json.dumps(to_object(tables[0]), indent=2))
        return
    print_table(transfer_table(tables[0]))
    for number, item in tables[0].comparisons.items():
        if (figures := further_table(item)) is not None:
            print_table(figures)
        click.echo(f"NFE {number}: {item.verdict}")


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadValue(f"--nfe is {text!r}; give numbers with commas between them, such as 2,3") from error
    if min(numbers) < 1:
        raise BadValue(f"--nfe is {text!r}; an NFE is at least 1")
    return list(dict.fromkeys(numbers))


def _run(
    found: "list[Study]", settings: "Settings", storage: str | None, log_format: str, tracked_by: tuple[str, ...]
) -> "list[StudyStore]":
    """Run what is missing of each; one after the other, since each has its own teacher caches and its own Ray Tune."""
    from search import launch

    stores = []
    for study in found:
        logs.configure(log_format, study=study.name)
        outcome = launch.launch(study, settings, with_dashboard=False, dashboard_port=0, tracked_by=tracked_by)
        if outcome.interrupted:
            say(
                f"interrupted; {outcome.given_back} running trial(s) went back into the queue. "
                f"Resume with: {typed_again(storage)}"
            )
            sys.exit(INTERRUPTED)
        stores.append(outcome.store)
    return stores


def _compared(stores: "list[StudyStore]") -> "list[Comparison]":
    from search.comparison import compare
    from search.records import mixed_versions

    found = []
    for store in stores:
        rows = store.rows()
        if mixed := mixed_versions(row for row in rows if row.state == "COMPLETE"):
            say(f"warning: {store.name}: {mixed}", level=logging.WARNING)
        found.append(compare(store.study, rows))
    return found


COMMANDS = (confirm, transfer)
