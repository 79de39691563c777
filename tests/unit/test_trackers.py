"""What trackers are told, with the real ones read back where they are installed."""

import json
import logging
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from bdense_core.errors import BadValue
from search import logs, ray_environment, trackers
from search.records import Row
from search.trackers import feed
from search.trackers.feed import Feed
from search.trackers.runs import Run, Tracked, Tracker
from tests.patience import PATIENCE_S
from tests.rows import claim, row

STUDY = Tracked(
    name="digits", key="digits-0a1b2c3d", metric="fd-digits", about={"study": "digits", "code_version": "1.0"}
)
SECRET = "tell-nobody-4711"


class Notebook:
    """A tracker that keeps what it is told."""

    place = "here"

    def __init__(self) -> None:
        self.runs: dict[int, Run] = {}
        self.numbers: list[tuple[int, int, dict[str, float]]] = []
        self.ends: dict[int, dict[str, str]] = {}
        self.is_closed = False

    def begin(self, run: Run) -> None:
        self.runs[run.number] = run

    def log(self, number: int, images: int, values: Mapping[str, float]) -> None:
        self.numbers.append((number, images, dict(values)))

    def end(self, number: int, state: str, tags: Mapping[str, str]) -> None:
        assert tags["state"] == state
        self.ends[number] = dict(tags)

    def close(self) -> None:
        self.is_closed = True


class Broken(Notebook):
    """Its server has gone away."""

    def log(self, number: int, images: int, values: Mapping[str, float]) -> None:
        raise ConnectionError(f"no answer from https://me:{SECRET}@tracker/\nand more lines")


class Stuck(Notebook):
    """Waits for a server that does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = threading.Event()

    def begin(self, run: Run) -> None:
        self.answer.wait(60)
        super().begin(run)


@pytest.fixture(autouse=True)
def plain_logs() -> Iterator[None]:
    handlers = list(logging.getLogger().handlers)
    logs.configure()
    yield
    logging.getLogger().handlers[:] = handlers


def progress(kimg: float, loss: float | None, phase: str = "training") -> dict[str, Any]:
    return {"event": "progress", "kimg": kimg, "fraction": kimg / 4, "phase": phase, "loss": loss}


def score(kimg: float, value: float, **more: Any) -> dict[str, Any]:
    rest = {"surrogate": None, "metrics": [], "repeats": [], "evaluations": []}
    return {"event": "score", "kimg": kimg, "fraction": kimg / 4, "value": value, **rest, **more}


def told(tracker: Tracker, events: Callable[[Feed], None]) -> None:
    """The tracker after these events and the launch's end."""
    listener = Feed("notebook", tracker, STUDY)
    events(listener)
    listener.finish()
    listener.wait(time.monotonic() + PATIENCE_S)


FURTHER = [["rho", 0.5], ["fd@8", 1.75], ["fd[guidance=1,tag=false]", 2.5]]
"""Figures as DASH and progressive distillation name them."""


def one_trial(listener: Feed) -> None:
    trial = replace(
        claim(3, seeds=(0, 7)), params={"a": 1.5, "b": -2.0, "lr": 0.25}, settings={"lr": 0.25, "kind": "x"}
    )
    listener.started(trial)
    listener.progressed(trial, progress(0.5, 0.75))
    listener.progressed(trial, score(2, 1.5, surrogate=0.125))
    listener.progressed(trial, progress(0.25, 0.5, phase="seed 7"))
    listener.progressed(trial, score(4, 1.25, surrogate=0.0625, metrics=FURTHER, repeats=[[7, 4, 1.75]],
                                     evaluations=[1.3]))  # fmt: skip
    listener.ended(trial, "COMPLETE", 1.5, violated=("rho", "cos"))


def test_a_trial_is_one_run_with_its_proposal_its_numbers_by_images_and_its_end() -> None:
    notebook = Notebook()
    told(notebook, one_trial)
    run = notebook.runs[3]
    assert (run.name, run.key) == ("digits/trial-3", "digits-0a1b2c3d-3")
    shares = {"share_0": 0.25, "share_1": 0.25, "share_2": 0.5}
    assert run.params == {"a": 1.5, "b": -2.0, "lr": 0.25, "kind": "x", **shares}
    assert run.tags == {"study": "digits", "code_version": "1.0", "role": "search", "seeds": "0 7"}
    assert notebook.numbers == [
        (3, 500, {"loss": 0.75}),
        (3, 2000, {"fd-digits": 1.5, "surrogate": 0.125}),
        (3, 250, {"seed-7/loss": 0.5}),
        (3, 4000, {"fd-digits": 1.25, "surrogate": 0.0625, **dict(FURTHER), "evaluation-1/fd-digits": 1.3}),
        (3, 4000, {"seed-7/fd-digits": 1.75}),
        (3, 4000, {"value": 1.5}),
    ]
    assert notebook.ends[3] == {"state": "COMPLETE", "misses": "rho cos"} and notebook.is_closed


