"""The command that writes a study's report."""

from pathlib import Path

import click

from search.console import load_settings, storage_option, study_option
from search.logs import say


@click.command()
@study_option
@storage_option
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="A folder for it; an earlier report is replaced."
)
def report(name: str, storage: str | None, output: Path) -> None:
    """Write a report of a study: a page for the browser that needs nothing else, and the same as Markdown."""
    from search.launch import found_studies
    from search.page.evidence import gather
    from search.page.writing import PAGE, TEXT, check_output, write_report

    check_output(output)
    write_report(gather(found_studies(load_settings(storage)), name), output)
    say(f"wrote {output / PAGE} and {output / TEXT}")


COMMANDS = (report,)
