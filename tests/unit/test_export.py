"""The weights file without a database: its schema, its seal, its forms, and what `verify` makes of altered ones.

weights-1.json is a real export of format 1, of a known function with two training seeds a trial. It stays readable.
"""

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from rich.console import Console
from safetensors import safe_open

from bdense_core.errors import BDenseError
from bdense_core.files import sha256_of
from bdense_core.methods import Synthetic
from bdense_core.weights import weights_at
from search import weights_file
from search.cli import commands
from search.console import yaml_text
from search.export import python_text, safetensors_bytes
from search.settings import Settings
from search.spec import identity_of
from search.verify import Check, table, verify
from search.version import code_version, package_version
from tests.patience import PATIENCE_S

STORED = Path(__file__).parent / "weights-1.json"

Content = dict[str, Any]


@pytest.fixture
def content() -> Content:
    return weights_file.read(STORED)


def found(content: Content, home: Path, *, quick: bool = True) -> list[Check]:
    return list(verify(content, Settings.load(home=home, environ={}), quick=quick))


def failed(content: Content, home: Path, *, quick: bool = True) -> dict[str, str]:
    """The failed checks by name, each with all that it says."""
    faults: dict[str, str] = {}
    for check in found(content, home, quick=quick):
        if check.outcome == "failed":
            faults[check.name] = "\n".join(filter(None, [faults.get(check.name), check.detail]))
    return faults


def put(content: Content, *path: Any, value: Any) -> None:
    """Set what lies at the end of the path."""
    *parents, last = path
    for key in parents:
        content = content[key]
    content[last] = value


def sealed_again(content: Content) -> Content:
    return content | {"sha256": weights_file.seal_of(content)}


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_of_the_first_format_still_holds_and_its_trial_runs_again(content: Content, tmp_path: Path) -> None:
    outcomes = {check.name: check.outcome for check in found(content, tmp_path, quick=False)}
    assert outcomes.pop("version") in ("passed", "warning")
    assert outcomes == dict.fromkeys(
        ("schema", "sha256", "spec", "weights", "scores", "noise floor", "verdict", "files", "rerun"), "passed"
    )