def test_each_way_a_trial_leaves_has_its_state_and_a_retry_names_the_trial_it_goes_on_with() -> None:
    notebook = Notebook()

    def events(listener: Feed) -> None:
        for number in range(4):
            listener.started(claim(number, "control:paper"))
        listener.ended(claim(0), "PRUNED", 2.0)
        listener.failed(claim(1), "its worker was lost", retry=True)
        listener.lost(claim(2), "its lease expired")
        listener.started(replace(claim(4), origin=1, rule="gate"))

    told(notebook, events)
    assert {number: end["state"] for number, end in notebook.ends.items()} == {
        0: "PRUNED", 1: "FAIL", 2: "LOST", 3: "WAITING", 4: "WAITING",
    }  # fmt: skip
    assert notebook.ends[1] == {"state": "FAIL", "reason": "its worker was lost", "retried": "true"}
    assert notebook.runs[4].tags["retry_of"] == "digits/trial-1" and notebook.runs[4].tags["rule"] == "gate"
    assert "retry_of" not in notebook.runs[1].tags and notebook.runs[1].tags["role"] == "control:paper"


def test_the_noise_floor_is_told_once_controls_have_run_on_two_seeds() -> None:
    def scored(number: int, *values: float) -> Row:
        repeats = tuple((seed, 4, value) for seed, value in enumerate(values[1:], start=1))
        seeds = tuple(range(len(values)))
        return replace(
            row(number, role=f"control:{number}", value=values[0], seeds=seeds),
            intermediate={4: values[0]},
            repeats=repeats,
        )

    notebook = Notebook()

    def events(listener: Feed) -> None:
        listener.started(claim(0))
        listener.ended(claim(0), "COMPLETE", 1.0)
        listener.refresh([scored(1, 1.0, 3.0), scored(2, 2.0, 2.0)])
        listener.started(claim(5))
        listener.ended(claim(5), "COMPLETE", 1.0)

    told(notebook, events)
    assert notebook.ends[5]["noise_sd"] == "1", "variances 2 and 0, pooled by hand"


def test_numbers_that_are_none_are_left_out() -> None:
    notebook, trial = Notebook(), claim(0)

    def events(listener: Feed) -> None:
        listener.started(trial)
        for loss in (None, float("nan"), float("inf"), 0.5):
            listener.progressed(trial, progress(1, loss))

    told(notebook, events)
    assert notebook.numbers == [(0, 1000, {"loss": 0.5})]


def test_no_password_and_no_database_is_in_a_reason() -> None:
    notebook = Notebook()

    def events(listener: Feed) -> None:
        listener.started(claim(0))
        urls = f"postgresql+psycopg2://me:{SECRET}@host/db and 's3://k:{SECRET}@b' password={SECRET}"
        listener.failed(claim(0), f"OSError: {urls}", retry=False)

    told(notebook, events)
    reason = notebook.ends[0]["reason"]
    assert SECRET not in reason and "host" not in reason and reason.startswith("OSError: *** and 's3://k:***@b' ")


def test_a_tracker_that_fails_is_one_warning_and_is_asked_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    broken = Broken()
    told(broken, one_trial)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: tracker notebook is switched off, and the launch goes on: ConnectionError: no answer"
    )
    assert SECRET not in line
    assert broken.is_closed and not broken.ends


def test_a_launch_waits_for_no_tracker_and_at_its_end_only_until_the_deadline(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stuck = Stuck()
    listener = Feed("notebook", stuck, STUDY)
    one_trial(listener)
    listener.finish()
    listener.wait(time.monotonic())
    assert not stuck.runs, "the launch went on while it hung"
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: tracker notebook does not take what is left in time; the rest is not sent"
    stuck.answer.set()
    listener.wait(time.monotonic() + PATIENCE_S)
    assert stuck.ends[3]["state"] == "COMPLETE"


def test_a_tracker_that_falls_behind_loses_losses_first_and_then_everything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "_SPARE", 3)
    monkeypatch.setattr(feed, "_MOST", 5)
    stuck, trial = Stuck(), claim(0)
    listener = Feed("notebook", stuck, STUDY)
    listener.started(trial)
    for number in range(4):
        listener.progressed(trial, progress(number, 0.5))
        listener.progressed(trial, progress(number, 0.5))
        listener.progressed(trial, score(number, 1.0))
    stuck.answer.set()
    listener.finish()
    listener.wait(time.monotonic() + PATIENCE_S)
    behind, off = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"warning: tracker notebook is [34] events behind; some losses are left out", behind)
    assert off == "warning: tracker notebook is 5 events behind: it is switched off, and the launch goes on"
    assert stuck.is_closed


def test_a_package_that_is_missing_is_one_line_that_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_bare_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("nobody_has_this", "a_bare_folder"):
        line = f"--tracker {name}: {name} is not installed; run: pip install 'bdense-search[{name}]'"
        with pytest.raises(BadValue, match=f"^{re.escape(line)}$"):
            trackers.check([name])
    trackers.check([])
    trackers.check(["numpy"])


# -- the real ones


