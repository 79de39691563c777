"""What a report is made of: sections with sentences, tables, figures and strips of images. No markup here.

Sentences may hold `code` in backticks. All text is escaped where it is rendered.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from search.plots import Draw
from search.statistics import Interval

NOTHING = "Nothing has run to its end yet: `bdense-weights launch --study {name}` runs the study."
"""What to say where there is no trial to show."""
OF_BAND = (
    "The band lies around the best control: two standard deviations of a difference of two weightings on the same "
    "training seeds to either side, pooled over the controls; at the end with what the evaluation seed does to each. "
    "What is within cannot be told from that control by these runs."
)
"""What the noise band in a picture says."""
_NUMBER = re.compile(r"[-+]?\d[\de.+-]*( \(.*\))?")
"""A number, perhaps with its interval or its origin in brackets."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text in cells; an empty cell is one that was not measured."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    caption: str = ""
    marked: int | None = None
    """The row to be seen first."""

    @property
    def is_numeric(self) -> tuple[bool, ...]:
        """Of each column, whether its cells are numbers."""
        columns = [[cell for cell in column if cell] for column in zip(*self.rows, strict=True)]
        return tuple(bool(cells) and all(_NUMBER.fullmatch(cell) for cell in cells) for cells in columns)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure that is drawn as SVG or PNG. `size` in inches; `alt` says what it shows to those who do not see it."""

    name: str
    alt: str
    size: tuple[float, float]
    draw: Draw


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Images of one student above its teacher's, as a PNG in base64."""

    name: str
    label: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the report.

    Attributes:
        key: its name in links and files.
        lead: the one sentence that counts, where there is one.
        text: sentences on what one sees and how far to trust it.
        missing: what would fill it, where there are no data.
        details: long text behind a fold.
    """

    key: str
    title: str
    lead: str = ""
    text: tuple[str, ...] = ()
    missing: str = ""
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    strips: tuple[Strip, ...] = ()
    details: str = ""


def filled(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], caption: str) -> Table:
    """A table without the columns that have nothing in them."""
    kept = [index for index in range(len(header)) if any(row[index] for row in rows)]
    return Table(
        header=tuple(header[index] for index in kept), caption=caption,
        rows=[tuple(row[index] for index in kept) for row in rows],
    )  # fmt: skip


# -- numbers as text


def number(value: float | None) -> str:
    """Four digits; nothing for what is not known."""
    return "" if value is None or not math.isfinite(value) else f"{value:.4g}"


def small(value: float | None) -> str:
    """Two digits, for spreads."""
    return "" if value is None or not math.isfinite(value) else f"{value:.2g}"


def mean_of(interval: Interval) -> str:
    """A mean with its interval, or alone where one value gives none."""
    if interval.count == 0:
        return ""
    if interval.count == 1:
        return f"{interval.mean:.4g} (1 seed)"
    return f"{interval.mean:.4g} ({interval.low:.4g} to {interval.high:.4g})"


def gain_of(interval: Interval | None) -> str:
    """A difference with its interval, signs shown."""
    if interval is None or interval.count == 0:
        return ""
    if interval.count == 1:
        return f"{interval.mean:+.2g} (1 seed)"
    return f"{interval.mean:+.2g} ({interval.low:+.2g} to {interval.high:+.2g})"


def shares_of(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.3f}" for share in shares)


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def counted(count: int, noun: str) -> str:
    """`1 trial`, `3 trials`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
