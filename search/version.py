"""Which code produced a result."""

import hashlib
import os
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import bdense_core

PACKAGES = ("torch", "numpy", "optuna", "optuna-dashboard", "sqlalchemy", "psycopg2-binary", "ray", "clean-fid")


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


def _git(root: Path, *arguments: str) -> str:
    needed = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}  # no password
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, env=needed, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