def two_launches(opened: Callable[[], Tracker]) -> None:
    """Trial 3 ends and trial 4 is given back in the first launch; the second one ends trial 4."""
    interrupted = replace(claim(4), params={"a": 0.5})

    def first(listener: Feed) -> None:
        one_trial(listener)
        listener.started(interrupted)
        listener.progressed(interrupted, score(2, 3.5))

    def second(listener: Feed) -> None:
        listener.started(interrupted)
        listener.progressed(interrupted, score(4, 2.5))
        listener.failed(interrupted, "the metric is nan", retry=False)

    told(opened(), first)
    told(opened(), second)


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams import api_pb2, metadata

    from search.trackers.to_tensorboard import TensorBoard

    two_launches(lambda: TensorBoard(tmp_path))
    found = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert set(found.Runs()) == {"trial-3", "trial-4"}
    ended, failed = found.GetAccumulator("trial-3"), found.GetAccumulator("trial-4")
    assert [(event.step, event.value) for event in ended.Scalars("fd-digits")] == [(2000, 1.5), (4000, 1.25)]
    assert [(event.step, event.value) for event in ended.Scalars("seed-7/loss")] == [(250, 0.5)]
    assert [(event.step, event.value) for event in failed.Scalars("fd-digits")] == [(2000, 3.5), (4000, 2.5)]

    content = ended.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    params = metadata.parse_session_start_info_plugin_data(content).hparams
    assert (params["a"].number_value, params["kind"].string_value) == (1.5, "x")
    for run, status in ((ended, api_pb2.STATUS_SUCCESS), (failed, api_pb2.STATUS_FAILURE)):
        content = run.SummaryMetadata(metadata.SESSION_END_INFO_TAG).plugin_data.content
        assert metadata.parse_session_end_info_plugin_data(content).status == status
    (text,) = failed.Tensors("end")[-1].tensor_proto.string_val
    assert "| reason | the metric is nan |" in text.decode()


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's, of SQLAlchemy 2.1
def test_mlflow_reads_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch", SECRET])
    from mlflow import MlflowClient

    from search.trackers.to_mlflow import MLflow

    folder = tmp_path / "mlflow"
    folder.mkdir()
    two_launches(lambda: MLflow(STUDY, folder))
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"digits/trial-3", "digits/trial-4"}
    ended, failed = runs["digits/trial-3"], runs["digits/trial-4"]
    assert (ended.info.status, failed.info.status) == ("FINISHED", "FAILED")
    assert ended.data.params["a"] == "1.5" and ended.data.params["share_2"] == "0.5"
    assert (
        ended.data.tags.items()
        >= {"role": "search", "seeds": "0 7", "state": "COMPLETE", "code_version": "1.0"}.items()
    )
    assert failed.data.tags["reason"] == "the metric is nan"
    history = client.get_metric_history(failed.info.run_id, "fd-digits")
    assert [(point.step, point.value) for point in history] == [(2000, 3.5), (4000, 2.5)]
    assert ended.data.metrics["value"] == 1.5
    assert ended.data.metrics["fd_8"] == 1.75 and ended.data.metrics["fd_guidance_1_tag_false_"] == 2.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow"], "nothing is left where the launch was typed"
    assert SECRET.encode() not in (folder / "mlflow.db").read_bytes()


def test_wandb_keeps_offline_runs_that_hold_what_was_logged_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch", f"--storage=postgresql://me:{SECRET}@host/db"])
    monkeypatch.setenv("PGPASSWORD", SECRET)
    from search.trackers.to_wandb import WandB

    folder = tmp_path / "wandb"
    folder.mkdir()
    seen: list[dict[str, str]] = []

    def opened() -> WandB:
        with ray_environment.without_password():
            tracker = WandB(STUDY, folder)
        seen.extend(child.environ() for child in psutil.Process().children() if "wandb-core" in child.name())
        return tracker

    two_launches(opened)
    histories: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        records = list(recorded(path))
        (about,) = [record.run for record in records if record.HasField("run")]
        assert (about.run_group, about.project) == ("digits", "bdense")
        histories.setdefault(about.display_name, []).extend(
            {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        )
        if about.display_name == "digits/trial-3":
            config = {item.key: json.loads(item.value_json) for item in about.config.update}
            assert config.items() >= {"a": 1.5, "kind": "x", "share_2": 0.5, "seeds": "0 7", "role": "search"}.items()
    ended, failed = histories["digits/trial-3"], histories["digits/trial-4"]
    assert [(row["kimg"], row["fd-digits"]) for row in ended if "fd-digits" in row] == [(2, 1.5), (4, 1.25)]
    assert [(row["kimg"], row["fd-digits"]) for row in failed] == [(2, 3.5), (4, 2.5)]
    assert [path.name for path in tmp_path.iterdir()] == ["wandb"]
    assert len(seen) == 2 and not any(SECRET in value for environment in seen for value in environment.values())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert capfd.readouterr() == ("", "")


def recorded(path: Path) -> Iterator[Any]:
    """The records of a W&B file: blocks of 32 KiB, in which a record may be split, each part with its kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while at + 7 <= len(content):
        left = -at % 32768
        if 0 < left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(record)
            record = b""
