"""A database behind a password: where the password is not to be found, during a launch and after it."""

import asyncio
import contextlib
import os
import re
import secrets
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from search.server import programs
from search.study_file import studies_folder
from tests.e2e.conftest import WEIGHTS, Running, User
from tests.tcp_postgres import Postgres, listening

pytestmark = pytest.mark.e2e

STUDY = (
    str(studies_folder() / "synthetic.yaml"), "--trials", "2", "--set", "seeds.control_repeats=1",
    "--set", "method.seconds=0.5", "--set", "space={family: slope}",
)  # fmt: skip
SSL_REQUEST = bytes.fromhex("00000008 04d2162f")
"""How a client of PostgreSQL asks for encryption, before anything else."""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with listening(programs()) as server:
        yield server


@pytest.fixture
def encrypted(postgres: Postgres, tmp_path: Path) -> Iterator[int]:
    """A port where the same database answers by TLS alone, as behind a proxy: the wheel's server is built without."""
    key, certificate = tmp_path / "server.key", tmp_path / "server.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-keyout", str(key), "-out", str(certificate)], capture_output=True, check=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def answer(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        if await client.readexactly(len(SSL_REQUEST)) != SSL_REQUEST:
            to_client.close()
            return
        to_client.write(b"S")
        await to_client.start_tls(context)
        server, to_server = await asyncio.open_connection("127.0.0.1", postgres.port)
        await asyncio.gather(_carry(client, to_server), _carry(server, to_client))

    loop = asyncio.new_event_loop()
    proxy = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield proxy.sockets[0].getsockname()[1]
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    proxy.close()
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


async def _carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while content := await source.read(65536):
            target.write(content)
            await target.drain()
        target.close()


@dataclass
class Watch:
    """Looks for a secret in all that a launch shows while it runs: processes, environments, files."""

    launch: Running
    home: Path
    secret: bytes
    needs_it: bytes
    """A word in the command line of who else must know the secret."""
    found: set[str] = field(default_factory=set)
    sessions: set[Path] = field(default_factory=set)
    """Ray's folders of this launch."""
    looked_at: set[str] = field(default_factory=set)
    _is_hidden: bool = False

    def until_end(self) -> int:
        looking = threading.Thread(target=self._look_until_end)
        looking.start()
        code = self.launch.wait()
        looking.join()
        self._look()
        self._search("the output", "".join(self.launch.lines).encode())
        return code

    def _look_until_end(self) -> None:
        while self.launch.process.poll() is None:
            self._look()
            time.sleep(0.05)

    def _look(self) -> None:
        pid = self.launch.process.pid
        for process in psutil.pids():
            if process != pid:
                self._search("a command line", _read(Path(f"/proc/{process}/cmdline")))
        # The command as it was typed is in the process list until it has replaced itself; never again after that.
        line = _read(Path(f"/proc/{pid}/cmdline"))
        if self._is_hidden:
            self._search("the launcher's command line", line)
        self._is_hidden = self._is_hidden or (bool(line) and self.secret not in line)
        for process in _descendants(pid):  # the launcher's own environment has it: it must know it
            command = _read(Path(f"/proc/{process.pid}/cmdline"))
            if command == line or self.needs_it in command:
                continue  # forked just now, and still the launcher
            self._search(f"the environment of {command.decode()}", _read(Path(f"/proc/{process.pid}/environ")))
            session = re.search(r"/tmp/ray/session_[^/\s\0]+", command.decode())
            self.sessions |= {Path(session[0])} if session else set()
        for folder in (self.home, *self.sessions):
            for parent, _, names in os.walk(folder):  # unlike rglob it stands a folder that goes while it looks
                for path in (Path(parent, name) for name in names):
                    if path.is_file():
                        self._search(f"the file {path}", _read(path))

    def _search(self, place: str, content: bytes) -> None:
        self.looked_at.add(place)
        if self.secret in content:
            self.found.add(place)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return [process for process in psutil.Process(pid).children(recursive=True) if process.is_running()]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize(
    ("given", "needs_it"),
    [("in the URL", b"nobody else"), ("in PGPASSWORD", b"search.dashboard")],  # what a dashboard's libpq reads, too
)
def test_a_password_is_nowhere_but_with_who_needs_it(newcomer: User, postgres, given, needs_it) -> None:
    if given == "in PGPASSWORD":
        newcomer.environment["PGPASSWORD"] = postgres.password
    url = postgres.url(postgres.password if given == "in the URL" else None)
    name = f"secret-{given[-3:].lower()}"
    launch = newcomer.start_launch(*STUDY, "--study", name, "--storage", url)
    watch = Watch(launch, newcomer.home, postgres.password.encode(), needs_it)
    assert watch.until_end() == 0, launch.lines
    assert watch.sessions and any("/raylet" in place for place in watch.looked_at)
    assert any("dashboard: http" in line for line in launch.lines)
    assert not watch.found
    study = ("--study", name, "--storage", postgres.url(postgres.password))
    told = [
        newcomer.weights(command, *study, *form) for command, form in (("show", ("--format", "json")), ("export", ()))
    ]
    assert all(done.returncode == 0 and postgres.password not in done.stdout + done.stderr for done in told)
    (export,) = [line for line in launch.lines if "export the best weights: " in line]
    hint = f"# with OPTUNA_STORAGE set to {postgres.url('***')}"
    assert (hint in export) == (given == "in the URL") and (f"--storage {url}" in export) != (hint in export)
    rows = list(postgres.rows())
    assert len(rows) > 20
    assert not [row for row in rows if postgres.password in row]


def test_a_dashboard_shows_no_password(newcomer: User, postgres) -> None:
    newcomer.environment["OPTUNA_STORAGE"] = postgres.url(postgres.password)
    dashboard = newcomer.start(str(WEIGHTS), "dashboard", "--port", "0")
    dashboard.wait_for(lambda lines: any("http://" in line for line in lines))
    found = re.search(r"http://\S+", "".join(dashboard.lines))
    assert found
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{found[0]}api/studies") as answer:
        content = answer.read().decode()
    dashboard.interrupt()
    dashboard.wait()
    assert "stud" in content and postgres.password not in content + "".join(dashboard.lines)


def test_a_command_that_runs_on_hides_the_password_that_was_typed(newcomer: User, postgres) -> None:
    for option in (("--storage", postgres.url(postgres.password)), (f"--storage={postgres.url(postgres.password)}",)):
        dashboard = newcomer.start(str(WEIGHTS), "dashboard", "--port", "0", *option)
        dashboard.wait_for(lambda lines: any("http://" in line for line in lines))
        line = _read(Path(f"/proc/{dashboard.process.pid}/cmdline"))
        dashboard.interrupt()
        dashboard.wait()
        assert b"--port" in line and postgres.password.encode() not in line


def test_an_interrupted_launch_says_which_database_its_hidden_password_led_to(newcomer: User, postgres) -> None:
    command = (*STUDY, "--study", "interrupted", "--no-dashboard", "--trials", "50", "--set", "pruner.kind=none")
    launch = newcomer.start_launch(*command, "--storage", postgres.url(postgres.password))
    launch.wait_for(lambda lines: any(" COMPLETE " in line for line in lines))
    launch.interrupt()
    assert launch.wait() == 130, launch.lines
    (again,) = [line for line in launch.lines if "Resume with: " in line]
    assert f"# with OPTUNA_STORAGE set to {postgres.url('***')}" in again and "--storage" not in again


def test_a_password_file_and_a_required_encryption_work(newcomer: User, postgres, encrypted, tmp_path: Path) -> None:
    passfile = tmp_path / "pgpass"
    passfile.touch(mode=0o600)
    passfile.write_text(f"127.0.0.1:{encrypted}:*:searcher:{postgres.password}\n")
    url = f"postgresql://searcher@127.0.0.1:{encrypted}/postgres"
    command = (*STUDY, "--study", "passfile", "--no-dashboard", "--storage")
    done = newcomer.launch(*command, f"{url}?sslmode=require", PGPASSFILE=str(passfile))
    assert done.returncode == 0, done.stderr
    assert postgres.password not in done.stdout + done.stderr
    bare = newcomer.launch(*command, f"{url}?sslmode=disable", PGPASSFILE=str(passfile))
    assert bare.returncode == 1 and not bare.stdout
    assert len(bare.stderr.splitlines()) == 1


def test_a_wrong_password_is_one_line_that_does_not_show_it(newcomer: User, postgres) -> None:
    wrong = secrets.token_hex(12)
    done = newcomer.launch(*STUDY, "--study", "wrong", "--no-dashboard", "--storage", postgres.url(wrong))
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert "password authentication failed" in line
    assert wrong not in line and postgres.password not in line
