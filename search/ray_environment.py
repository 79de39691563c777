"""What Ray reads from the environment when it is imported; so this comes before `search.placement`."""

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator

from search.errors import ClusterError

_JOIN_TIMEOUT_S = 20

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # The service alone says how many trials wait for a place; a worker that does not stop is killed.
    "TUNE_MAX_PENDING_TRIALS_PG": "1000000",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "30",
    # A restart reads the database, never Tune's own checkpoint.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
}


_TOKEN = secrets.token_hex(32)
"""Ray reads its token once in a process, which may start one local Ray after the other."""


def prepare(ray_address: str | None) -> None:
    """Set Ray's environment. A local Ray listens on every interface: a fresh token keeps everybody else out."""
    os.environ.update(_SETTINGS)
    os.environ.pop("OPTUNA_STORAGE", None)  # read already; no child of Ray's needs the database
    if ray_address is None:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=_TOKEN)
        os.environ.pop("RAY_ADDRESS", None)


@contextlib.contextmanager
def without_password() -> Iterator[None]:
    """While Ray's processes are started, which inherit our environment, libpq's password is not in it."""
    password = os.environ.pop("PGPASSWORD", None)
    try:
        yield
    finally:
        if password is not None:
            os.environ["PGPASSWORD"] = password


def check_reachable(address: str | None) -> None:
    """Ask the cluster's socket before anything is made; Ray itself retries an unreachable address for long.

    Raises:
        ClusterError: nobody listens there, or it is no address.
    """
    if address is None or address in ("auto", "local"):
        return
    if "://" in address:  # such as Ray's client: Ray Tune would run over there, without the database
        raise ClusterError(
            f"{address} is no address that a launch can join: give the HOST:PORT of the cluster's head node, such as "
            "10.0.0.5:6379 (6379 unless it was started with another --port), or auto on a machine of the cluster"
        )
    host, _, port = address.rpartition(":")
    try:
        if not host or not port.isdigit():
            raise OSError("an address is HOST:PORT, for example 10.0.0.5:6379")
        socket.create_connection((host, int(port)), timeout=_JOIN_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}: {error}; check --ray-address, or leave it out for a local Ray"
        ) from error
