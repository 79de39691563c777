"""What a method's loss terms and settings are called in tables and pictures."""

from collections.abc import Mapping, Sequence
from typing import Any


def term_labels(terms: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """What terms are, in a word, and what each is called: "branch" and 1, 2, ... for branch.1, branch.2, ...

    Terms without such a word in common are called by their names.
    """
    kinds = {term.rpartition(".")[0] for term in terms}
    kind = kinds.pop() if len(kinds) == 1 else ""
    return (kind, tuple(term.rpartition(".")[2] for term in terms)) if kind else ("term", tuple(terms))


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings in a cell: `lr=0.0003 student_channels=32`."""
    return " ".join(f"{name}={value_text(value)}" for name, value in settings.items())


def value_text(value: object) -> str:
    """A setting's value: four digits of a number that is no whole one."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
