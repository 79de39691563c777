"""The wheel by itself: installed into a folder, outside the checkout, it is all that the quickstart needs."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e.conftest import User
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    assert len(list(folder.glob("*.tar.gz"))) == 1
    return made


def test_the_wheel_holds_two_packages_their_types_the_studies_and_the_shipped_models(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"bdense_core", "search"}
    assert {"bdense_core/py.typed", "search/py.typed"} <= set(names)
    shipped = {path.name for path in (ROOT / "studies").iterdir()}
    assert {Path(name).name for name in names if name.startswith("search/studies/")} == shipped
    assets = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bdense_core" / "assets").rglob("*.safetensors")}
    assert assets and assets <= set(names)
    assert not [name for name in names if name.endswith(".pyc") or "test" in name.lower()]


@pytest.mark.long
def test_the_quickstart_runs_from_the_wheel_alone(wheel: Path, newcomer: User, tmp_path: Path) -> None:
    place = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(place)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, timeout=PATIENCE_S)
    program = str(place / "bin" / "bdense-weights")
    newcomer.environment |= {"PYTHONPATH": str(place)}  # before the checkout, which is on the path of this environment
    where = newcomer.run(
        sys.executable, "-c", "import search, bdense_core; print(search.__file__, bdense_core.__file__)"
    )
    assert where.stdout.split() == [str(place / name / "__init__.py") for name in ("search", "bdense_core")], where

    version = newcomer.run(program, "--version")
    assert version.stdout.split()[-1] == wheel.name.split("-")[1]
    launched = newcomer.run(
        program, "launch", "--no-dashboard", "--trials", "1", "--format", "json", "--set", "method.budget_kimg=1",
        "--set", "evaluation.n_samples=100", "--set", "seeds.control_repeats=1", "--set", "pruner.kind=none",
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert {trial["state"] for trial in json.loads(launched.stdout)["trials"]} == {"COMPLETE"}
    exported = newcomer.run(program, "export", "--study", "digits", "--format", "json")
    assert json.loads(exported.stdout)["schema"] == "bdense-weights/1", exported.stderr
    assert os.path.commonpath([ROOT, place]) != str(ROOT)
