"""A report in files: `index.html`, which needs nothing else, and `report.md` with PNG files in `figures`."""

import base64
import re
import secrets
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from bdense_core.errors import BadValue, BDenseError
from search import plots
from search.page import compared, further, published, searched
from search.page.evidence import Evidence
from search.page.parts import Picture, Section
from search.version import code_version

PAGE, TEXT, FIGURES = "index.html", "report.md", "figures"

_SECTIONS: tuple[Callable[[Evidence], Section], ...] = (
    compared.judgement,
    searched.settings,
    searched.weights,
    searched.valley,
    further.tuned,
    further.metrics,
    searched.training,
    searched.noise,
    searched.luck,
    searched.foresight,
    compared.confirmation,
    compared.transfer,
    compared.samples,
    searched.learned,
    published.section,
    searched.warnings,
)
_CODE = re.compile(r"`([^`]+)`")
_MARKDOWN = re.compile(r"([\\*_\[\]>|#~`])")


def write_report(evidence: Evidence, output: Path) -> None:
    """Write the report into a folder of its own, whole or not at all. An earlier report there is replaced.

    Raises:
        BadValue: `output` is a file, or a folder that holds other things.
        BDenseError: it cannot be written.
    """
    check_output(output)
    sections = [make(evidence) for make in _SECTIONS]
    temporary = output.absolute().parent / f".{output.absolute().name}.{secrets.token_hex(6)}.tmp"
    try:
        (temporary / FIGURES).mkdir(parents=True)
        _write_images(sections, temporary / FIGURES)
        (temporary / PAGE).write_text(html(evidence, sections), encoding="utf-8")
        (temporary / TEXT).write_text(markdown(evidence, sections), encoding="utf-8")
        _put_in_place(temporary, output.absolute())
    except OSError as error:
        raise BDenseError(f"cannot write the report to {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(output: Path) -> None:
    """Whether a report may be written there.

    Raises:
        BadValue: it is a file, holds something else, or lies in no folder.
    """
    if output.exists() and not output.is_dir():
        raise BadValue(f"--output {output} is a file; name a folder, which may not exist yet")
    if output.is_dir() and (others := sorted({path.name for path in output.iterdir()} - {PAGE, TEXT, FIGURES})):
        raise BadValue(f"--output {output} holds other things, such as {others[0]}; name a new folder")
    if not output.absolute().parent.is_dir():
        raise BadValue(f"--output {output}: there is no folder {output.parent}; make it, or choose another")


def _put_in_place(made: Path, output: Path) -> None:
    """Where there is an earlier report, it is moved aside first: a folder cannot replace another in one step."""
    aside = made.with_suffix(".old")
    is_there = output.exists()
    if is_there:
        output.rename(aside)
    try:
        made.rename(output)
    except OSError:
        if is_there:
            aside.rename(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _write_images(sections: list[Section], folder: Path) -> None:
    for section in sections:
        for picture in section.pictures:
            (folder / f"{picture.name}.png").write_bytes(plots.png(picture.size, picture.draw))
        for strip in section.strips:
            (folder / f"{strip.name}.png").write_bytes(base64.b64decode(strip.content))


# -- the two forms


def html(evidence: Evidence, sections: list[Section]) -> str:
    """One page; text of the study is escaped, and the page may load or run nothing."""
    environment = _environment(autoescape=True)
    environment.filters |= {"prose": _prose, "svg": _svg}
    return environment.get_template("page.html.j2").render(_context(evidence, sections))


def markdown(evidence: Evidence, sections: list[Section]) -> str:
    """The same for reading as text, with the figures in files."""
    environment = _environment(finalize=_plain)
    environment.filters |= {"block": _block}
    return environment.get_template("report.md.j2").render(_context(evidence, sections))


def _environment(*, autoescape: bool = False, finalize: Callable[[object], object] | None = None) -> Environment:
    return Environment(
        loader=PackageLoader("search.page"), autoescape=autoescape, finalize=finalize, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


def _context(evidence: Evidence, sections: list[Section]) -> dict[str, object]:
    return {
        "name": evidence.name,
        "description": evidence.study.spec.description,
        "metric": evidence.study.metric,
        "sections": sections,
        "figures": FIGURES,
        "now": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "version": code_version(),
    }


def _prose(text: str) -> Markup:
    """Escaped text whose backticks stand for code."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))


def _svg(picture: Picture) -> Markup:
    """A figure as an element of the page; matplotlib has escaped its text."""
    element = plots.svg(picture.name, picture.size, picture.draw)
    head, _, body = element.partition(">")
    kept = re.sub(r' (width|height)="[^"]*"', "", head)
    return Markup(f'{kept} role="img" aria-label="{escape(picture.alt)}">{body}')


def _plain(value: object) -> object:
    """Text with nothing in it that Markdown or HTML would take for markup, but code in backticks."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    parts = re.split(r"(`[^`]+`)", " ".join(value.split()))
    return "".join(part.replace("|", "\\|") if _CODE.fullmatch(part) else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def _block(text: str) -> Markup:
    """Text as a block of code, which Markdown knows by its indentation."""
    return Markup("\n".join("    " + line for line in text.splitlines()))
