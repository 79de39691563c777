"""Trials that were broken off go on from their checkpoint, and trouble with checkpoints ends none."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import bdense_core
from bdense_core.errors import BadValue, CheckpointError
from bdense_core.methods.synthetic import Synthetic
from bdense_core.task import Task
from search import checkpoints, worker
from search.checkpoints import Checkpoints, Sweeper
from search.sections import CheckpointSection
from search.study_file import load_study
from search.version import versions
from search.worker import payload, run_trial
from tests.hanging_store import URL, hanging
from tests.patience import PATIENCE_S

Result = dict[str, Any]


class Unreachable(fsspec.AbstractFileSystem):
    """A store behind a network that is down, whose driver repeats the address that it was given."""

    protocol = "unreachable"
    root_marker = "/"

    def find(self, path: str, *_: object, **__: object) -> NoReturn:
        raise ConnectionError("no route to unreachable://me:geheim@host/store\nsee the manual")

    makedirs = put_file = ls = rm = find


class Stubborn(MemoryFileSystem):
    """A store that keeps one trial's state, whoever wants it gone."""

    protocol = "stubborn"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def rm(self, path: str, *arguments: Any, **named: Any) -> None:
        if "trial-00002" in path:
            raise PermissionError("not yours")
        super().rm(path, *arguments, **named)


class Crowded(MemoryFileSystem):
    """A store where two write before either goes on."""

    protocol = "crowded"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    both = threading.Barrier(2, timeout=PATIENCE_S)

    def pipe_file(self, *arguments: Any, **named: Any) -> None:
        super().pipe_file(*arguments, **named)
        self.both.wait()


@pytest.fixture(autouse=True)
def every_event_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SIGN_OF_LIFE_S", 0.0)


@pytest.fixture
def memory() -> Iterator[str]:
    """A store behind a URL."""
    MemoryFileSystem.store.clear()
    yield "memory://store"
    MemoryFileSystem.store.clear()


