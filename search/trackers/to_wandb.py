"""Runs for Weights & Biases: offline, in a folder, unless WANDB_MODE says otherwise."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdense_core.errors import BadValue
from search.trackers.runs import Run, Tracked

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

import wandb

_FINISH_S = 20.0
"""How long the end of a run waits for its upload; what is left stays in its folder, for `wandb sync`."""


class WandB:
    """One run for each trial, several at a time. Nothing is collected but what is logged."""

    def __init__(self, study: Tracked, folder: Path) -> None:
        self._study = study
        self._project = os.environ.get("WANDB_PROJECT") or "bdense"
        self._is_online = os.environ.get("WANDB_MODE", "offline") in ("online", "run", "shared")
        place = os.environ.get("WANDB_DIR") or str(folder)
        self.place = f"project {self._project}" if self._is_online else f"offline runs in {place}, for `wandb sync`"
        self._runs: dict[int, Any] = {}
        _set_up(None if os.environ.get("WANDB_MODE") else "offline", place)
        if self._is_online and not wandb.login(prompt=False, verify=False):
            raise BadValue("WANDB_MODE is online, and nobody has logged in; run `wandb login`, or leave WANDB_MODE out")

    def begin(self, run: Run) -> None:
        self._runs[run.number] = begun = wandb.init(
            project=self._project,
            group=self._study.name,
            name=run.name,
            id=run.key,
            job_type=run.tags["role"],
            config={**run.params, **run.tags},
            resume="allow" if self._is_online else None,  # offline, `wandb sync` joins runs of one id
            reinit="create_new",
        )
        begun.define_metric("kimg")
        begun.define_metric("*", step_metric="kimg")

    def log(self, number: int, images: int, values: Mapping[str, float]) -> None:
        self._runs[number].log({"kimg": images / 1000, **values})

    def end(self, number: int, state: str, tags: Mapping[str, str]) -> None:
        run = self._runs.pop(number)
        run.summary.update(dict(tags))
        run.finish(exit_code=int(state == "FAIL"))

    def close(self) -> None:
        wandb.teardown()


def _set_up(mode: str | None, place: str) -> None:
    """Start W&B's own process, silent and blind: it would send the command line, the host, git's remote and more."""
    settings = wandb.Settings(
        root_dir=place,
        silent=True,
        console="off",
        finish_timeout=_FINISH_S,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        label_disable=True,
        save_code=False,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
        **({"mode": mode} if mode else {}),
    )
    hooks = sys.exit, sys.excepthook
    try:
        wandb.setup(settings)
    finally:
        sys.exit, sys.excepthook = hooks  # it takes both, and would print tracebacks among JSON lines
