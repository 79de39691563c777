"""Both commands: arguments, output and exit codes. No logic, and no heavy import before a command runs."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from bdense_core.errors import BadValue, BDenseError

if TYPE_CHECKING:
    from collections.abc import Callable

    from search.settings import Settings
    from search.storage import StudyStore

_INTERRUPTED = 130
_WIDE = 138
"""Columns that a table of trials needs to show everything."""

storage_option = click.option(
    "--storage", metavar="URL", help="A PostgreSQL; default: OPTUNA_STORAGE, else the embedded server."
)
study_option = click.option("--study", "name", metavar="NAME", required=True, help="The study's name.")


def format_option(*choices: str) -> "Callable[[Any], Any]":
    return click.option(
        "--format", "form", type=click.Choice(choices), default=choices[0], show_default=True, help="Output."
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bdense-search", prog_name="bdense-weights")
def commands() -> None:
    """Search, watch and export the branch weights of diffusion distillation."""


@commands.command()
@click.argument("file", metavar="[STUDY.yaml]", required=False, type=click.Path(path_type=Path))
@click.option("--study", "name", metavar="NAME", help="The study's name; default: the file's.")
@storage_option
@click.option("--ray-address", metavar="ADDR", help="Join a Ray cluster (HOST:PORT) instead of starting a local Ray.")
@click.option("--trials", type=click.IntRange(min=0), help="The study's total of searched trials.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of the file; repeatable.")
@click.option("--dry-run", is_flag=True, help="Print the resolved study and the work it means; touch nothing.")
@click.option("--no-dashboard", is_flag=True, help="Do not start optuna-dashboard.")
@click.option(
    "--dashboard-port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any free port."
)
@format_option("table", "json")
def launch(
    file: Path | None,
    name: str | None,
    storage: str | None,
    ray_address: str | None,
    trials: int | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    no_dashboard: bool,
    dashboard_port: int,
    form: str,
) -> None:
    """Create or resume a study and run it. Without a file: the quickstart on the digits."""
    _hide_password(storage)
    from search import launch as launching
    from search.study_file import load_study, studies_folder

    if trials is not None:
        overrides = (*overrides, f"budget.trials={trials}")
    settings = _settings(storage, ray_address)
    study = load_study(
        file or studies_folder() / "digits.yaml",
        name=name,
        overrides=overrides,
        models=settings.models,
        tolerate_missing=dry_run,
    )
    if dry_run:
        from search.plan import plan

        _print_plan(study.to_dict(), plan(study, settings), form)
        return
    outcome = launching.launch(study, settings, with_dashboard=not no_dashboard, dashboard_port=dashboard_port)
    if outcome.interrupted:
        again = " ".join([_program(), *(_shown(argument) for argument in sys.argv[1:])])
        _say(f"interrupted; {outcome.given_back} running trial(s) went back into the queue. Resume with: {again}")
        sys.exit(_INTERRUPTED)
    _print_study(outcome.store, form)
    _say("")
    if storage is None:
        _say("look again: bdense-weights dashboard")
    _say(f"export the best weights: {launching.export_command(study.name, storage)}")


@commands.command()
@study_option
@storage_option
@click.option("--top", default=3, show_default=True, type=click.IntRange(min=1), help="Candidates in the file.")
@format_option("json", "yaml")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="A file; default: standard output.")
def export(name: str, storage: str | None, top: int, form: str, output: Path | None) -> None:
    """Print the best weights of a study, with all that is needed to use and to trust them."""
    from search.export import export_object

    content = export_object(_open(name, storage), top=top)
    text = _yaml(content) if form == "yaml" else json.dumps(content, indent=2) + "\n"
    if output is None:
        click.echo(text, nl=False)
        return
    _write(output, text)
    _say(f"wrote {output}")


@commands.command(name="list")
@storage_option
@format_option("table", "json")
def list_studies(storage: str | None, form: str) -> None:
    """List the studies of a database."""
    from dataclasses import asdict

    from search import report

    database = _database(storage)
    summaries = [store.summary() for store in database.ours()]
    if form == "json":
        click.echo(json.dumps([asdict(summary) for summary in summaries], indent=2))
    else:
        _print(report.study_table(summaries))


@commands.command()
@study_option
@storage_option
@format_option("table", "json")
@click.option("--plot", metavar="FILE.png", type=click.Path(path_type=Path, dir_okay=False), help="Draw into a file.")
def show(name: str, storage: str | None, form: str, plot: Path | None) -> None:
    """Show a study: its trials, its controls, its noise, its weight curve."""
    store = _open(name, storage)
    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise BadValue(f"--plot writes PNG files, got {plot}; name it {plot.with_suffix('.png')}")
        _check_folder(plot)
        from search.figures import save_png

        try:
            save_png(store, plot)
        except OSError as error:
            raise BDenseError(f"cannot write {plot}: {error.strerror or error}") from error
        _say(f"wrote {plot}")
    _print_study(store, form, full=True)


@commands.command()
@storage_option
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any free port.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
def dashboard(storage: str | None, port: int, host: str) -> None:
    """Serve optuna-dashboard until Ctrl-C. It has no login, so it listens on loopback unless told otherwise."""
    from search import dashboard as serving
    from search.launch import found_storage_url

    url = found_storage_url(_settings(storage))
    _database(storage).close()
    if host not in ("127.0.0.1", "localhost", "::1"):
        _say(f"warning: everybody who can reach {host}:{port} can see and delete the studies; there is no login")
    serving.serve(url, host, port, say=lambda address: _say(f"dashboard: {address} (Ctrl-C ends it)"))


@commands.command()
@storage_option
@format_option("table", "json")
def doctor(storage: str | None, form: str) -> None:
    """Check this machine: database, Ray, GPUs, files, versions. Exit code 1 if something is wrong."""
    from search.doctor import examine

    findings = examine(_settings(storage))
    if form == "json":
        click.echo(json.dumps(findings, indent=2))
    else:
        for key, value in findings.items():
            click.echo(f"{key}: {json.dumps(value) if isinstance(value, dict | list) else value}")
    if findings["problems"]:
        sys.exit(1)


@commands.command()
@click.argument("action", type=click.Choice(["status", "stop"]), default="status")
def server(action: str) -> None:
    """The embedded PostgreSQL: is it running, or stop it. A launch starts it."""
    from search import server as embedded

    settings = _settings(None)
    if action == "stop":
        _say("stopped" if embedded.stop(settings.home) else "it was not running")
        return
    state = embedded.status(settings.home)
    click.echo(f"running: {state.running}\ndata: {state.data_folder}\nlog: {state.log_path}")


def main(
    arguments: list[str] | None = None, *, command: click.Command = commands, prog_name: str = "bdense-weights"
) -> NoReturn:
    """Run a command and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        command.main(arguments, prog_name=prog_name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BDenseError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted")
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if _is_database_error(error):
            _say("error: the database went away; finished trials are kept. Run the same command again once it is back")
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


def _settings(storage: str | None, ray_address: str | None = None) -> "Settings":
    from search.settings import Settings

    return Settings.load(storage=storage, ray_address=ray_address)


def _database(storage: str | None) -> Any:
    from search.launch import found_storage_url
    from search.storage import Database

    return Database(found_storage_url(_settings(storage)))


def _open(name: str, storage: str | None) -> "StudyStore":
    store: StudyStore = _database(storage).open(name)
    return store


def _print_study(store: "StudyStore", form: str, *, full: bool = False) -> None:
    from search import report

    rows = store.rows()
    if form == "json":
        click.echo(json.dumps(report.show_object(store, rows), indent=2))
        return
    _print(report.trial_table(store, rows, top=None if full else 5, wide=_width() >= _WIDE))
    _print(report.spread_table(rows))
    click.echo(report.verdict(rows))
    if full and (best := report.ranked(rows, searched_only=True)):
        _print(report.curve_table(best[0]))


def _print_plan(resolved: dict[str, Any], plan: dict[str, Any], form: str) -> None:
    if form == "json":
        click.echo(json.dumps({"study": resolved, "plan": plan}, indent=2))
        return
    click.echo(_yaml({"study": resolved, "plan": plan}), nl=False)


def _print(table: Any) -> None:
    from rich.console import Console

    Console(width=_width()).print(table)


def _width() -> int:
    """The terminal's width; a file has room for whole tables."""
    from rich.console import Console

    console = Console()
    return console.width if console.is_terminal else 160


def _yaml(content: dict[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text


def _write(path: Path, text: str) -> None:
    from bdense_core.files import write_text_atomically

    _check_folder(path)
    try:
        write_text_atomically(path, text)
    except OSError as error:
        raise BDenseError(f"cannot write {path}: {error.strerror or error}") from error


def _hide_password(storage: str | None) -> None:
    """Start over with the URL in the environment: a command line is for all to read, and Ray stores it."""
    from search.settings import mask

    if storage is None or mask(storage) == storage:
        return
    arguments = [argument for argument in sys.orig_argv if argument not in (storage, "--storage")]
    arguments = [argument for argument in arguments if argument != f"--storage={storage}"]
    sys.stdout.flush()
    os.execve(sys.executable, arguments, os.environ | {"OPTUNA_STORAGE": storage})


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise BDenseError(f"cannot write {path}: there is no folder {path.parent}; make it, or choose another")


def _program() -> str:
    return f"python {sys.argv[0]}" if sys.argv[0].endswith(".py") else Path(sys.argv[0]).name


def _shown(argument: str) -> str:
    import shlex

    from search.settings import mask

    return shlex.quote(mask(argument) if "://" in argument else argument)


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