@pytest.mark.parametrize(
    ("name", "words", "alterations"),
    [
        ("weights", "a and b do not give these weights", {("a",): 1.0}),
        ("weights", "a and b do not give these weights", {("b",): -4.99}),
        ("weights", "a and b do not give these weights", {("candidates", 0, "a"): 1.0, ("a",): 1.0}),
        ("weights", "b is -1, but of the first candidate it is", {("b",): -1.0}),
        ("weights", "do not give these weights but", {("candidates", 1, "params", "a"): 0.5}),
        ("weights", "the weights divided by their sum are", {("controls", 0, "shares", 0): 0.9}),
        ("weights", "schedule is [[[1, 1, 1, 1]]], expected []", {("candidates", 1, "schedule"): [[[1, 1, 1, 1]]]}),
        ("scores", "values by seed give 4", {("candidates", 1, "score", "value"): 3.5}),
        ("scores", "by_seed lacks a seed of its score", {("controls", 1, "by_seed"): {"11": 4.0}}),
        ("scores", "but of the first candidate it is", {("score", "value"): 3.5}),
        ("scores", "score.metric is \"fid\", expected", {("candidates", 1, "score", "metric"): "fid"}),
        ("noise floor", "noise_floor.sd is 0.5, expected 0.00", {("noise_floor", "sd"): 0.5}),
        ("noise floor", "noise_floor is null, expected", {("noise_floor",): None}),
        ("verdict", "confirmation.arms[0].gains[0].interval.mean is 9", {
            ("confirmation", "arms", 0, "gains", 0, "interval", "mean"): 9}),
        ("verdict", "confirmation.arms[0].mean.mean", {("confirmation", "arms", 0, "by_seed", "1009"): 3.0}),
        ("verdict", "confirmation.winner is null", {("confirmation", "winner"): None}),
        ("verdict", "verdict is \"it is better\"", {("verdict",): "it is better"}),
        ("weights", "endpoint_only.weights[0] is 1, expected 0", {
            ("controls", 0, "weights"): [1, 1, 1, 1], ("controls", 0, "shares"): [0.25] * 4,
            ("controls", 0, "a"): None, ("controls", 0, "b"): None}),
        ("verdict", "confirmed is false, but the confirmation's winner is", {("confirmed",): False}),
        ("verdict", "seed 1009 is not fresh", {("seeds", "controls"): [9, 10, 1009]}),
        ("verdict", "confirmation.spec.method.noise is 0.5, expected 0.001", {
            ("confirmation", "spec", "method", "noise"): 0.5}),
        ("verdict", "confirmation.spec.seeds.training is 8, expected 9", {
            ("confirmation", "spec", "seeds", "training"): 8}),
        ("verdict", "confirmation.spec.comparison.kind is \"transfer\", expected \"confirm\"", {
            ("confirmation", "spec", "comparison", "kind"): "transfer", ("confirmation", "kind"): "transfer"}),
        ("verdict", "confirmation.spec.comparison.of is \"other\", expected \"stored\"", {
            ("confirmation", "spec", "comparison", "of"): "other", ("confirmation", "of"): "other"}),
        ("verdict", "confirmation.spec.comparison.of_created is \"2001-01-01\"", {
            ("confirmation", "spec", "comparison", "of_created"): "2001-01-01"}),
        ("verdict", "confirmation: what it ran as trial-4.weights[0] is 1, expected 0.02", {
            ("confirmation", "spec", "comparison", "arms", 0, "weights"): [1, 1, 1, 1]}),
        ("verdict", "confirmation: what it ran as mine.name is \"mine\", expected \"trial-4\"", {
            ("confirmation", "spec", "comparison", "arms", 0, "name"): "mine"}),
        ("verdict", "confirmation: what it ran as trial-4.trial is 99, expected 4", {
            ("confirmation", "spec", "comparison", "arms", 0, "trial"): 99}),
        ("weights", "candidates[1].name is \"best\", expected \"trial-5\"", {("candidates", 1, "name"): "best"}),
        ("noise floor", "numbers cannot be worked out", {("controls", 0, "by_seed", "10"): 1e308}),
        ("spec", "nfe is 2, expected 0", {("nfe",): 2}),
        ("spec", "target_space is \"x\", expected \"none\"", {("target_space",): "x"}),
        ("spec", "provenance.spec_sha256 is", {("spec", "method", "noise"): 0.0}),
        ("spec", "this version cannot read it: unknown key tricks", {("spec", "tricks"): 1}),
        ("spec", "terms[3] is \"im\", expected \"branch.4\"", {("terms",): ["branch.1", "branch.2", "branch.3", "im"]}),
        ("spec", "num_intervals is 2, expected 1", {("num_intervals",): 2}),
        ("weights", "trial-4: settings is {\"noise\": 0.5}, expected {}", {
            ("candidates", 0, "settings"): {"noise": 0.5}, ("settings",): {"noise": 0.5}}),
        ("weights", "settings is {}, but of the first candidate it is", {
            ("candidates", 0, "settings"): {"noise": 0.5}}),
        ("weights", "the method synthetic has no setting tricks", {("controls", 0, "settings"): {"tricks": True}}),
        ("weights", "the method synthetic refuses", {("controls", 0, "settings"): {"noise": "x"}}),
        ("weights", "endpoint_only.settings is {\"shift\": 1}, expected {}", {
            ("controls", 0, "settings"): {"shift": 1}}),
        ("weights", "endpoint_only.is_trained is false, expected true", {("controls", 0, "is_trained"): False}),
        ("noise floor", "noise_floor.num_controls is 2, expected 1", {("controls", 0, "is_trained"): False}),
        ("weights", "give no weights: 1e+06 is too large", {("candidates", 1, "params", "a"): 1e6}),
        ("weights", "give no weights", {("candidates", 1, "params", "a"): "x"}),
        ("scores", "violated is [\"balance\"], expected []", {
            ("candidates", 1, "violated"): ["balance"]}),
        ("scores", "violated is [], but of the first candidate", {("candidates", 0, "violated"): ["balance"]}),
        ("verdict", "confirmation: what it ran as trial-4.settings is {\"shift\": 1}, expected {}", {
            ("confirmation", "spec", "comparison", "arms", 0, "settings"): {"shift": 1}}),
        ("verdict", "confirmation.metrics.balance.trial-4.mean.mean is 9, expected 0.25", {
            ("confirmation", "metrics"): {"balance": {"trial-4": {
                "by_seed": {"1009": 0.25, "1010": 0.25}, "differences": [],
                "mean": {"mean": 9, "low": 0, "high": 1, "count": 2}}}}}),
        ("verdict", "confirmation.arms[0].violated is [\"balance\"], expected []", {
            ("confirmation", "arms", 0, "violated"): ["balance"]}),
    ],
)  # fmt: skip
def test_what_does_not_follow_from_the_rest_is_found_in_a_file_that_was_sealed_again(
    content: Content, tmp_path: Path, name: str, words: str, alterations: dict[tuple[Any, ...], Any]
) -> None:
    for path, value in alterations.items():
        put(content, *path, value=value)
    faults = failed(sealed_again(content), tmp_path)
    assert words in faults[name]
    assert "sha256" not in faults and "schema" not in faults


