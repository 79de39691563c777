"""What Ray reads from the environment when it is imported; so this comes before `search.placement`."""

import os
import secrets

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # A restart reads the database, never Tune's own checkpoint.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
}


def prepare(ray_address: str | None) -> None:
    """Set Ray's environment. A local Ray listens on every interface: a fresh token keeps everybody else out."""
    os.environ.update(_SETTINGS)
    if ray_address is None:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        os.environ.pop("RAY_ADDRESS", None)
