"""What all commands share: which settings they read, how they print results and write files."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from bdense_core.errors import BDenseError
from search.settings import Settings, mask

INTERRUPTED = 130
"""The exit code after Ctrl-C."""
_WITHOUT_TERMINAL = 160
"""Columns of a table in a file: room for all of it."""
_HIDDEN = "BDENSE_HIDDEN_STORAGE"
"""How `--storage` comes to a process that was started over because of the password in it."""


def _hide_password(_context: click.Context, _option: click.Parameter, storage: str | None) -> str | None:
    """Start over with the URL in the environment: a command line is for all to read, and Ray stores it."""
    if storage is None:
        return os.environ.pop(_HIDDEN, None)  # no child of ours needs it
    if mask(storage) != storage and any(argument.endswith(storage) for argument in sys.orig_argv):
        sys.stdout.flush()
        arguments = [sys.executable, *_without_storage(sys.orig_argv[1:])]
        os.execve(sys.executable, arguments, os.environ | {_HIDDEN: storage})
    return storage


def _without_storage(arguments: Sequence[str]) -> Iterator[str]:
    rest = iter(arguments)
    for argument in rest:
        if argument == "--storage":
            next(rest, None)
        elif not argument.startswith("--storage="):
            yield argument


storage_option = click.option(
    "--storage",
    metavar="URL",
    help="A PostgreSQL; default: OPTUNA_STORAGE, else the embedded server.",
    callback=_hide_password,
)
ray_option = click.option(
    "--ray-address",
    metavar="ADDR",
    help="A Ray cluster (HOST:PORT, or auto) that this machine is a node of; default: RAY_ADDRESS, else a local Ray.",
)
study_option = click.option("--study", "name", metavar="NAME", required=True, help="The study's name.")
device_option = click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:NUMBER.")
threads_option = click.option(
    "--threads",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="CPU threads; more help only on cores that nothing else uses.",
    callback=lambda _context, _option, number: use_threads(number),
    expose_value=False,
)


def use_threads(number: int) -> None:
    """How many threads torch and the linear algebra take; before they are loaded, since they read it once."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, number))


def format_option(*choices: str) -> Callable[[Any], Any]:
    """The option of every command that prints a result; the first choice is the default."""
    return click.option(
        "--format", "form", type=click.Choice(choices), default=choices[0], show_default=True, help="Output."
    )


def load_settings(storage: str | None = None, ray_address: str | None = None) -> Settings:
    """This machine's settings, by option, environment and default."""
    return Settings.load(storage=storage, ray_address=ray_address)


def storage_comment(storage: str | None) -> str:
    """What follows a command that is printed for typing again: where its database comes from, if not from itself."""
    if storage is None or mask(storage) == storage:
        return ""
    return f"  # with OPTUNA_STORAGE set to {mask(storage)}"


def typed_again(storage: str | None) -> str:
    """This very command, for typing it again."""
    program = f"python {sys.argv[0]}" if sys.argv[0].endswith(".py") else Path(sys.argv[0]).name
    arguments = (shlex.quote(mask(argument) if "://" in argument else argument) for argument in sys.argv[1:])
    return " ".join([program, *arguments]) + storage_comment(storage)


def print_values(content: dict[str, Any], form: str) -> None:
    """A result as JSON, or as YAML for people."""
    click.echo(json.dumps(content, indent=2) if form == "json" else yaml_text(content).rstrip())


def print_table(table: Any) -> None:
    """A rich table, as wide as there is room."""
    from rich.console import Console

    Console(width=width()).print(table)


def width() -> int:
    """The terminal's width; a file has room for whole tables."""
    from rich.console import Console

    console = Console()
    return console.width if console.is_terminal else _WITHOUT_TERMINAL


def yaml_text(content: dict[str, Any]) -> str:
    """YAML in the order of the content."""
    import yaml

    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
    return text


def write(path: Path, text: str) -> None:
    """A text file, whole or not at all.

    Raises:
        BDenseError: it cannot be written.
    """
    from bdense_core.files import write_text_atomically

    check_folder(path)
    try:
        write_text_atomically(path, text)
    except OSError as error:
        raise BDenseError(f"cannot write {path}: {error.strerror or error}") from error


def check_folder(path: Path) -> None:
    """Whether the folder that a file is to be written to is there.

    Raises:
        BDenseError: it is not.
    """
    if not path.parent.is_dir():
        raise BDenseError(f"cannot write {path}: there is no folder {path.parent}; make it, or choose another")