def test_one_alteration_is_told_by_its_seal_and_by_what_it_breaks(content: Content, tmp_path: Path) -> None:
    content["a"] += 0.1
    faults = failed(content, tmp_path)
    assert set(faults) == {"sha256", "weights"}
    assert "a and b do not give these weights" in faults["weights"]
    assert weights_file.seal_of(content) in faults["sha256"]


def test_a_value_that_its_trial_does_not_reach_is_found_by_running_it(content: Content, tmp_path: Path) -> None:
    """As a careful forger alters it: everywhere, and sealed again."""
    for entry in (content, content["candidates"][0]):
        entry["by_seed"] = {seed: value - 1 for seed, value in entry["by_seed"].items()}
        entry["score"]["value"] = sum(entry["by_seed"].values()) / 2
    forged = sealed_again(content)
    assert failed(forged, tmp_path) == {}
    (fault,) = failed(forged, tmp_path, quick=False).items()
    assert fault[0] == "rerun" and "1 apart, more than" in fault[1]


def told(content: Content, **figures: float) -> Content:
    """The file with further figures of its first candidate. Those of a trial on its first seed are known: balance is
    the share of all branches but the last."""
    for entry in (content, content["candidates"][0]):
        entry["metrics"] = {"balance": 1 - content["shares"][-1]} | figures
    return sealed_again(content)


def figures_check(content: Content, home: Path) -> Check:
    (check,) = [check for check in found(content, home, quick=False) if check.name == "figures"]
    return check


def test_figures_beside_the_metric_are_reached_again_too(content: Content, tmp_path: Path) -> None:
    check = figures_check(told(content), tmp_path)
    assert (check.outcome, "equal to the last bit" in check.detail) == ("passed", True)
    check = figures_check(told(content, balance=0.9), tmp_path)
    assert (check.outcome, "the file says 0.9" in check.detail) == ("failed", True)
    check = figures_check(told(content, rho=0.9), tmp_path)
    assert (check.outcome, check.detail) == ("failed", "the run gives no rho")


@pytest.mark.parametrize(
    ("apart", "outcome", "words"), [(0.01, "passed", "within the 0.0"), (0.1, "failed", "more than the 0.0")]
)
def test_a_figure_s_noise_is_that_of_the_confirmation_s_runs_beside_others_on_their_seed(
    content: Content, tmp_path: Path, apart: float, outcome: str, words: str
) -> None:
    """The value is altered as well, so that the rerun is not the same to the last bit. By hand: residuals of the four
    runs are ±0.005, with 1 degree of freedom; so the sd is 0.01, and 2 √2 sd 0.028."""
    for entry in (content, content["candidates"][0]):
        entry["by_seed"] = {seed: value + 1e-4 for seed, value in entry["by_seed"].items()}
        entry["score"]["value"] += 1e-4
    unlike = told(content, balance=1 - content["shares"][-1] + apart)
    assert figures_check(unlike, tmp_path).outcome == "warning", "nobody can say whether that is chance"
    none = {"mean": 0.0, "low": None, "high": None, "count": 2}
    runs = {"trial-4": {"1009": 0.2, "1010": 0.3}, "uniform": {"1009": 0.5, "1010": 0.62}}
    by_arm = {name: {"mean": none, "by_seed": by_seed, "differences": []} for name, by_seed in runs.items()}
    content["confirmation"]["metrics"] = {"balance": by_arm}
    content["provenance"]["packages"]["torch"] = "0.4"
    check = figures_check(told(content, balance=1 - content["shares"][-1] + apart), tmp_path)
    assert (check.outcome, words in check.detail) == (outcome, True)


