"""What is measured of a device, where it is kept, and what an ended study is held against."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bdense_core.errors import BadValue, TrainingDiverged
from bdense_core.files import HashedFile
from search import calibration
from search.calibration import calibrate
from search.cli import commands
from search.errors import MissingFile
from search.plan import plan
from search.preview import line, preview
from search.records import Row
from search.settings import Settings
from search.spec import Study
from search.study_file import load_study, studies_folder
from search.throughput import Throughput, device_name, keep, stored
from tests.rows import row

TINY = ("evaluation.n_samples=20", "evaluation.batch=20", "method.batch=250")
SECONDS = {"teacher_cache": 0.003, "student_training": 0.002, "student_scoring": 0.001}


def study_of(name: str = "digits", *overrides: str) -> Study:
    return load_study(studies_folder() / f"{name}.yaml", overrides=overrides)


def known(study: Study, settings: Settings) -> Throughput:
    device = device_name(study)
    assert device
    found = Throughput(seconds=SECONDS, device=device, measured="2026-11-22T05:00:00+00:00")
    keep(study, found, settings)
    return found


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.load(home=tmp_path / "home", environ={})


@pytest.mark.parametrize(
    ("name", "overrides", "asks_beforehand"),
    [
        ("digits", ("method.budget_kimg=1",), True),
        ("digits-pd", ("method.start_steps=4", "method.nfe=1", "method.budget_kimg=2", "method.logsnr_max=5"), True),
        ("digits-dash", ("method.budget_kimg=1", "method.sampling_steps=2", "method.also_sampled=[]"), False),
    ],
)
def test_short_runs_of_every_method_give_times_that_a_plan_then_uses(
    settings: Settings, name: str, overrides: tuple[str, ...], asks_beforehand: bool
) -> None:
    study, threads = study_of(name, *TINY, *overrides), torch.get_num_threads()
    found = calibrate(study, settings, at_least_s=0)
    assert all(math.isfinite(value) and value >= 0 for value in found.seconds.values())
    assert found.seconds["student_training"] > 0 and found.seconds["student_scoring"] > 0
    assert (found.seconds["teacher_cache"] > 0) == asks_beforehand, "DASH asks its teacher within an iteration"
    assert stored(study, settings) == found
    time = plan(study, settings)["time"]
    assert time["source"] == found.source and time["device_hours"] > 0
    assert torch.get_num_threads() == threads
    assert [path.name for path in settings.home.iterdir()] == ["throughput"], "a short run keeps nothing"


def test_each_kind_of_work_is_divided_by_the_evaluations_that_were_done(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that goes on by 1 with each event: a piece takes 1 s, whatever the machine does."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: float(next(ticks)))
    found = calibrate(study_of("digits", *TINY, "method.budget_kimg=1"), settings, at_least_s=0).seconds
    assert found["teacher_cache"] == pytest.approx(4 / (1000 * 12)), "4 files of 256 trajectories, 12 steps each"
    assert found["student_training"] == pytest.approx(4 / (1000 * 6)), "4 batches, 3 passes in each of 2 intervals"
    assert found["student_scoring"] == pytest.approx(1 / (20 * 2)), "a batch of samples, 2 network calls each"


def test_what_was_measured_is_found_again_whatever_changes_only_the_length_of_a_run(settings: Settings) -> None:
    found = known(study_of(), settings)
    assert stored(study_of("digits", "method.budget_kimg=2", "method.lr=1e-4", "budget.trials=3"), settings) == found


def test_another_teacher_batch_or_number_of_threads_has_not_been_measured(settings: Settings) -> None:
    study = study_of()
    known(study, settings)
    assert study.teacher is not None
    other = replace(study, teacher=HashedFile(path=study.teacher.path, sha256="0" * 64))
    assert stored(other, settings) is None
    for override in ("method.batch=32", "method.num_branches=2", "resources.cpus=2", "evaluation.batch=7"):
        assert stored(study_of("digits", override), settings) is None, override
    assert stored(study_of("synthetic"), settings) is None


def test_a_damaged_figure_counts_as_not_measured_and_that_is_said(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    known(study_of(), settings)
    (path,) = settings.throughput.iterdir()
    path.write_text(path.read_text()[:-20])
    assert stored(study_of(), settings) is None
    assert f"{path} cannot be read" in caplog.text and "--calibrate" in caplog.text


def test_what_cannot_be_measured_is_refused_and_leaves_nothing(settings: Settings) -> None:
    with pytest.raises(BadValue, match="the method synthetic trains no network"):
        calibrate(study_of("synthetic"), settings)
    with pytest.raises(MissingFile, match="lacks files: there is no teacher 'gone'"):
        calibrate(replace(study_of(), missing=("there is no teacher 'gone'",)), settings)
    with pytest.raises(TrainingDiverged):
        calibrate(study_of("digits", *TINY, "method.lr=1e30"), settings, at_least_s=0)
    assert not settings.home.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_not_measured(settings: Settings) -> None:
    with pytest.raises(BadValue, match="sees 0 GPU"):
        calibrate(study_of("digits", "resources.gpus=1"), settings)
    assert not settings.home.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--price", "2"], "--price is about a plan; add --dry-run"),
        (["--calibrate"], "--calibrate is about a plan; add --dry-run"),
        (["--dry-run", "--price", "-1"], "-1.0 is not in the range x>=0"),
        (["--dry-run", "--price", "nan"], "nan is no price of an hour"),
        (["--dry-run", "--price", "free"], "'free' is not a valid float"),
    ],
)
def test_options_of_a_plan_that_make_no_sense_are_wrong_usage(options: list[str], words: str) -> None:
    done = CliRunner().invoke(commands, ["launch", *options])
    assert done.exit_code == 2
    assert words in done.output.splitlines()[-1]


# --- after a study --------------------------------------------------------------------------------------


def ended(number: int, state: str, steps: int, duration_s: float, **more: object) -> Row:
    values = dict.fromkeys(range(1, steps + 1), 1.0)
    return replace(row(number, state, duration_s=duration_s), intermediate=values, **more)


def test_what_was_expected_is_worked_out_for_the_work_that_was_done(settings: Settings) -> None:
    """The digits: 12 teacher and 6 student evaluations for each of 1000 trajectories, 2 for each of 1000 samples."""
    study = study_of()
    known(study, settings)
    rows = [
        ended(0, "COMPLETE", 4, 100, role="control:uniform", seeds=(0, 1, 2)),
        ended(1, "COMPLETE", 4, 200),
        ended(2, "PRUNED", 2, 50),
        ended(3, "FAIL", 1, 7000),
        ended(4, "COMPLETE", 4, 7000, resumed_from=2.0),
        ended(5, "RUNNING", 1, 7000),
    ]
    student = 6 * (3 * 4000 + 4000 + 2000)
    scores = 2000 * (3 * 4 + 4 + 2) + 2000  # the control once more, on another evaluation seed
    teacher = 12 * 4000 * 3
    expected = (0.002 * student + 0.001 * scores + 0.003 * teacher) / 3600
    found = preview(study, rows, settings)
    assert found is not None
    assert found["trials"] == 3
    assert found["expected_device_hours"] == pytest.approx(expected)
    assert found["used_device_hours"] == pytest.approx(350 / 3600)
    assert found["error"] == pytest.approx(350 / 3600 / expected - 1)
    uncached = study_of("digits", "cache.enabled=false")
    again = preview(uncached, rows, settings)
    assert again is not None
    more = 0.003 * 12 * (4000 + 2000) / 3600  # two trials ask anew for seed 0
    assert again["expected_device_hours"] == pytest.approx(expected + more)


def test_without_a_measurement_or_an_ended_trial_nothing_is_said(settings: Settings) -> None:
    study = study_of()
    assert preview(study, [ended(0, "COMPLETE", 4, 1)], settings) is None
    known(study, settings)
    assert preview(study, [ended(0, "RUNNING", 4, 1), ended(1, "FAIL", 1, 1)], settings) is None


def test_the_line_tells_both_figures_and_by_how_much_they_differ() -> None:
    found = {"expected_device_hours": 0.12, "used_device_hours": 0.15, "error": 0.25}
    assert line(found) == "preview: 0.12 device hours were expected, 0.15 were used (+25 %)"