@pytest.fixture(params=["path", "url"])
def location(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    return Checkpoints(tmp_path / "kept" if request.param == "path" else memory).location("study", 3)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Task]:
    """SFD on the digits: 8 iterations, scored after 4 and 8, each of them kept."""
    changes = ("method.nfe=1", "method.num_branches=2", "method.budget_kimg=2", "method.batch=250")
    study = load_study(Path("digits"), overrides=(*changes, "evaluation.n_samples=100", "checkpoints.every_s=0"))
    return study.spec.method, study.task((0.4, 0.6), 0, cache_root=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def undisturbed(small: tuple[Any, Task]) -> list[Result]:
    return scores(list(run_trial(payload(*small, (0,)))))


def known(checkpoint: str | None, *, seconds: float = 0.0, seeds: tuple[int, ...] = (0,)) -> Result:
    """A trial of the known function, three scores long."""
    task = Task(weights=(1.0, 2.0), seed=seeds[0], every_kimg=1, teacher=None, evaluation=None, cache_root=None)
    return payload(Synthetic(num_branches=2, seconds=seconds), task, seeds, checkpoint=checkpoint)


def scores(results: list[Result]) -> list[Result]:
    ours = ("event", "kimg", "value", "repeats", "fraction", "done")
    return [{key: result[key] for key in ours} for result in results if result["event"] == "score"]


def notes(results: list[Result]) -> list[str]:
    return [result["note"] for result in results if "note" in result]


def begin(description: Result, *, until: float) -> Any:
    """A trial that has just said that so much of it is done."""
    trial = run_trial(description)
    next(result for result in trial if result["fraction"] >= until)
    return trial


def snapshots(folder: Path) -> list[Path]:
    return sorted(folder.glob("snapshot-*"))


# --- broken off and continued ---------------------------------------------------------------------------


@pytest.mark.parametrize("broken_off_at", [0.1, 0.5, 0.9])
def test_a_closed_trial_goes_on_and_ends_as_an_undisturbed_one_bit_for_bit(
    small: tuple[Any, Task], undisturbed: list[Result], location: str, broken_off_at: float
) -> None:
    description = payload(*small, (0,), checkpoint=location)
    begin(description, until=broken_off_at).close()
    results = list(run_trial(description))
    assert results[0]["resumed"] >= 2 * broken_off_at - 0.25
    assert scores(results) == undisturbed
    assert notes(results) == []


@pytest.mark.parametrize("broken_off_at", [0.3, 0.6, 0.9])
def test_a_killed_trial_goes_on_from_what_it_left(
    small: tuple[Any, Task], undisturbed: list[Result], tmp_path: Path, broken_off_at: float
) -> None:
    """A copy of the folder in the middle of the run is what a kill leaves."""
    trial = begin(payload(*small, (0,), checkpoint=str(tmp_path / "alive")), until=broken_off_at)
    shutil.copytree(tmp_path / "alive", tmp_path / "killed")
    trial.close()
    results = list(run_trial(payload(*small, (0,), checkpoint=str(tmp_path / "killed"))))
    assert results[0]["resumed"] > 0
    assert scores(results) == undisturbed


KILLED = """
import json, sys
from search.worker import run_trial
for result in run_trial(json.loads(sys.argv[1])):
    print(result["kimg"], flush=True)
"""


def test_a_trial_whose_process_is_killed_goes_on_from_its_copy_behind_a_url(tmp_path: Path) -> None:
    """Through fsspec's cache in front of a folder, which is a URL to us and the same for two processes."""
    description = known(f"simplecache::file://{tmp_path}/store", seconds=6)
    environment = os.environ | {"PYTHONPATH": str(Path(bdense_core.__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, json.dumps(description)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("3"))  # the state of 2 kimg is there by now
        process.send_signal(signal.SIGKILL)
    description["method"]["seconds"] = 0.0  # another run
    assert "resumed" not in next(run_trial(description))
    description["method"]["seconds"] = 6.0
    resumed = next(run_trial(description))
    assert resumed["resumed"] == 2


def test_repeats_go_on_too(location: str) -> None:
    expected = scores(list(run_trial(known(None, seeds=(0, 1, 2)))))
    description = known(location, seeds=(0, 1, 2))
    begin(description, until=0.75).close()
    results = list(run_trial(description))
    assert scores(results) == expected
    assert len(expected[-1]["repeats"]) == 6
    assert results[0]["resumed"] == 3
    assert sum("resumed" in result for result in results) == 1


def test_the_known_function_does_no_work_twice(location: str) -> None:
    description = known(location, seconds=1.5)
    trial = begin(description, until=2 / 3)
    trial.close()
    results = list(run_trial(description))
    assert results[0]["resumed"] == 2
    assert {result["kimg"] for result in results if result.get("phase") == "train"} == {3}
    assert scores(results) == scores(list(run_trial(known(None))))


def test_what_is_removed_after_the_result_does_not_come_back(
    small: tuple[Any, Task], tmp_path: Path, memory: str
) -> None:
    """The launcher removes a checkpoint once it has the result; only then the worker is told to close."""
    for root in (str(tmp_path / "kept"), memory):
        kept = Checkpoints(root)
        trial = begin(payload(*small, (0,), checkpoint=kept.location("study", 3)), until=1.0)
        assert root == memory or kept.trials("study") == [3]
        kept.remove("study", [3])
        trial.close()
        assert kept.trials("study") == []


# --- damage ---------------------------------------------------------------------------------------------


def test_a_truncated_newest_snapshot_costs_the_way_back_to_the_one_before(
    small: tuple[Any, Task], undisturbed: list[Result], tmp_path: Path
) -> None:
    description = payload(*small, (0,), checkpoint=str(tmp_path))
    begin(description, until=0.7).close()
    older, newest = snapshots(tmp_path)
    newest.write_bytes(newest.read_bytes()[:1000])
    results = list(run_trial(description))
    assert scores(results) == undisturbed
    assert results[0]["resumed"] * 1000 == 250 * int(older.name.split("-")[1])
    assert notes(results) == [f"the snapshot {newest} is damaged; looking for an older one"]


def test_a_truncated_copy_is_replaced_at_its_url(tmp_path: Path, small: tuple[Any, Task], memory: str) -> None:
    """Also where the step that is computed anew has the very name of the damaged file."""
    description = payload(*small, (0,), checkpoint=memory)
    begin(description, until=0.7).close()
    files = MemoryFileSystem()
    newest = max(files.find("/store"))
    whole = files.cat_file(newest)
    files.pipe_file(newest, whole[:1000])
    trial = run_trial(description)
    assert "is damaged" in next(trial)["note"]
    next(result for result in trial if result["fraction"] >= 0.75)
    trial.close()
    assert all(len(files.cat_file(path)) > 1000 for path in files.find("/store"))
    assert next(run_trial(description))["resumed"] >= 1.5


def test_another_runs_state_in_the_folder_is_passed_over_and_swept_up(
    small: tuple[Any, Task], undisturbed: list[Result], tmp_path: Path
) -> None:
    method, task = small
    other = payload(method, task, (0,), checkpoint=str(tmp_path))
    other["task"]["weights"] = (1.0, 1.0)
    begin(other, until=0.9).close()
    ours = payload(method, task, (0,), checkpoint=str(tmp_path))
    trial = run_trial(ours)
    told = [next(result for result in trial if result["fraction"] >= 0.3)]
    trial.close()
    results = list(run_trial(ours))
    assert results[0]["resumed"] * 4 == pytest.approx(8 * told[0]["fraction"])
    assert scores(results) == undisturbed
    assert notes(results) == []


def test_another_runs_state_is_noted(small: tuple[Any, Task], tmp_path: Path) -> None:
    other = payload(*small, (0,), checkpoint=str(tmp_path))
    other["task"]["weights"] = (1.0, 1.0)
    begin(other, until=0.9).close()
    trial = run_trial(payload(*small, (0,), checkpoint=str(tmp_path)))
    first = next(trial)
    trial.close()
    assert first["note"].count("is of another run: it differs in weights; looking for an older one") == 2
    assert "resumed" not in first


# --- storage that fails ---------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of half a megabyte."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_noted_once_and_ends_no_trial(
    small: tuple[Any, Task], undisturbed: list[Result], mounted: Path
) -> None:
    results = list(run_trial(payload(*small, (0,), checkpoint=str(mounted / "trial"))))
    assert scores(results) == undisturbed
    (note,) = notes(results)
    assert "No space left on device; free some space" in note
    assert note.endswith("the run goes on without")
    assert snapshots(mounted / "trial") == []


def test_a_disk_that_is_read_only_is_read_and_not_written(mounted: Path) -> None:
    description = known(str(mounted), seconds=0.3)
    begin(description, until=1 / 3).close()
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    results = list(run_trial(description))
    assert results[0]["resumed"] == 1
    (note,) = notes(results)
    assert "Read-only file system; the run goes on without" in note
    assert scores(results)[-1]["done"]


def test_networks_resume_from_a_disk_that_has_become_read_only(
    small: tuple[Any, Task], undisturbed: list[Result], mounted: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(mounted)], check=True)
    description = payload(*small, (0,), checkpoint=str(mounted))
    begin(description, until=0.4).close()
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    results = list(run_trial(description))
    assert results[0]["resumed"] > 0
    assert scores(results) == undisturbed
    assert ["Read-only file system" in note for note in notes(results)] == [True]


def test_a_folder_that_cannot_be_made_is_noted(small: tuple[Any, Task], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for description in (known(f"{tmp_path}/file/trial"), payload(*small, (0,), checkpoint=f"{tmp_path}/file/trial")):
        results = list(run_trial(description))
        assert ["Not a directory" in note for note in notes(results)] == [True]
        assert scores(results)[-1]["done"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("unreachable://me:geheim@host/store", "no route to unreachable://me:***@host/store"),
        ("nosuch://host/store", "Protocol not known"),
        ("driverless://host/store", "Install driverless"),
    ],
)
def test_storage_that_cannot_be_used_is_noted_and_ends_no_trial(url: str, words: str) -> None:
    register()
    results = list(run_trial(known(url)))
    assert scores(results) == scores(list(run_trial(known(None))))
    assert any(words in note for note in notes(results))
    assert len(notes(results)) <= 2  # it could not be read, and it cannot be written
    assert all("geheim" not in note and "\n" not in note for note in notes(results))


def test_a_store_that_hangs_holds_nothing_up(small: tuple[Any, Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FETCH_WITHIN_S", 0.2)
    monkeypatch.setattr(checkpoints, "LAST_COPY_WITHIN_S", 0.2)
    with hanging("find", "put") as store:
        trial = begin(payload(*small, (0,), checkpoint=URL), until=0.9)
        trial.close()
        assert store.store == {} and not store.answered


def test_no_private_folder_stays_behind(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    begin(known(memory), until=0.3).close()
    list(run_trial(known(memory)))
    assert list(tmp_path.iterdir()) == []


def test_without_room_for_a_private_folder_the_trial_goes_on(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    results = list(run_trial(known(memory)))
    assert scores(results)[-1]["done"]
    assert ["TMPDIR" in note for note in notes(results)] == [True]


# --- several workers ------------------------------------------------------------------------------------


def test_two_workers_on_one_location_do_not_damage_each_other(
    small: tuple[Any, Task], undisturbed: list[Result], location: str
) -> None:
    """The first was taken for dead, and wakes when the second is under way."""
    description = payload(*small, (0,), checkpoint=location)
    first = begin(description, until=0.4)
    second = begin(description, until=0.7)
    turns = list(zip_longest(first, second))
    ends = [[result for result in results if result] for results in zip(*turns, strict=True)]
    assert scores(ends[0])[-1] == scores(ends[1])[-1] == undisturbed[-1]
    assert notes(ends[0]) == notes(ends[1]) == []
    third = list(run_trial(description))
    assert third[0]["resumed"] >= 1.4
    assert scores(third) == undisturbed


@pytest.mark.parametrize("name", ["bdense-search", "torch", "numpy", "python"])
def test_a_worker_with_other_code_or_packages_refuses_and_says_which(name: str) -> None:
    ours = versions()
    (result,) = run_trial(known(None) | {"versions": ours | {name: "0.0.1"}})
    assert (result["event"], result["done"]) == ("unlike", True)
    assert f"{result['node']} has {name} {ours[name]} (the launcher 0.0.1); install" in result["reason"]
    assert scores(list(run_trial(known(None) | {"versions": dict(ours)})))[-1]["done"]


def test_every_event_says_where_it_comes_from(location: str) -> None:
    results = list(run_trial(known(location)))
    assert {result["pid"] for result in results} == {os.getpid()}
    assert all(result["node"] for result in results)


# --- the launcher's side --------------------------------------------------------------------------------


def register() -> None:
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    fsspec.register_implementation("stubborn", Stubborn, clobber=True)
    fsspec.register_implementation("crowded", Crowded, clobber=True)
    fsspec.register_implementation("driverless", "driverless.Files", clobber=True, errtxt="Install driverless")


@pytest.mark.parametrize("kind", ["path", "file", "memory"])
def test_the_launcher_lists_and_removes_what_trials_left(tmp_path: Path, memory: str, kind: str) -> None:
    root = {"path": str(tmp_path / "a b"), "file": f"file://{tmp_path}/c/", "memory": memory}[kind]
    kept = Checkpoints(root)
    assert kept.trials("digits-1") == []
    kept.prepare()
    kept.prepare()
    for study, first in (("digits-1", 0), ("digits-1", 123456), ("digits-10", 7)):
        begin(known(kept.location(study, first)), until=0.3).close()
    assert (kept.trials("digits-1"), kept.trials("digits-10")) == ([0, 123456], [7])
    kept.remove("digits-1", [123456, 5])
    assert kept.trials("digits-1") == [0]
    kept.remove_study("digits-1")
    assert (kept.trials("digits-1"), kept.trials("digits-10")) == ([], [7])


def with_states(kept: Checkpoints, *trials: int) -> Checkpoints:
    for first in trials:
        begin(known(kept.location("study", first)), until=0.3).close()
    return kept


def test_a_sweep_removes_what_is_of_no_use_any_more(tmp_path: Path, memory: str) -> None:
    for root in (str(tmp_path / "kept"), memory):
        kept = with_states(Checkpoints(root), 3, 4)
        Sweeper(kept, "study", lambda listed: [first for first in listed if first != 4]).finish()
        assert kept.trials("study") == [4]


def test_one_state_that_cannot_be_removed_keeps_no_other_one() -> None:
    register()
    kept = with_states(Checkpoints("stubborn://store"), 2, 3, 4)
    with pytest.raises(CheckpointError, match=r"checkpoints at stubborn://.*trial-00002 cannot be removed: not yours"):
        kept.remove("study", kept.trials("study"))
    assert kept.trials("study") == [2]


@pytest.mark.parametrize("hangs", ["ls", "rm"])
def test_a_sweep_waits_for_no_store_that_hangs_and_goes_on_once_it_answers(
    hangs: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoints, "SWEEP_WITHIN_S", 0.0)
    monkeypatch.setattr(checkpoints, "LAST_SWEEP_WITHIN_S", 0.2)
    with hanging() as store:
        kept = with_states(Checkpoints(URL), 3)
        store.hangs = frozenset({hangs})
        sweeper = Sweeper(kept, "study", lambda listed: listed)
        for _ in range(3):
            sweeper.finish()
            sweeper.step()
        assert (store.asked, store.answered) == ([hangs], []), "never more than one errand"
        (told,) = [record.getMessage() for record in caplog.records]
        assert told.startswith(f"the checkpoints at {URL} do not answer")
        store.let_go.set()
        monkeypatch.setattr(checkpoints, "LAST_SWEEP_WITHIN_S", PATIENCE_S)
        sweeper.finish()
        assert kept.trials("study") == []


def test_two_launchers_that_start_together_do_not_disturb_each_other() -> None:
    register()
    with ThreadPoolExecutor(2) as pool:
        for launcher in [pool.submit(Checkpoints("crowded://store").prepare) for _ in range(2)]:
            launcher.result()
    assert not Crowded.store


def test_a_location_is_a_plain_name_below_the_root() -> None:
    assert Checkpoints("s3://bucket/all/").location("digits", 12) == "s3://bucket/all/digits/trial-00012"
    for study in ("", "..", "a/b"):
        with pytest.raises(ValueError, match="names no folder"):
            Checkpoints("s3://bucket").location(study, 0)


def test_a_file_in_the_way_of_the_root_is_found_before_the_launch(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        CheckpointError, match=r"checkpoints at .*file/root cannot be written: .*change checkpoints.url"
    ):
        Checkpoints(tmp_path / "file" / "root").prepare()


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("unreachable://me:geheim@host/store", CheckpointError, "cannot be written: no route"),
        ("nosuch://host", BadValue, "Protocol not known"),
        ("driverless://host", BadValue, "Install driverless; install the driver's package on all nodes"),
    ],
)
def test_storage_that_cannot_be_used_is_one_line_without_a_password(
    url: str, error: type[Exception], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    register()
    kept = Checkpoints(url)
    with pytest.raises(error) as caught:
        kept.prepare()
    assert words in str(caught.value)
    with pytest.raises(error):
        kept.trials("study")
    with pytest.raises(error):
        kept.remove("study", [1])
    kept.remove_study("study")
    assert len(caplog.records) == 1
    sweeper = Sweeper(kept, "study", lambda listed: listed)
    for _ in range(3):
        sweeper.finish()
    assert len(caplog.records) == 2, "trouble that lasts is told once"
    told = f"{caught.value} {caplog.text}"
    assert "geheim" not in told
    assert "see the manual" not in told


@pytest.mark.parametrize("url", ["sftp://me:geheim@host/x", "s3://bucket/x?secret_key=geheim"])
def test_a_password_in_a_study_file_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(BadValue, match="holds a password") as caught:
        CheckpointSection(url=url)
    assert "geheim" not in str(caught.value)


def test_a_relative_path_is_refused_since_each_node_would_mean_another_folder() -> None:
    with pytest.raises(BadValue, match="neither a full path nor a URL"):
        CheckpointSection(url="checkpoints")
    assert CheckpointSection(url="/data/me@work").url == "/data/me@work"


def test_checkpoints_may_change_between_two_launches() -> None:
    here, there = (load_study(Path("synthetic"), overrides=(f"checkpoints.enabled={on}",)) for on in ("true", "false"))
    assert here.sha256() == there.sha256()
    assert load_study(Path("synthetic"), overrides=("checkpoints.every_s=7",)).task(
        (1.0,), 0, cache_root=Path("x")
    ).snapshot_every_s == pytest.approx(7)
