"""Backup and restore, by the very commands of docs/operations.md."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from search.database import Database
from search.records import Row
from search.settings import normalise_url
from search.storage import Studies, StudyStore
from search.study_file import load_study, studies_folder
from tests.patience import PATIENCE_S

DOCUMENTED = Path(__file__).parents[2] / "docs" / "operations.md"
AS_ROOT = sys.platform != "win32" and os.geteuid() == 0
NOBODY = 65534

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the commands are for a POSIX shell")


@dataclass
class Operator:
    """Somebody at a shell, with the machine's own account or another, and `bdense-weights` on the path."""

    folder: Path
    account: int | None

    def types(self, command: str, home: str) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(self.folder), "BDENSE_HOME": str(self.folder / home)}
        return subprocess.run(
            ["sh", "-c", command], cwd=self.folder, env=environment, user=self.account, group=self.account,
            extra_groups=None if self.account is None else [],
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip

    def does(self, command: str, home: str) -> str:
        done = self.types(command, home)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(params=["this user", "an ordinary user"])
def operator(request: pytest.FixtureRequest) -> Iterator[Operator]:
    other = request.param != "this user"
    if other and not AS_ROOT:
        pytest.skip("only root can become another user, and this user is an ordinary one already")
    folder = Path(tempfile.mkdtemp(prefix="bdense-"))
    someone = Operator(folder, NOBODY if other else None)
    if other:
        os.chown(folder, NOBODY, NOBODY)
        if someone.types("bdense-weights --version", "home").returncode != 0:
            folder.rmdir()
            pytest.skip("other users cannot run this Python")
    yield someone
    for home in folder.glob("*/postgres"):
        someone.does("bdense-weights server stop", home.parent.name)
    shutil.rmtree(folder)


def documented(program: str) -> str:
    (command,) = re.findall(rf'^"\$\(bdense-weights server bin\)/{program}" .*$', DOCUMENTED.read_text(), re.MULTILINE)
    return str(command)


def opened(address: str) -> Studies:
    return Studies(Database(normalise_url(address)))


def run(store: StudyStore, value: float) -> int:
    claim = store.trials.claim()
    assert claim is not None
    store.trials.report(claim.number, value, 3, may_prune=False)
    store.trials.complete(claim.number, value)
    return claim.number


def rows_of(studies: Studies) -> list[Row]:
    return studies.open("kept").rows()


def test_a_study_moves_to_a_new_home_by_the_documented_commands_and_goes_on_there(operator: Operator) -> None:
    operator.does("bdense-weights server start", "old")
    old = opened(operator.does("bdense-weights server url", "old"))
    study = load_study(
        studies_folder() / "synthetic.yaml", name="kept", overrides=("seeds.control_repeats=1", "budget.trials=4")
    )
    store = old.create_or_resume(study)
    finished = [run(store, value) for value in (4.0, 3.0, 2.5, 2.75)]
    assert finished == [0, 1, 2, 3]
    before, summary = rows_of(old), store.summary()
    operator.does(documented("pg_dump"), "old")
    old.database.close()
    operator.does("bdense-weights server stop", "old")

    operator.does("bdense-weights server start", "new")
    operator.does(documented("pg_restore"), "new")
    new = opened(operator.does("bdense-weights server url", "new"))
    assert rows_of(new) == before
    resumed = new.create_or_resume(study)
    assert resumed.summary() == summary
    assert resumed.summary().best == 2.5
    assert [run(resumed, 3.5), run(resumed, 3.25)] == [4, 5]
    assert resumed.trials.claim() is None and resumed.is_done()
    new.database.close()


def test_a_restore_over_existing_studies_is_refused_and_changes_nothing(operator: Operator) -> None:
    operator.does("bdense-weights server start", "home")
    studies = opened(operator.does("bdense-weights server url", "home"))
    study = load_study(studies_folder() / "synthetic.yaml", name="kept", overrides=("seeds.control_repeats=1",))
    store = studies.create_or_resume(study)
    operator.does(documented("pg_dump"), "home")
    run(store, 4.0)
    before = rows_of(studies)
    refused = operator.types(documented("pg_restore"), "home")
    assert refused.returncode != 0 and "already exists" in refused.stderr
    assert rows_of(studies) == before
    studies.database.close()
    operator.does(documented("pg_restore") + " --clean --if-exists", "home")
    restored = opened(operator.does("bdense-weights server url", "home"))
    assert {row.state for row in rows_of(restored)} == {"WAITING"}
    restored.database.close()


def test_the_address_of_a_home_without_a_server_is_an_error_that_says_how_to_make_one(operator: Operator) -> None:
    asked = operator.types("bdense-weights server url", "none")
    assert (asked.returncode, asked.stdout) == (1, "")
    assert "bdense-weights server start" in asked.stderr and len(asked.stderr.splitlines()) == 1
    assert not (operator.folder / "none").exists()