def test_a_path_of_data_in_a_file_is_not_opened_and_one_s_own_is_given_beside_it(
    content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Synthetic, "needs_data", True)
    asked: list[str | None] = []
    run = Synthetic.run
    monkeypatch.setattr(Synthetic, "run", lambda self, task: asked.append(task.dataset) or run(self, task))
    settings = Settings.load(home=tmp_path, environ={})

    def rerun(named: str, **more: str) -> tuple[str, str]:
        content["dataset"] = content["spec"]["dataset"] = named
        content["provenance"]["spec_sha256"] = sha256_of(identity_of(content["spec"]))
        checks = verify(sealed_again(content), settings, quick=False, **more)
        return next((check.outcome, check.detail) for check in checks if check.name == "rerun")

    outcome, detail = rerun("/etc")
    assert (outcome, asked) == ("skipped", []) and "--dataset DATA" in detail
    assert rerun("/etc", dataset=str(tmp_path))[0] == rerun("digits16")[0] == "passed"
    assert rerun("cifar10")[0] == "skipped", "it was not fetched"
    (tmp_path / "mine.npz").touch()
    assert rerun(str(tmp_path / "mine"))[0] == "skipped"
    fetched = tmp_path / "models" / "cifar10" / "cifar10.npz"
    fetched.parent.mkdir(parents=True)
    fetched.touch()
    assert rerun("cifar10")[0] == "passed"
    assert set(asked) == {str(tmp_path), "digits16", str(fetched)}


def test_a_trial_is_not_run_with_weights_that_are_not_the_ones_meant(content: Content, tmp_path: Path) -> None:
    content["a"] = 0.0
    outcomes = {check.name: check.outcome for check in found(sealed_again(content), tmp_path, quick=False)}
    assert outcomes["rerun"] == "skipped"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        ("$.weights[1]: -1 is less than the minimum of 0", ("weights", 1), -1),
        ("$.schema: 'bdense-weights/1' was expected", ("schema",), "bdense-weights/9"),
        ("$.spec.method.num_branches: 1000000000 is greater", ("spec", "method", "num_branches"), 10**9),
        ("Additional properties are not allowed ('extra' was unexpected)", ("extra",), 1),
        ("$.candidates: [] should be non-empty", ("candidates",), []),
        ("$.candidates: trial 4 stands there 2 times", ("candidates", 1, "trial"), 4),
        ("$.candidates[1]: 3 weights for 4 terms", ("candidates", 1, "weights"), [1, 1, 1]),
        ("$: 2 weights for 4 terms", ("schedule",), [[[1, 1, 1, 1]], [[1, 1]]]),
        (
            "$: a schedule with weights for 2 intervals, of which there are 1",
            ("schedule",),
            [[[1, 1, 1, 1], [1, 1, 1, 1]]],
        ),
        ("$.confirmation.arms[0]: 1 weights for 4 terms", ("confirmation", "arms", 0, "schedule"), [[[1]]]),
        ("$.schedule[0][0]: [0, 0, 0, 0] does not contain items", ("schedule",), [[[0, 0, 0, 0]]]),
        ("$.seeds.training[0]: 9007199254740993 is greater than the maximum", ("seeds", "training", 0), 2**53 + 1),
        ("$.confirmation.spec.files: 'teacher' is a required", ("confirmation", "spec", "files"), {"evaluation": None}),
        ("$.settings: 'a b' does not match", ("settings",), {"a b": 1}),
        ("$.settings.lr: [1] is not of type 'number', 'string', 'boolean'", ("settings",), {"lr": [1]}),
        ("$.settings.lr: 9007199254740993 is greater than the maximum", ("settings",), {"lr": 2**53 + 1}),
        ("$.metrics.rho: '1' is not of type 'number'", ("metrics",), {"rho": "1"}),
        ("$.terms: 2 names for 4 terms", ("terms",), ["an", "im"]),
        ("$.num_intervals: 0 is less than the minimum of 1", ("num_intervals",), 0),
    ],
)
def test_the_schema_refuses_what_is_misshapen(
    content: Content, tmp_path: Path, words: str, path: tuple[Any, ...], value: Any
) -> None:
    put(content, *path, value=value)
    checks = found(sealed_again(content), tmp_path)
    assert [check.outcome for check in checks] == ["failed", "passed", "skipped"]
    assert words in checks[0].detail
    file = written(tmp_path / "weights.json", json.dumps(sealed_again(content)))
    with pytest.raises(BDenseError, match="is no weights file: "):
        weights_file.read(file)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path into nested values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def test_whatever_stands_anywhere_in_a_file_is_judged_and_breaks_nothing(content: Content, tmp_path: Path) -> None:
    choice = random.Random(0)
    paths = list(places(content))
    for _ in range(100):
        altered = copy.deepcopy(content)
        value = choice.choice([None, True, -1, 1e308, 2**53, 10**30, 10**400, "x", [], {}, [{}]])
        put(altered, *choice.choice(paths), value=value)
        file = written(tmp_path / "weights.json", json.dumps(sealed_again(altered)))
        if value in (10**30, 10**400):
            with pytest.raises(BDenseError, match=r"an integer beyond 2\*\*53: 10000"):
                weights_file.load(file)
        else:
            assert found(weights_file.load(file), tmp_path)[0].name == "schema"


