"""Which code produced a result."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

import bdense_core

NUMERIC = ("torch", "numpy", "scipy", "safetensors", "scikit-learn", "pillow", "clean-fid")
"""Packages that a result may depend on, if only in its last digits."""
PACKAGES = (*NUMERIC, "ray", "optuna", "optuna-dashboard", "sqlalchemy", "psycopg2-binary")
_CODE = "bdense-search"


@cache
def code_version() -> str:
    """The package's version; in a git checkout with its commit, and `.dirty` if files were changed since."""
    version = package_version("bdense-search")
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return version
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{version}+g{commit}{'.dirty' if dirty else ''}" if commit else version


@cache
def source_fingerprint() -> str:
    """What tells this package's code from any other: 16 hex digits over every Python file of both packages.

    Unlike `code_version` it sees changes that were never committed, and needs no git.
    """
    digest = hashlib.sha256()
    for package in (Path(bdense_core.__file__).parent, Path(__file__).parent):
        for path in sorted(package.rglob("*.py"), key=Path.as_posix):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{package.name}/{path.relative_to(package).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16]


@cache
def versions() -> dict[str, str]:
    """What this process runs: Python, the packages that results depend on, and this package's source."""
    return version_reader()()


def version_reader() -> Callable[[], dict[str, str]]:
    """What `versions` calls. A nested function travels by value, so it reaches nodes that do not have this package."""
    packages, code = (*NUMERIC, "ray"), _CODE  # Ray hands trials over

    def read() -> dict[str, str]:
        import platform
        from importlib import metadata

        found = {"python": platform.python_version()}
        for name in packages:
            try:
                found[name] = metadata.version(name).partition("+")[0]  # +cpu and +cu128 are one release
            except metadata.PackageNotFoundError:
                found[name] = "missing"
        try:
            from search.version import source_fingerprint

            found[code] = f"source {source_fingerprint()}"
        except Exception as error:  # noqa: BLE001  # whatever an unknown installation raises is the answer
            found[code] = f"not importable: {type(error).__name__}: {error}"
        return found

    return read


def differences(theirs: dict[str, str], expected: dict[str, str], *, whose: str) -> str:
    """Which of their versions are not the expected ones, beside those of `whose`; empty if all are."""
    return ", ".join(
        f"{name} {theirs.get(name, 'missing')} ({whose} {version})"
        for name, version in expected.items()
        if theirs.get(name) != version
    )


def _git(root: Path, *arguments: str) -> str:
    needed = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}  # no password
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, env=needed, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@cache
def packages() -> dict[str, str]:
    """The versions of Python, of this package and of those that it stands on, by name."""
    return {"python": platform.python_version(), **{name: package_version(name) for name in (_CODE, *PACKAGES)}}


def package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
