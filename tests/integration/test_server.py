"""The embedded PostgreSQL, for real: every test starts its own server and ends it."""

import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import psycopg2
import pytest
import sqlalchemy

from search import postmaster, server
from search.errors import ServerError
from search.settings import normalise_url
from tests.patience import PATIENCE_S

REPOSITORY = Path(__file__).parents[2]
AS_ROOT = sys.platform != "win32" and os.geteuid() == 0
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals, sockets and modes")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short, empty folder. Pytest's own is closed to root's server user by every new pytest session."""
    path = Path(tempfile.mkdtemp(prefix="bdense-")).resolve()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def home(folder: Path) -> Iterator[Path]:
    path = folder / "home"
    yield path
    server.stop(path)


def connect(url: str) -> psycopg2.extensions.connection:
    return psycopg2.connect(url.replace("+psycopg2", "", 1))


def query(url: str, statement: str) -> list[tuple[object, ...]]:
    with closing(connect(url)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


def in_another_process(code: str, home: Path) -> subprocess.Popen[str]:
    program = f"import sys, pathlib; from search import server; home = pathlib.Path(sys.argv[1]); {code}"
    return subprocess.Popen(
        [sys.executable, "-c", program, str(home)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    return text.strip()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def pid_of(home: Path) -> int:
    pid = server.status(home).pid
    assert pid is not None
    return pid


def kill_9(pid: int) -> None:
    process = psutil.Process(pid)
    process.kill()
    process.wait(PATIENCE_S)


def num_starts(home: Path) -> int:
    return server.status(home).log_path.read_text().count("starting PostgreSQL")


def test_the_server_outlives_its_launcher_and_other_processes_find_it(home):
    assert server.find(home) is None
    url = output(in_another_process("print(server.ensure_running(home))", home))
    assert server.find(home) == url
    assert server.ensure_running(home) == url
    assert output(in_another_process("print(server.find(home))", home)) == url
    assert num_starts(home) == 1
    assert query(url, "SELECT current_database()") == [("bdense",)]


def test_find_and_status_of_a_home_that_does_not_exist_create_nothing(folder):
    assert server.find(folder / "none") is None
    assert server.stop(folder / "none") is False
    seen = server.status(folder / "none")
    assert (seen.running, seen.url, seen.version, seen.pid) == (False, None, None, None)
    assert list(folder.iterdir()) == []


def test_status_tells_the_running_version_and_stop_ends_it_under_its_clients(home):
    url = server.ensure_running(home)
    seen = server.status(home)
    assert (seen.running, seen.url, seen.problem) == (True, url, None)
    assert seen.version is not None
    assert seen.version.startswith(f"{postmaster.MAJOR_VERSION}.")
    assert psutil.pid_exists(pid_of(home))
    with closing(connect(url)) as client, client.cursor() as cursor:
        assert server.stop(home) is True
        with pytest.raises(psycopg2.OperationalError):
            cursor.execute("SELECT 1")
    assert server.find(home) is None
    assert server.status(home).version == str(postmaster.MAJOR_VERSION)
    assert server.stop(home) is False


def test_two_launchers_on_a_fresh_folder_get_one_server(home):
    launchers = [in_another_process("print(server.ensure_running(home))", home) for _ in range(2)]
    urls = {output(launcher) for launcher in launchers}
    assert urls == {server.find(home)}
    assert num_starts(home) == 1


@posix_only
def test_committed_rows_survive_kill_9_of_the_postmaster(home):
    url = server.ensure_running(home)
    query(url, "CREATE TABLE kept (x int)")
    query(url, "INSERT INTO kept VALUES (17)")
    with closing(connect(url)) as client, client.cursor() as cursor:  # its backend outlives the postmaster
        cursor.execute("INSERT INTO kept VALUES (18)")  # never committed
        kill_9(pid_of(home))
        assert (server.status(home).data_folder / "postmaster.pid").exists()
        url = server.ensure_running(home)
    assert query(url, "SELECT x FROM kept") == [(17,)]


@posix_only
def test_a_pid_file_that_names_an_unrelated_process_is_not_believed(home):
    server.ensure_running(home)
    data = server.status(home).data_folder
    pid = pid_of(home)
    locks = [data / "postmaster.pid", data / ".s.PGSQL.5432.lock"]
    left = [lock.read_text() for lock in locks]
    kill_9(pid)
    # PostgreSQL only fears a process of its own user
    owner = data.stat().st_uid
    other = subprocess.Popen(["sleep", "600"], user=owner if AS_ROOT else None)
    try:
        for lock, text in zip(locks, left, strict=True):
            lock.write_text(text.replace(str(pid), str(other.pid), 1))
        assert server.find(home) is None
        assert server.status(home).pid is None
        assert server.stop(home) is False
        url = server.ensure_running(home)
        assert query(url, "SELECT 1") == [(1,)]
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_an_empty_pid_file_of_a_crash_is_not_believed(home):
    server.ensure_running(home)
    data = server.status(home).data_folder
    server.stop(home)
    (data / "postmaster.pid").write_text("")
    assert query(server.ensure_running(home), "SELECT 1") == [(1,)]


@posix_only
def test_a_server_that_is_shutting_down_is_waited_for(home):
    first = server.ensure_running(home)
    pid = pid_of(home)
    found: list[str] = []
    with closing(connect(first)):
        os.kill(pid, signal.SIGTERM)  # a smart shutdown: it ends when the last client has left
        wait_until(lambda: server.find(home) is None)
        assert "shutting down" in str(server.status(home).problem)
        launcher = threading.Thread(target=lambda: found.append(server.ensure_running(home)))
        launcher.start()
        assert pid_of(home) == pid
    launcher.join(timeout=PATIENCE_S)
    assert found == [server.find(home)]
    assert pid_of(home) != pid


@posix_only
def test_a_server_whose_socket_was_deleted_is_reachable_again(home):
    server.ensure_running(home)
    (server.status(home).data_folder / ".s.PGSQL.5432").unlink()
    assert server.find(home) is None
    assert query(server.ensure_running(home), "SELECT 1") == [(1,)]


@posix_only
def test_a_home_renamed_under_a_running_server_keeps_its_rows(folder, home):
    query(server.ensure_running(folder / "old"), "CREATE TABLE kept AS SELECT 17 AS x")
    (folder / "old").rename(home)
    assert query(server.ensure_running(home), "SELECT x FROM kept") == [(17,)]
    assert server.stop(folder / "old") is False


def test_half_a_data_folder_from_an_interrupted_start_is_made_anew(home):
    (home / "postgres" / "data.new").mkdir(parents=True)
    (home / "postgres" / "data.new" / "PG_VERSION").write_text("18\n")
    assert query(server.ensure_running(home), "SELECT 1") == [(1,)]
    assert not (home / "postgres" / "data.new").exists()


@posix_only
@pytest.mark.parametrize("name", ["Application Support", "données $HOME `x` \"q\" 'r'", "100%"])
def test_a_path_with_characters_that_mean_something_elsewhere_works(folder, name):
    home = folder / name
    try:
        url = server.ensure_running(home)
        assert normalise_url(url) == url
        engine = sqlalchemy.create_engine(url)
        with engine.connect() as connection:
            shown = connection.execute(sqlalchemy.text("SHOW data_directory")).scalar_one()
        engine.dispose()
        assert Path(shown) == home / "postgres" / "data"
    finally:
        server.stop(home)


@posix_only
@pytest.mark.parametrize("name", ["x" * 120, "with,comma"])
def test_a_path_unfit_for_a_socket_gets_a_private_folder_that_stop_removes(folder, name):
    home = folder / name
    try:
        url = server.ensure_running(home)
        socket_folder = Path(str(sqlalchemy.make_url(url).query["host"]))
        assert not socket_folder.is_relative_to(home)
        now = socket_folder.stat()
        assert stat.S_IMODE(now.st_mode) == 0o700
        assert now.st_uid == server.status(home).data_folder.stat().st_uid
        assert query(url, "SELECT 1") == [(1,)]
        socket_folder.chmod(0o777)  # now anybody could have put a socket there
        assert server.find(home) is None
        socket_folder.chmod(0o700)
        assert server.find(home) == url
    finally:
        server.stop(home)
    assert not socket_folder.exists()


@posix_only
def test_nobody_else_can_list_the_folders_or_use_the_socket(home):
    url = server.ensure_running(home)
    data = server.status(home).data_folder
    assert home.stat().st_mode & 0o067 == 0  # as root the server's own group may pass through, no more
    for private in (data.parent, data, data / ".s.PGSQL.5432"):
        assert private.stat().st_mode & 0o077 == 0
    assert query(url, "SHOW listen_addresses") == [("",)]
    assert query(url, "SHOW fsync") == [("on",)]


@pytest.mark.skipif(not AS_ROOT, reason="only root can act as another user")
def test_another_operating_system_user_cannot_connect(home):
    import pwd  # POSIX only

    server.ensure_running(home)
    socket_path = str(server.status(home).data_folder / ".s.PGSQL.5432")
    # A fork, because the interpreter itself may lie where the other user cannot read.
    assert _errno_of_connecting(socket_path, uid=None) == 0
    assert _errno_of_connecting(socket_path, uid=pwd.getpwnam("nobody").pw_uid) == errno.EACCES


def _errno_of_connecting(path: str, *, uid: int | None) -> int:
    """The error number of a connection to a socket by a user, 0 if it is accepted."""
    child = os.fork()
    if child == 0:
        try:
            if uid is not None:
                os.setgroups([])
                os.setuid(uid)
            socket.socket(socket.AF_UNIX).connect(path)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 255)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_local_port_asks_for_the_password_and_the_url_does_not_hold_it(home, monkeypatch):
    monkeypatch.setattr(postmaster, "_LISTENS_ON_TCP", True)  # what Windows does
    url = server.ensure_running(home)
    password = (home / "postgres" / "pgpass").read_text().strip().rpartition(":")[2]
    assert len(password) > 30
    assert password not in url
    assert sorted(p.name for p in (home / "postgres").glob("pgpass*")) == ["pgpass"]
    assert normalise_url(url) == url
    engine = sqlalchemy.create_engine(url)
    with engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("SHOW listen_addresses")).scalar_one() == "127.0.0.1"
    engine.dispose()
    with pytest.raises(psycopg2.OperationalError, match="no password supplied"):
        connect(url.partition("?")[0] + "?passfile=/none")


def test_data_of_another_major_version_is_left_alone_and_named(home):
    data = home / "postgres" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("16\n")
    with pytest.raises(ServerError, match=r"made by PostgreSQL 16.*brings PostgreSQL 18"):
        server.ensure_running(home)
    assert [p.name for p in data.iterdir()] == ["PG_VERSION"]


def test_files_that_are_no_database_are_left_alone(home):
    data = home / "postgres" / "data"
    data.mkdir(parents=True)
    (data / "thesis.tex").write_text("x")
    with pytest.raises(ServerError, match="no PostgreSQL database"):
        server.ensure_running(home)
    assert (data / "thesis.tex").read_text() == "x"


def test_a_home_that_cannot_be_used_is_one_error_that_names_it(folder):
    (folder / "file").write_text("")
    with pytest.raises(ServerError, match=r"cannot use .*file.*set BDENSE_HOME"):
        server.ensure_running(folder / "file" / "home")


def test_a_server_that_refuses_to_start_shows_its_own_last_words(home):
    server.ensure_running(home)
    server.stop(home)
    with (server.status(home).data_folder / "postgresql.conf").open("a") as config:
        config.write("\nno_such_setting = 1\n")
    with pytest.raises(ServerError, match=r'(?s)server\.log.*unrecognized configuration parameter "no_such_setting"'):
        server.ensure_running(home)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="boot ids are Linux's")
def test_a_server_of_another_machine_on_the_same_folder_is_not_started_twice(home):
    server.ensure_running(home)
    data = server.status(home).data_folder
    left = (data / "postmaster.pid").read_text()
    server.stop(home)
    (data.parent / "host").write_text("login-node-7\nanother-boot\n")
    (data / "postmaster.pid").write_text(left)
    with pytest.raises(ServerError, match="'login-node-7' and was not shut down"):
        server.ensure_running(home)
    assert (data / "postmaster.pid").read_text() == left
    (data / "postmaster.pid").unlink()
    assert query(server.ensure_running(home), "SELECT 1") == [(1,)]


def test_the_environment_of_another_postgres_does_not_matter(home, monkeypatch):
    for name, value in {"PGPORT": "6543", "PGDATA": "/none", "LC_ALL": "xx_XX", "LANG": "yy"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PGHOST", "db.invalid")
    url = server.ensure_running(home)
    assert query(url, "SELECT 1") == [(1,)]
    assert sqlalchemy.make_url(url).query["port"] == "5432"


def test_each_test_gets_an_empty_database_of_its_own(database_url, postgres_url):
    assert query(database_url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]
    assert query(database_url, "SELECT current_database()") != query(postgres_url, "SELECT current_database()")