def test_the_schema_is_a_schema_and_every_key_it_asks_for_is_missed(content: Content) -> None:
    Draft202012Validator.check_schema(weights_file.schema())
    assert weights_file.complaints(content) == []
    for key in content:
        (complaint,) = weights_file.complaints({name: value for name, value in content.items() if name != key})
        assert f"'{key}' is a required property" in complaint


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("w.json", "{", "no JSON of finite numbers"),
        ("w.json", "[" * 200_000, "no JSON of finite numbers"),
        ("w.json", '{"a": 1e999}', "no JSON of finite numbers"),
        ("w.json", '{"a": NaN}', "no JSON of finite numbers"),
        ("w.json", '{"a": 9007199254740993}', "an integer beyond 2**53: 9007199254740993"),
        ("w.json", '{"a": -1' + "0" * 400 + "}", "an integer beyond 2**53: -1000"),
        ("w.yaml", "a: 1" + "0" * 400, "an integer beyond 2**53: 1000"),
        ("w.json", "[]", "it holds no object"),
        ("w.yaml", "a: &x [1]\nb: *x\n", "it has aliases"),
        ("w.yaml", "[" * 200_000, "it goes too deep"),
        ("w.yaml", "a: !!python/object/apply:os.getcwd []", "no YAML of finite numbers"),
    ],
    ids=[
        "broken", "deep", "huge number", "no number", "inexact", "long", "long YAML", "list", "aliases", "deep YAML",
        "code",
    ],
)  # fmt: skip
def test_a_file_of_a_stranger_gives_one_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(BDenseError) as caught:
        weights_file.load(written(tmp_path / name, text))
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(BDenseError, match="larger than 16 MB"):
        weights_file.load(written(tmp_path / "w.json", " " * (weights_file.MAX_BYTES + 1)))


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", tmp_path, tmp_path / "absent.json"):
        with pytest.raises(BDenseError):
            weights_file.load(path)


def test_a_file_that_was_altered_is_not_read_for_a_transfer(content: Content, tmp_path: Path) -> None:
    content["candidates"][0]["weights"][0] += 1e-6
    with pytest.raises(BDenseError, match="was altered after its export"):
        weights_file.read(written(tmp_path / "weights.json", json.dumps(content)))


