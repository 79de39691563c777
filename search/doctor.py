"""What a machine has, and what is wrong with it."""

import importlib
import shutil
from collections.abc import Callable
from typing import Any

from bdense_core import assets
from bdense_core.errors import BDenseError
from bdense_core.integrity import check_cache, check_file
from search.settings import Settings, mask
from search.version import code_version, package_version, packages


def examine(settings: Settings) -> dict[str, Any]:
    """All findings, JSON-able; `problems` holds one line for each thing that is wrong."""
    problems: list[str] = []
    url = _try(problems, lambda: _storage(settings))
    _try(problems, lambda: _files(settings))
    return {
        "storage_url": mask(url or settings.storage or "embedded"),
        "storage_ok": url is not None,
        "home": str(settings.home),
        "disk_free_gb": round(shutil.disk_usage(_existing(settings)).free / 1e9, 1),
        "ray": _ray(problems),
        "gpus": _gpus(problems),
        "fid": _clean_fid(settings),
        "models": _models(settings),
        "versions": packages() | {"bdense-search": code_version()},
        "problems": problems,
    }


def _try(problems: list[str], action: Callable[[], Any]) -> Any:
    try:
        return action()
    except BDenseError as error:
        problems.append(str(error))
        return None


def _storage(settings: Settings) -> str:
    from search.database import Database
    from search.launch import storage_url

    url = storage_url(settings)
    Database(url).close()
    return url


def _files(settings: Settings) -> None:
    for name in assets.names():
        check_file(assets.hashed(name))
    check_cache(settings.cache)


def _ray(problems: list[str]) -> dict[str, Any]:
    try:
        importlib.import_module("ray.tune")
    except ImportError as error:
        problems.append(f"ray does not import: {error}; reinstall ray[tune]")
        return {"ok": False, "version": package_version("ray")}
    return {"ok": True, "version": package_version("ray")}


def _gpus(problems: list[str]) -> list[str]:
    try:
        import torch
    except ImportError as error:
        problems.append(f"torch does not import: {error}; reinstall torch")
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _clean_fid(settings: Settings) -> str:
    """Whether FID on Inception features would work; the digits study does not need it."""
    try:
        importlib.import_module("cleanfid.inception_torchscript")
    except Exception as error:  # noqa: BLE001  (a torch that does not fit fails in its own ways)
        return f"not usable: {str(error).splitlines()[0]}; reinstall clean-fid and the torch it stands beside"
    if not (settings.models / "inception" / "features.pt").is_file():
        return "usable once Inception is here: bdense-weights fetch-teacher cifar10 brings it"
    return "usable"


def _models(settings: Settings) -> dict[str, list[str]]:
    """What has been fetched, imported or trained on this machine, by name."""
    folders = sorted(folder for folder in settings.models.glob("*") if folder.is_dir())
    return {
        folder.name: sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".pt"))
        for folder in folders
    }


def _existing(settings: Settings) -> str:
    folder = settings.home
    while not folder.exists():
        folder = folder.parent
    return str(folder)
