"""A PostgreSQL on TCP that asks for a password, as on a cluster."""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg2
from psycopg2 import sql

from tests.patience import PATIENCE_S

NOBODY = 65534


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL on TCP that lets in by password alone."""

    port: int
    password: str

    def url(self, password: str | None = None) -> str:
        secret = f":{password}" if password else ""
        return f"postgresql://searcher{secret}@127.0.0.1:{self.port}/postgres"

    def rows(self) -> Iterator[str]:
        """Every row of every table as text."""
        connection = psycopg2.connect(self.url(self.password))
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
                for (table,) in cursor.fetchall():
                    cursor.execute(sql.SQL("SELECT t::text FROM {} t").format(sql.Identifier(table)))
                    yield from (row for (row,) in cursor.fetchall())
        finally:
            connection.close()


@contextmanager
def listening(programs: Path) -> Iterator[Postgres]:
    """A new server of the programs in a folder, on loopback. It refuses to run as root, so it runs as nobody then."""
    folder = Path(tempfile.mkdtemp(prefix="bd-pg-", dir="/tmp"))
    data, password = folder / "data", secrets.token_hex(12)
    other = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    bare = folder / "password"
    bare.write_text(password)
    if other:
        os.chown(folder, NOBODY, NOBODY)
        os.chown(bare, NOBODY, NOBODY)
    environment = {"LC_ALL": "C", "PATH": os.environ["PATH"]}
    subprocess.run(
        [str(programs / "initdb"), "-D", str(data), "-A", "scram-sha-256", "-U", "searcher", "-N", f"--pwfile={bare}"],
        **other, cwd=folder, env=environment, capture_output=True, check=True,
    )  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-c", "listen_addresses=127.0.0.1",
         "-c", "unix_socket_directories="],
        **other, cwd=folder, env={"LC_ALL": "C"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    pid_file = data / "postmaster.pid"
    deadline = time.monotonic() + PATIENCE_S
    while not (pid_file.exists() and "ready" in pid_file.read_text()):
        assert server.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    try:
        yield Postgres(port, password)
    finally:
        server.terminate()
        server.wait(PATIENCE_S)
        shutil.rmtree(folder)
