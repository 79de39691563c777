"""Commands for whoever keeps studies running: how they stand, and pausing, editing, stopping, deleting them."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bdense_core.errors import BadValue, BDenseError
from search.console import format_option, load_settings, print_table, storage_option, study_option, write
from search.logs import say

if TYPE_CHECKING:
    from search.records import Params
    from search.settings import Settings
    from search.spec import Study
    from search.storage import StudyStore


@click.command()
@study_option
@storage_option
@format_option("table", "json")
def status(name: str, storage: str | None, form: str) -> None:
    """Tell how a study stands: who runs what, how fast, whether anything hangs, and how long it takes yet."""
    from dataclasses import asdict

    from search import operations

    found = operations.status(_open(name, storage))
    if form == "json":
        click.echo(json.dumps(asdict(found), indent=2))
        return
    click.echo(operations.summary(found))
    if found.running:
        print_table(operations.running_table(found))


@click.command()
@study_option
@storage_option
@format_option("table", "json", "csv")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="A file, for json and csv.")
def trials(name: str, storage: str | None, form: str, output: Path | None) -> None:
    """List all trials of a study, one a line: for people, programs and spreadsheets."""
    from search import listing

    store = _open(name, storage)
    study, rows = store.study, store.rows()
    if form == "table":
        if output is not None:
            raise BadValue("--output wants --format csv or --format json beside it")
        print_table(listing.trials_table(study, rows))
        return
    if form == "csv":
        text = listing.trials_csv(study, rows)
    else:
        text = json.dumps([listing.trial_record(study, row) for row in rows], indent=2) + "\n"
    if output is None:
        click.echo(text, nl=False)
        return
    write(output, text)
    say(f"wrote {output}: {len(rows)} trial(s)")


@click.command()
@study_option
@storage_option
@click.option(
    "--param", "given", metavar="NAME=VALUE", multiple=True,
    help="A parameter that the study searches, of its weights or of its tuned settings; repeatable.",
)  # fmt: skip
@click.option("--a", type=float, help="The same as --param a=VALUE: the slope, where the study has one.")
@click.option("--b", type=float, help="The same as --param b=VALUE: the intercept, where the study searches it.")
def enqueue(name: str, storage: str | None, given: tuple[str, ...], a: float | None, b: float | None) -> None:
    """Put a proposal of your own into the queue, before the sampler's. It counts towards the total."""
    from search import operations

    params = _params([*given, *(f"{axis}={value}" for axis, value in (("a", a), ("b", b)) if value is not None)])
    store = _open(name, storage)
    number = operations.propose(store, params)
    if store.follow().paused:
        what_next = f"waits, as the study is paused: bdense-weights resume --study {name}"
    else:
        alive = operations.live_launchers(store)
        what_next = "runs with the next free place" if alive else "runs with the next launch"
    click.echo(f"trial {number} {what_next}")


@click.command(name="set")
@click.argument("assignments", metavar="[KEY=VALUE]...", nargs=-1)
@study_option
@storage_option
def set_keys(assignments: tuple[str, ...], name: str, storage: str | None) -> None:
    """Change a study that exists, also while it runs. Without KEY=VALUE: the keys that may change."""
    from search import operations
    from search.study_file import assignment

    store = _open(name, storage)
    if not assignments:
        print_table(operations.settings_table(store.study))
        return
    changes = operations.edit(store, dict(assignment(text, "set") for text in assignments))
    for key, (old, new) in changes.items():
        if old == new:
            click.echo(f"{key}: {json.dumps(new)} already")
        else:
            click.echo(f"{key}: {json.dumps(old)} -> {json.dumps(new)}, {operations.takes_effect(key)}")


@click.command()
@study_option
@storage_option
def pause(name: str, storage: str | None) -> None:
    """Start no further trial. Running ones go on to their end, and launchers wait."""
    if _pause(_open(name, storage), paused=True):
        say(f"paused: nothing new starts until bdense-weights resume --study {name}")
    else:
        say("it was paused already")


