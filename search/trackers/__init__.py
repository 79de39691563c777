"""Trackers of experiments, told what the counters are told. Off unless asked for; workers know nothing of them.

What they are given, and where it lies: docs/operations.md.
"""

import contextlib
import importlib.util
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bdense_core.errors import BadValue, BDenseError
from search import ray_environment
from search.errors import TrackerError
from search.logs import gather, say
from search.version import code_version

if TYPE_CHECKING:
    from search.settings import Settings
    from search.storage import StudyStore
    from search.trackers.feed import Feed
    from search.trackers.runs import Tracked, Tracker

__all__ = ["NAMES", "check", "finish", "opened"]

NAMES = ("tensorboard", "mlflow", "wandb")
"""Each is also the name of its package, and of our extra that installs it."""
_FLUSH_S = 30.0
"""How long the end of a launch waits for what is still to be sent."""


def check(names: Sequence[str]) -> None:
    """Whether these trackers are installed.

    Raises:
        BadValue: one is not; the message says how to get it.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a bare folder of that name, as W&B makes them, is no package
            raise BadValue(f"--tracker {name}: {name} is not installed; run: pip install 'bdense-search[{name}]'")


@contextlib.contextmanager
def opened(names: Sequence[str], store: "StudyStore", settings: "Settings") -> Iterator[list["Feed"]]:
    """What listens for these trackers, while the block runs. At its end they get a while for what is left.

    Raises:
        BDenseError: one of them cannot begin.
    """
    feeds: list[Feed] = []
    try:
        for name in dict.fromkeys(names):
            feeds.append(_feed(name, store, settings))
        yield feeds
    finally:
        finish(feeds)


def finish(feeds: Sequence["Feed"], *, within_s: float = _FLUSH_S) -> None:
    """Nothing more comes; wait for what is still to be sent."""
    deadline = time.monotonic() + within_s
    for feed in feeds:
        feed.finish()
    for feed in feeds:
        feed.wait(deadline)


def _feed(name: str, store: "StudyStore", settings: "Settings") -> "Feed":
    from search.trackers.feed import Feed, one_line
    from search.trackers.runs import Tracked

    about = {
        "study": store.name,
        "code_version": code_version(),
        "spec_sha256": store.provenance()["spec_sha256"] or "",
    }
    study = Tracked(name=store.name, key=store.key, metric=store.study.metric, about=about)
    settings.create(settings.trackers)
    folder = settings.create(settings.trackers / name)
    try:
        with ray_environment.without_password():  # W&B has a process of its own
            tracker = _begun(name, study, folder)
    except BDenseError:
        raise
    except Exception as error:
        raise TrackerError(f"--tracker {name} cannot begin: {one_line(error)}") from error
    gather()
    say(f"tracker {name}: {tracker.place}")
    return Feed(name, tracker, study)


def _begun(name: str, study: "Tracked", folder: Path) -> "Tracker":
    if name == "tensorboard":
        from search.trackers.to_tensorboard import TensorBoard

        return TensorBoard(folder / study.key)
    if name == "mlflow":
        from search.trackers.to_mlflow import MLflow

        return MLflow(study, folder)
    from search.trackers.to_wandb import WandB

    return WandB(study, folder)
