"""Published data sets, fetched once and kept as one npz file each (`datasets.fetched_file`)."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from bdense_core.files import sha256_of_file, write_atomically
from search.datasets import Published, fetched_file
from search.download import Progress, download
from search.errors import FetchError
from search.fetch import alone_in

__all__ = ["fetch_training_set", "write_npz"]


def fetch_training_set(
    wanted: Published,
    models: Path,
    *,
    say: Callable[[str], None],
    source: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Get the training set of a published data set; one that is here stays.

    Args:
        models: the folder of all fetched files.
        say: told each thing that is done, one line each.
        source: the archive, or a folder with it, on this machine, instead of fetching it.

    Returns:
        the npz file; the archive is not kept.

    Raises:
        FetchError: the archive cannot be got, or is another than known.
    """
    target = fetched_file(wanted.name, models)
    with alone_in(models):
        if target.is_file():
            say(f"{target} is here; delete it to make it anew")
            return target
        archive = target.with_name(wanted.archive)
        if source is not None:
            found = source / wanted.archive if source.is_dir() else source
            say(f"reading {found}")
            _accept(wanted, _sha256(found))
            _convert(wanted, found, target)
            return target
        if not archive.is_file() or sha256_of_file(archive) != wanted.sha256:  # else an earlier run ended after it came
            say(f"fetching {wanted.url}")
            download(wanted.url, archive, accept=lambda digest: _accept(wanted, digest), progress=progress)
        _convert(wanted, archive, target)
        archive.unlink()
    return target


def write_npz(images: np.ndarray, labels: np.ndarray, target: Path) -> None:
    """Write what `bdense_core.data.load` reads, whole or not at all.

    Args:
        images: uint8, [N, H, W, C].
        labels: whole numbers from 0, [N].

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, numpy would add .npz to it
            np.savez(file, images=images, labels=labels)

    write_atomically(target, write)


def _accept(wanted: Published, digest: str) -> None:
    if digest != wanted.sha256:
        raise FetchError(
            f"{wanted.archive} has sha256 {digest}, expected {wanted.sha256}; it is not used. Fetch it again from "
            f"{wanted.url}: this one is damaged or another file"
        )


def _sha256(archive: Path) -> str:
    try:
        return sha256_of_file(archive)
    except OSError as error:
        raise FetchError(
            f"--from names {archive}, which cannot be read ({error.strerror or error}); give the archive, or its folder"
        ) from error


def _unpack(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = archive.extractfile(member)
    assert content is not None, "a plain file has content"
    with content, (folder / PurePosixPath(member.name).name).open("wb") as file:
        shutil.copyfileobj(content, file)


def _convert(wanted: Published, archive: Path, target: Path) -> None:
    """Make the npz of an archive that is known to be the right one."""
    from bdense_core.data import load_bytes

    unpacked = target.with_name("unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)  # of a run that was killed
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                # Plain files of that folder alone, by their last name: nothing lands anywhere else.
                if member.isfile() and PurePosixPath(member.name).parts[:-1] == (wanted.folder,):
                    _unpack(opened, member, unpacked / wanted.folder)
        images, labels = load_bytes(str(unpacked / wanted.folder))
        write_npz(images.permute(0, 2, 3, 1).numpy(), labels.numpy(), target)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
