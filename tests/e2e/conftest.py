"""Both commands as a user runs them: as subprocesses, in a home of their own."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from search import server
from search.study_file import studies_folder
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = Path(sys.executable).parent / "bdense-weights"
LAUNCH = [sys.executable, str(ROOT / "search" / "launch_study.py")]


@dataclass
class Running:
    """A command that runs, with what it has said so far."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def wait_for(self, condition: Callable[[list[str]], bool], timeout_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition(self.lines):
            assert self.process.poll() is None, "\n".join(self.lines)
            assert time.monotonic() < deadline, "\n".join(self.lines)
            time.sleep(0.05)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        return self.process.wait(timeout_s)


@dataclass
class User:
    """Somebody with a home folder."""

    home: Path
    environment: dict[str, str]

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command, env=self.environment | more, cwd=self.home.parent,
                capture_output=True, text=True, timeout=PATIENCE_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            said = b"".join(stream for stream in (error.stdout, error.stderr) if isinstance(stream, bytes))
            raise AssertionError(f"{error}; it said:\n{said.decode()}") from error

    def launch(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return self.run(*LAUNCH, *arguments, **more)

    def weights(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(WEIGHTS), *arguments, **more)

    def show(self, study: str) -> dict[str, Any]:
        done = self.weights("show", "--study", study, "--format", "json")
        assert done.returncode == 0, done.stderr
        shown: dict[str, Any] = json.loads(done.stdout)
        return shown

    def start_launch(self, *arguments: str) -> Running:
        return self.start(*LAUNCH, *arguments)

    def start(self, *command: str) -> Running:
        process = subprocess.Popen(
            command, env=self.environment | {"PYTHONUNBUFFERED": "1"}, cwd=self.home.parent,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        running = Running(process)

        def read() -> None:
            assert process.stdout is not None
            with process.stdout:
                running.lines.extend(iter(process.stdout.readline, ""))

        threading.Thread(target=read, daemon=True).start()
        return running


def new_user() -> User:
    folder = Path(tempfile.mkdtemp(prefix="bdense-e2e-"))
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "OPTUNA_", "BDENSE_"))
    }
    return User(home=folder / "home", environment=environment | {"BDENSE_HOME": str(folder / "home")})


def farewell(user: User) -> None:
    if (user.home / "postgres").exists():
        server.stop(user.home)
    shutil.rmtree(user.home.parent)


@pytest.fixture(scope="session")
def ray_environment() -> Iterator[dict[str, str]]:
    """A Ray cluster of one node that is there already, as on a user's cluster, behind a token."""
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = os.environ | access
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "start", "--head", "--port=0", "--num-cpus=2", "--include-dashboard=false", "--block"]
    # In a session of its own, which is ended at the end: `ray stop` would end all Ray of this machine.
    head = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert head.stdout is not None
    address = next((found[1] for line in head.stdout if (found := re.search(r"--address='([^']+)'", line))), None)
    assert address, "Ray did not start"
    reader = threading.Thread(target=head.stdout.read, daemon=True)
    reader.start()
    yield access | {"RAY_ADDRESS": address}
    head.terminate()
    head.wait(PATIENCE_S)
    reader.join(PATIENCE_S)
    head.stdout.close()


@pytest.fixture(scope="session")
def user(ray_environment: dict[str, str]) -> Iterator[User]:
    """One home and one Ray for the whole run. Tests name their own studies."""
    someone = new_user()
    someone.environment |= ray_environment
    yield someone
    farewell(someone)


@pytest.fixture
def newcomer() -> Iterator[User]:
    """A home that does not exist yet, and no Ray."""
    someone = new_user()
    yield someone
    farewell(someone)


@pytest.fixture(scope="module")
def new_user_of_module() -> Iterator[User]:
    """A home for the tests of one file, and no Ray."""
    someone = new_user()
    yield someone
    farewell(someone)


@pytest.fixture(scope="session")
def finished(user: User) -> subprocess.CompletedProcess[str]:
    """The launch of a small study called `finished`, for the tests that only look at one."""
    return user.launch(
        str(studies_folder() / "synthetic.yaml"), "--study", "finished", "--trials", "2", "--no-dashboard",
        "--set", "seeds.control_repeats=2", "--set", "method.seconds=0", "--format", "json",
    )  # fmt: skip
