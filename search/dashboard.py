"""optuna-dashboard beside a launch: a child process on loopback that ends with its parent.

The storage URL comes through standard input, never through the command line, which every user of the
machine can read.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from search.errors import StorageError

HOST, PORT = "127.0.0.1", 8080


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request."""


def free_port(host: str, preferred: int) -> int:
    """The preferred port if nobody listens there, else one that the system chooses."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            number: int = probe.getsockname()[1]
            return number
    raise StorageError(f"no port is free on {host} for the dashboard; give --no-dashboard")


@contextlib.contextmanager
def running(url: str, *, host: str = HOST, port: int = PORT) -> Iterator[str]:
    """The dashboard's address, while the block runs."""
    chosen = free_port(host, port)
    child = subprocess.Popen(
        [sys.executable, "-m", "search.dashboard", host, str(chosen)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != "OPTUNA_STORAGE"},
        text=True,
        start_new_session=True,
    )
    assert child.stdin is not None
    child.stdin.write(url + "\n")
    child.stdin.flush()
    try:
        yield f"http://{host}:{chosen}/"
    finally:
        child.terminate()
        child.wait()
        child.stdin.close()


def serve(url: str, host: str, port: int, *, say: Callable[[str], object] = lambda address: None) -> None:
    """Serve until interrupted; `say` is told the address once it answers.

    Raises:
        StorageError: the port is taken.
    """
    import optuna_dashboard
    from optuna.storages import RDBStorage

    application = optuna_dashboard.wsgi(RDBStorage(url))
    try:
        server = make_server(host, port, application, server_class=_Server, handler_class=_Quiet)
    except OSError as error:
        raise StorageError(
            f"cannot listen on {host}:{port}: {error.strerror}; a launch "
            "brings a dashboard of its own there; look at it, or choose another --port"
        ) from error
    say(f"http://{host}:{server.server_port}/")
    server.serve_forever()


def _main() -> None:
    url = sys.stdin.readline().strip()

    def end_with_parent() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    serve(url, sys.argv[1], int(sys.argv[2]))


if __name__ == "__main__":
    _main()