@click.command()
@study_option
@storage_option
def resume(name: str, storage: str | None) -> None:
    """Go on after a pause."""
    if not _pause(_open(name, storage), paused=False):
        say("it was not paused")
    else:
        say("going on; launchers that waited start trials again within seconds")


@click.command()
@study_option
@storage_option
@click.option("--no-wait", is_flag=True, help="Only ask; return at once.")
@click.option(
    "--timeout",
    "timeout_s",
    default=300.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Seconds to wait for the launchers.",
)
def stop(name: str, storage: str | None, no_wait: bool, timeout_s: float) -> None:
    """End all launchers of a study. Running trials keep their state and go back into the queue."""
    from search import operations

    store = _open(name, storage)
    asked = operations.live_launchers(store)
    store.stop()
    if not asked:
        say(f"no trial of study {name} is running; a launcher that waits for work, if there is one, ends too")
        return
    say(f"asked to stop: {', '.join(str(launcher) for launcher in asked)}")
    if no_wait:
        return
    if left := operations.wait_for_end(store, asked, timeout_s):
        raise BDenseError(
            f"still at work after {timeout_s:g} s: {', '.join(str(launcher) for launcher in left)}; "
            f"look again with bdense-weights status --study {name}, or end these processes"
        )
    say(f"{len(asked)} launcher(s) ended; their trials are back in the queue")


@click.command()
@study_option
@storage_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(name: str, storage: str | None, yes: bool) -> None:
    """Delete a study for good: its trials, and the checkpoints of those that did not end."""
    from search.launch import found_studies

    settings = load_settings(storage)
    studies = found_studies(settings)
    store = studies.open(name)
    study, key, num_trials = store.study, store.key, len(store.rows())
    if not (yes or _agreed(f"Delete study {name} with {num_trials} trial(s) and their checkpoints for good?")):
        say("nothing was deleted")
        sys.exit(1)
    store.trials.reap()  # a trial that was lost does not hold the study
    studies.delete(name)
    num_states = _remove_checkpoints(study, key, settings)
    say(f"deleted study {name}: {num_trials} trial(s), {num_states} checkpoint(s)")


COMMANDS = (status, trials, enqueue, set_keys, pause, resume, stop, delete)


def _params(given: list[str]) -> "Params":
    """A proposal's parameters as text, which the study reads.

    Raises:
        BadValue: one has no value, or is given twice.
    """
    params: Params = {}
    for text in given:
        axis, _, value = text.partition("=")
        if axis in params:
            raise BadValue(f"{axis} is given twice, as {params[axis]} and as {value}; give it once")
        if not value:
            raise BadValue(f"--param wants NAME=VALUE, got {text!r}; for example --param a=1.4")
        params[axis] = value
    return params


def _open(name: str, storage: str | None) -> "StudyStore":
    from search.launch import found_studies

    return found_studies(load_settings(storage)).open(name)


def _pause(store: "StudyStore", *, paused: bool) -> bool:
    """Whether it changed anything."""
    if store.follow().paused == paused:
        return False
    store.give_orders(paused=paused)
    return True


def _agreed(question: str) -> bool:
    """The person's answer.

    Raises:
        BadValue: there is nobody to ask.
    """
    if not sys.stdin.isatty():
        raise BadValue("delete asks before it deletes, and here is no terminal to ask on; give --yes")
    return click.confirm(question, err=True)


def _remove_checkpoints(study: "Study", key: str, settings: "Settings") -> int:
    """How many trials had one. Storage that cannot be reached keeps them, and that is said."""
    from search.launch import checkpoints

    kept_at = checkpoints(study, settings)
    if kept_at is None:
        return 0
    try:
        num_states = len(kept_at.trials(key))
    except BDenseError as error:
        say(f"warning: {error}")
        return 0
    kept_at.remove_study(key)
    return num_states