def test_yaml_and_json_are_one_file(content: Content, tmp_path: Path) -> None:
    assert weights_file.read(written(tmp_path / "weights.yaml", yaml_text(content))) == content


def test_safetensors_hold_the_weights_and_the_whole_file(content: Content, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors_bytes(content))
    with safe_open(path, framework="numpy") as opened:
        weights, metadata = opened.get_tensor("weights"), opened.metadata()
    assert weights.dtype == "float64" and weights.tolist() == content["weights"]
    assert json.loads(metadata["bdense_weights"]) == content


@pytest.mark.parametrize("schedule", [[], [[[1.0, 2.0, 3.0, 4.0]], [[0.0, 2.0, 6.0, 1.0]], [[0.0, 2.0, 0.5, 9.0]]]])
def test_the_python_form_runs_without_this_package(content: Content, tmp_path: Path, schedule: list[Any]) -> None:
    content["schedule"] = schedule
    times = [0.0, 0.2, 0.5, 0.7, 1.0]
    script = python_text(content) + (
        "\nimport json, sys\n"
        f"print(json.dumps([[weights(k, done) for k in range(4)] for done in {times}]))\n"
        "print(json.dumps(WEIGHTS))\n"
        "assert not {'search', 'bdense_core', 'torch'} & sys.modules.keys()\n"
    )
    file = written(tmp_path / "snippet.py", script)
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(file)],
        capture_output=True, text=True, timeout=PATIENCE_S, check=True, cwd=tmp_path,
    )  # fmt: skip
    values, stored = map(json.loads, done.stdout.splitlines())
    for time, row in zip(times, values, strict=True):
        (expected,) = weights_at(schedule, tuple(content["weights"]), time, 1)
        assert row == pytest.approx(list(expected), rel=1e-12)
    assert stored["weights"] == content["weights"] and stored["sha256"] == content["sha256"]


def test_nothing_of_a_file_reaches_the_terminal_but_its_letters() -> None:
    console = Console(width=200, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(table([Check(name="spec", outcome="failed", detail="\x1b[2J[red]gone[/red]\r\n")]))
    assert "\x1b[2J" not in captured.get()
    assert "?[2J[red]gone[/red]??" in captured.get()


def test_unlike_versions_are_a_warning_alone(content: Content, tmp_path: Path) -> None:
    content["provenance"]["packages"]["torch"] = "0.4"
    checks = {check.name: check for check in found(sealed_again(content), tmp_path)}
    assert checks["version"].outcome == "warning" and "torch 0.4 there" in checks["version"].detail


def test_a_file_gets_no_more_threads_than_there_are(
    content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("BDENSE_HOME", str(tmp_path))
    content["spec"]["resources"]["cpus"] = 1e6
    file = written(tmp_path / "weights.json", json.dumps(sealed_again(content)))
    done = CliRunner().invoke(commands, ["verify", str(file), "--quick"])
    assert (done.exit_code, done.exception) == (0, None)
    assert os.environ["OMP_NUM_THREADS"] == str(os.cpu_count())


@pytest.mark.parametrize(
    ("code", "shift", "outcome", "words"),
    [
        ("other", 1e-4, "passed", "within the 0.00"),
        (None, 1e-4, "warning", "the same code on a like machine gives the same bits"),
        (None, 1e-1, "failed", "more than the 0.00"),
    ],
)
def test_a_difference_is_judged_by_the_noise_of_two_runs_on_one_seed(
    content: Content, tmp_path: Path, code: str | None, shift: float, outcome: str, words: str
) -> None:
    """The study's noise has a standard deviation of 0.001 a run."""
    for entry in (content, content["candidates"][0]):
        entry["by_seed"] = {seed: value + shift for seed, value in entry["by_seed"].items()}
        entry["score"]["value"] += shift
        entry["code_version"] = code or code_version()
        content["provenance"]["packages"] |= {name: package_version(name) for name in ("torch", "numpy")}
    checks = {check.name: check for check in found(sealed_again(content), tmp_path, quick=False)}
    assert (checks["rerun"].outcome, checks["scores"].outcome) == (outcome, "passed")
    assert words in checks["rerun"].detail
