"""The command line: what concerns studies, and how every command ends. No heavy import before a command runs."""

import json
import logging
import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from bdense_core.errors import BadValue, BDenseError
from search import compare_cli, export_cli, logs, model_cli, operations_cli, report_cli, run_cli
from search.compare_cli import tracker_option
from search.console import (
    INTERRUPTED,
    check_folder,
    format_option,
    load_settings,
    print_table,
    print_values,
    ray_option,
    storage_comment,
    storage_option,
    study_option,
    typed_again,
    width,
)
from search.logs import say
from search.settings import Settings, mask

if TYPE_CHECKING:
    from search.records import Row
    from search.spec import Study
    from search.storage import Studies, StudyStore

_WIDE = 138
"""Columns that a table of trials needs to show everything."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bdense-search", prog_name="bdense-weights")
def commands() -> None:
    """Search, watch and export the branch weights of diffusion distillation."""


@commands.command()
@click.argument("file", metavar="[STUDY.yaml]", required=False, type=click.Path(path_type=Path))
@click.option("--study", "name", metavar="NAME", help="The study's name; default: the file's.")
@storage_option
@ray_option
@click.option("--trials", type=click.IntRange(min=0), help="The study's total of searched trials.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of the file; repeatable.")
@click.option("--dry-run", is_flag=True, help="Print the resolved study and the work it means; touch nothing.")
@click.option(
    "--calibrate", is_flag=True, help="With --dry-run: measure this device first, and keep the figure for later plans."
)
@click.option(
    "--price", type=click.FloatRange(min=0), help="With --dry-run: of an hour of one GPU, or of one core without GPUs."
)
@click.option("--no-dashboard", is_flag=True, help="Do not start optuna-dashboard.")
@click.option(
    "--dashboard-port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any free port."
)
@click.option(
    "--log-format",
    default="text",
    show_default=True,
    type=click.Choice(logs.FORMATS),
    help="What goes to standard error: lines for people, or one JSON object a line.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    help="Serve Prometheus metrics on 127.0.0.1; 0: any free port.  [default: none are served]",
)
@tracker_option
@format_option("table", "json")
def launch(
    file: Path | None,
    name: str | None,
    storage: str | None,
    ray_address: str | None,
    trials: int | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    calibrate: bool,
    price: float | None,
    no_dashboard: bool,
    dashboard_port: int,
    log_format: str,
    metrics_port: int | None,
    tracked_by: tuple[str, ...],
    form: str,
) -> None:
    """Create or resume a study and run it. Without a file: the stored study of that name, else the quickstart."""
    logs.configure(log_format)
    _check_dry_run_options(dry_run, calibrate, price)
    from search import launch as launching
    from search import quality
    from search.study_file import assignment, load_study, studies_folder

    if trials is not None:
        overrides = (*overrides, f"budget.trials={trials}")
    settings = load_settings(storage, ray_address)
    stored = launching.stored_study(name, settings) if name and not file and not dry_run else None
    said = None
    if stored is not None:  # a name alone means the study of that name, whatever file it came from
        said = dict(assignment(override, "--set") for override in overrides)
        study = stored.edited(said)
    else:
        study = load_study(
            file or studies_folder() / "digits.yaml",
            name=name,
            overrides=overrides,
            models=settings.models,
            tolerate_missing=dry_run,
        )
    if name and not file and dry_run:
        say(f"note: a plan asks no database; without a file it is that of digits.yaml, under the name {name!r}")
    elif name and not file and stored is None:
        say(f"note: there is no study {name!r} yet; it begins as the quickstart does, from digits.yaml")
    for note in quality.notes(study):
        say(f"note: {note}")
    if dry_run:
        _dry_run(study, settings, form, calibrate=calibrate, price=price)
        return
    logs.configure(log_format, study=study.name)
    outcome = launching.launch(
        study,
        settings,
        with_dashboard=not no_dashboard,
        dashboard_port=dashboard_port,
        metrics_port=metrics_port,
        tracked_by=tracked_by,
        said=said,
    )
    if outcome.interrupted:
        again = typed_again(storage)
        say(f"interrupted; {outcome.given_back} running trial(s) went back into the queue. Resume with: {again}")
        sys.exit(INTERRUPTED)
    _print_study(outcome.store, settings, form)
    say("")
    if storage is None:
        say("look again: bdense-weights dashboard")
    if study.spec.comparison is None:
        say(f"on fresh seeds:          {_next_command('confirm', study.name, storage)}")
        say(f"export the best weights: {_next_command('export', study.name, storage)}")


@commands.command(name="list")
@storage_option
@format_option("table", "json")
def list_studies(storage: str | None, form: str) -> None:
    """List the studies of a database."""
    from dataclasses import asdict

    from search import report
    from search.errors import StudyNotFound, StudyUnreadable

    studies, summaries = _studies(storage), []
    for study in studies.ours():
        try:
            summaries.append(studies.open(study).summary())
        except (StudyNotFound, StudyUnreadable) as error:  # deleted just now, or made by another version
            say(f"note: {study} is left out: {error}")
    if form == "json":
        click.echo(json.dumps([asdict(summary) for summary in summaries], indent=2))
    else:
        print_table(report.study_table(summaries))


@commands.command()
@study_option
@storage_option
@format_option("table", "json")
@click.option("--plot", metavar="FILE.png", type=click.Path(path_type=Path, dir_okay=False), help="Draw into a file.")
def show(name: str, storage: str | None, form: str, plot: Path | None) -> None:
    """Show a study: its trials, its controls, its noise, its weight curve."""
    settings = load_settings(storage)
    store = _studies(storage).open(name)
    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise BadValue(f"--plot writes PNG files, got {plot}; name it {plot.with_suffix('.png')}")
        check_folder(plot)
        from search.figures import save_png

        try:
            save_png(store, plot)
        except OSError as error:
            raise BDenseError(f"cannot write {plot}: {error.strerror or error}") from error
        say(f"wrote {plot}")
    _print_study(store, settings, form, full=True)


@commands.command()
@storage_option
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any free port.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
def dashboard(storage: str | None, port: int, host: str) -> None:
    """Serve optuna-dashboard until Ctrl-C. It has no login, so it listens on loopback unless told otherwise."""
    from search import dashboard as serving
    from search.launch import found_storage_url

    url = found_storage_url(load_settings(storage))
    _studies(storage).database.close()
    if host not in ("127.0.0.1", "localhost", "::1"):
        say(f"warning: everybody who can reach {host}:{port} can see and delete the studies; there is no login")
    serving.serve(url, host, port, say=lambda address: say(f"dashboard: {address} (Ctrl-C ends it)"))


@commands.command()
@storage_option
@format_option("table", "json")
def doctor(storage: str | None, form: str) -> None:
    """Check this machine: database, Ray, GPUs, files, versions. Exit code 1 if something is wrong."""
    from search.doctor import examine

    findings = examine(load_settings(storage))
    if form == "json":
        click.echo(json.dumps(findings, indent=2))
    else:
        for key, value in findings.items():
            click.echo(f"{key}: {json.dumps(value) if isinstance(value, dict | list) else value}")
    if findings["problems"]:
        sys.exit(1)


@commands.command()
@click.argument("action", type=click.Choice(["status", "start", "stop", "url", "bin"]), default="status")
def server(action: str) -> None:
    """The embedded PostgreSQL. Whoever needs it starts it; it runs on until it is stopped.

    \b
    status  is it running, and where
    start   start it, and make it if there is none
    stop    end it; its data stay
    url     its address for pg_dump, pg_restore and psql; it is started where needed
    bin     the folder with these programs
    """
    from search import server as embedded

    home = load_settings(None).home
    if action == "start":
        embedded.ensure_running(home)
        say("running")
    elif action == "stop":
        say("stopped" if embedded.stop(home) else "it was not running")
    elif action == "url":
        click.echo(embedded.address(home))
    elif action == "bin":
        click.echo(embedded.programs())
    else:
        state = embedded.status(home)
        click.echo(f"running: {state.running}\ndata: {state.data_folder}\nlog: {state.log_path}")


for _module in (compare_cli, export_cli, report_cli, operations_cli, model_cli, run_cli):
    for _command in _module.COMMANDS:
        commands.add_command(_command)


def main(
    arguments: list[str] | None = None, *, command: click.Command = commands, prog_name: str = "bdense-weights"
) -> NoReturn:
    """Run a command and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    logs.configure()
    try:
        command.main(arguments, prog_name=prog_name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BDenseError as error:
        say(f"error: {error}", level=logging.ERROR)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        say("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if _is_database_error(error):
            say(
                "error: the database went away; finished trials are kept. Run the same command again once it is back",
                level=logging.ERROR,
            )
            sys.exit(1)
        raise
    sys.exit(0)


def _is_database_error(error: Exception) -> bool:
    """Whether it began in the database. Ray Tune hands on only the text of what its callbacks raised."""
    if "sqlalchemy.exc" not in sys.modules:
        return False
    from sqlalchemy.exc import SQLAlchemyError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, SQLAlchemyError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None or "sqlalchemy.exc." in str(error)


def _studies(storage: str | None) -> "Studies":
    from search.launch import found_studies

    return found_studies(load_settings(storage))


def _check_dry_run_options(dry_run: bool, calibrate: bool, price: float | None) -> None:
    if not dry_run and (calibrate or price is not None):
        raise click.UsageError(f"{'--calibrate' if calibrate else '--price'} is about a plan; add --dry-run")
    if price is not None and not math.isfinite(price):
        raise click.BadParameter(f"{price} is no price of an hour", param_hint="'--price'")


def _dry_run(study: "Study", settings: Settings, form: str, *, calibrate: bool, price: float | None) -> None:
    if calibrate:
        from search.calibration import calibrate as measure

        measure(study, settings)
    from search.plan import plan

    found = plan(study, settings, price=price)
    missing = found["missing"] if form == "json" else found.pop("missing")
    print_values({"study": study.to_dict(), "plan": found}, form)
    if form != "json":
        click.echo("missing: " + ("nothing" if not missing else ""))
        for line in missing:
            click.echo(f"  - {line}")


def _print_study(store: "StudyStore", settings: Settings, form: str, *, full: bool = False) -> None:
    from search import preview, report

    rows = store.rows()
    found = preview.preview(store.study, rows, settings)
    if form == "json":
        click.echo(json.dumps(report.show_object(store, rows) | {"preview": found}, indent=2))
        return
    _print_tables(store, rows, full=full)
    if found is not None:
        click.echo(preview.line(found))


def _print_tables(store: "StudyStore", rows: "list[Row]", *, full: bool) -> None:
    from search import comparison, noise, report

    if store.study.spec.comparison is not None:
        found = comparison.compare(store.study, rows)
        print_table(comparison.table(found))
        if (figures := comparison.further_table(found)) is not None:
            print_table(figures)
        click.echo(found.verdict)
        return
    top = None if full else 5
    print_table(report.trial_table(store, rows, top=top, wide=width() >= _WIDE))
    if (figures := report.metrics_table(store.study, rows, top=top)) is not None:
        print_table(figures)
    print_table(report.spread_table(store.study, rows))
    click.echo(noise.verdict(store.study, rows))
    for note in report.notes(store, rows):
        click.echo(f"note: {note}")
    if full and (best := noise.ranked(rows, searched_only=True)):
        print_table(report.curve_table(store.study, best[0]))
        print_table(report.rung_table(store.study, rows))


def _next_command(name: str, study: str, storage: str | None) -> str:
    """As this user can type it; `storage` is the option that was given."""
    program = "bdense-weights"
    if shutil.which(program) is None:
        program = shlex.quote(str(Path(sys.executable).parent / program))
    command = f"{program} {name} --study {shlex.quote(study)}"
    if storage is not None and mask(storage) == storage:
        command += f" --storage {shlex.quote(storage)}"
    return command + storage_comment(storage)


if __name__ == "__main__":
    main()
