"""Runs for MLflow: an experiment for each study, in an SQLite file or wherever MLFLOW_TRACKING_URI says."""

import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from search.settings import mask
from search.trackers.runs import Run, Tracked

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is loaded

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

_STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED", "LOST": "KILLED", "WAITING": "SCHEDULED"}
_KEY = "bdense_key"
_REFUSED = re.compile(r"[^/\w.\- ]")
"""What the names of MLflow's metrics must not have, such as the @ of `fd@8`."""


class MLflow:
    """Uses MLflow's client alone, which adds nothing of its own to a run: no command line, no user."""

    def __init__(self, study: Tracked, folder: Path) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells how it makes its tables
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self.place = mask(uri)
        self._client = MlflowClient(tracking_uri=uri)
        self._name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or study.name
        self._artifacts = None if os.environ.get("MLFLOW_TRACKING_URI") else (folder / "artifacts").as_uri()
        self._experiment: str | None = None
        self._runs: dict[int, str] = {}

    def begin(self, run: Run) -> None:
        self._experiment = self._experiment or self._found_experiment()
        found = self._client.search_runs([self._experiment], f"tags.{_KEY} = '{run.key}'", max_results=1)
        if found:  # the trial goes on, so does its run
            self._runs[run.number] = found[0].info.run_id
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            return
        made = self._client.create_run(self._experiment, run_name=run.name, tags={**run.tags, _KEY: run.key})
        self._runs[run.number] = made.info.run_id
        self._client.log_batch(made.info.run_id, params=[Param(name, str(value)) for name, value in run.params.items()])

    def log(self, number: int, images: int, values: Mapping[str, float]) -> None:
        now = round(1000 * time.time())
        metrics = [Metric(_REFUSED.sub("_", name), value, now, images) for name, value in values.items()]
        self._client.log_batch(self._runs[number], metrics=metrics)

    def end(self, number: int, state: str, tags: Mapping[str, str]) -> None:
        run = self._runs.pop(number)
        self._client.log_batch(run, tags=[RunTag(name, value) for name, value in tags.items()])
        if state == "WAITING":
            self._client.update_run(run, status=_STATUS[state])
        else:
            self._client.set_terminated(run, status=_STATUS[state])

    def close(self) -> None:
        """Each call was its own."""

    def _found_experiment(self) -> str:
        """The study's experiment, made if there is none; another launcher may be making it."""
        if (found := self._client.get_experiment_by_name(self._name)) is None:
            try:
                return str(self._client.create_experiment(self._name, artifact_location=self._artifacts))
            except MlflowException:
                if (found := self._client.get_experiment_by_name(self._name)) is None:
                    raise
        return str(found.experiment_id)
