"""What a tracker is given: runs, one for each trial."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

Param = float | int | str | bool


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """The study whose trials are tracked."""

    name: str
    key: str
    """Unlike the name, no other study has it, in no database at no time."""
    metric: str
    about: Mapping[str, str]
    """What all runs of a launch have in common, such as the version of the code."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trial as it begins."""

    number: int
    name: str
    """STUDY/trial-NUMBER."""
    key: str
    """The name for programs: the same when another launch goes on with the trial, and no other run's."""
    params: Mapping[str, Param]
    tags: Mapping[str, str]


class Tracker(Protocol):
    """A place that keeps runs. It is called from one thread; whatever it raises switches it off."""

    place: str
    """Where people find the runs."""

    def begin(self, run: Run) -> None:
        """A trial begins, or goes on in this launch."""

    def log(self, number: int, images: int, values: Mapping[str, float]) -> None:
        """Finite numbers that a trial has reached when its student had seen so many images."""

    def end(self, number: int, state: str, tags: Mapping[str, str]) -> None:
        """A trial leaves this launch: COMPLETE, PRUNED, FAIL, LOST, or WAITING where it was given back."""

    def close(self) -> None:
        """Nothing more comes; no run is open, unless the tracker was switched off."""
