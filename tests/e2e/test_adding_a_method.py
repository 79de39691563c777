"""The worked page about adding a method: what it says is done to a copy of the packages, and its study is run."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE_S

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 80


@pytest.fixture(scope="module")
def blocks() -> dict[str, str]:
    page = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    return dict(re.findall(r"```(\w+)\n(.*?)```", page, flags=re.DOTALL))


@pytest.fixture
def checkout(tmp_path: Path, blocks: dict[str, str]) -> Path:
    """The packages with what the page adds."""
    for package in ("bdense_core", "search"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "bdense_core" / "methods" / "toy.py").write_text(blocks["python"], encoding="utf-8")
    union = tmp_path / "bdense_core" / "methods" / "__init__.py"
    text = union.read_text(encoding="utf-8")
    added = [line[1:] for line in blocks["diff"].splitlines() if line.startswith("+")]
    (taken,) = (line[1:] for line in blocks["diff"].splitlines() if line.startswith("-"))
    assert text.count(taken) == 1, "the page names a union that is not there"
    text = text.replace(taken, next(line for line in added if line.startswith("AnyMethod")))
    union.write_text("\n".join([*added[:1], text]), encoding="utf-8")
    (tmp_path / "toy.yaml").write_text(blocks["yaml"], encoding="utf-8")
    return tmp_path


def test_the_toy_is_short(blocks):
    assert len(blocks["python"].splitlines()) < MOST_LINES


@pytest.mark.long
def test_a_method_takes_a_module_and_a_member_of_the_union(checkout, user):
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            env=user.environment | {"PYTHONPATH": str(checkout)},
            cwd=checkout,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    launched = run("search/launch_study.py", "toy.yaml", "--no-dashboard")
    assert launched.returncode == 0, launched.stderr
    shown = run("-m", "search.cli", "show", "--study", "toy", "--format", "json")
    assert shown.returncode == 0, shown.stderr
    trials = json.loads(shown.stdout)["trials"]
    assert {trial["role"] for trial in trials} == {"search", "control:endpoint_only", "control:uniform", "control:slow"}
    searched = [trial for trial in trials if trial["role"] == "search"]
    assert len(searched) == 4 and all({"a", "lr"} == set(trial["params"]) for trial in searched)
    for trial in trials:
        if trial["state"] == "COMPLETE":
            assert trial["value"] == pytest.approx((trial["metrics"]["x"] - 2) ** 2) or trial["repeats"]
    exported = run("-m", "search.cli", "export", "--study", "toy")
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["terms"] == ["point.1", "point.2", "point.3"]
