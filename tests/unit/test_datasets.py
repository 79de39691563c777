"""What names of data sets mean, and how published ones come here: from an archive, or from a server on this machine."""

import hashlib
import io
import socket
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from bdense_core import data
from bdense_core.dataset_names import DATASET_NAMES
from bdense_core.errors import BadValue, BDenseError
from search import download
from search.dataset_fetch import fetch_training_set
from search.datasets import PUBLISHED, Published, fetched_file, find_dataset, published
from search.errors import FetchError, MissingFile
from tests import cifar10


def binary_files(images, labels):
    """{path: content} of the binary version: one byte for each kind of label, then the planes; ten labels or hundred.

    Args:
        images: uint8, [N, 32, 32, 3].
        labels: [N, 1], or [N, 2] with coarse and fine ones.
    """
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    records = np.concatenate([labels.astype(np.uint8), planes], axis=1)
    if labels.shape[1] == 2:
        return {"cifar-100-binary/train.bin": records.tobytes(), "cifar-100-binary/test.bin": b"other images"}
    parts = enumerate(np.split(records, 5), start=1)
    return {f"cifar-10-batches-bin/data_batch_{number}.bin": part.tobytes() for number, part in parts}


def archive_of(files):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1) as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return content.getvalue()


def published_as(name, archive) -> Published:
    """The entry of a data set whose archive is this one."""
    return replace(PUBLISHED[name], sha256=hashlib.sha256(archive).hexdigest())


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def archive(images):
    return archive_of(binary_files(images, np.arange(20)[:, None] % 10))


@pytest.fixture
def models(tmp_path):
    return tmp_path / "models"


@pytest.fixture
def nobody(monkeypatch):
    """An address at which nothing answers."""
    monkeypatch.setattr(download, "BACKOFF_S", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The address of a server, the folder of what it has, and what it was asked for."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder, asked = tmp_path / "site", []
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    site = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{site.server_address[1]}", folder, asked
    site.shutdown()
    site.server_close()
    thread.join()


def left_in(models):
    """All files that a fetch has left, but for its lock."""
    return sorted(str(path.relative_to(models)) for path in models.rglob("*") if path.is_file() and path.name[0] != ".")


# --- names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATASET_NAMES)
def test_a_shipped_name_stays_as_it_is_whatever_lies_beside_the_study(tmp_path, name):
    (tmp_path / name).mkdir()
    assert find_dataset(name, folder=tmp_path, models=tmp_path) == name


def test_a_published_one_is_found_by_its_name_once_it_was_fetched(tmp_path, models, archive, images):
    (tmp_path / "got.tar.gz").write_bytes(archive)
    made = fetch_training_set(published_as("cifar10", archive), models, say=print, source=tmp_path / "got.tar.gz")
    (tmp_path / "cifar10").mkdir()  # the name comes before the path
    found = find_dataset("cifar10", folder=tmp_path, models=models)
    assert found == str(made.resolve())
    assert np.array_equal(data.to_uint8(data.load(found)[0]).permute(0, 2, 3, 1).numpy(), images)


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_that_was_not_fetched_is_answered_with_the_command_that_does(tmp_path, models, name):
    with pytest.raises(MissingFile) as caught:
        find_dataset(name, folder=tmp_path, models=models)
    assert str(caught.value) == f"there is no data set '{name}': get it with: bdense-weights fetch-dataset {name}"


def test_a_path_is_one_beside_the_study_or_an_absolute_one(tmp_path):
    (tmp_path / "study" / "faces").mkdir(parents=True)
    faces = str((tmp_path / "study" / "faces").resolve())
    assert find_dataset("faces", folder=tmp_path / "study", models=None) == faces
    assert find_dataset(faces, folder=tmp_path, models=None) == faces
    assert find_dataset("../study/faces", folder=tmp_path / "study", models=None) == faces


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("digit", "did you mean digits?"),
        ("cifar-10", "did you mean cifar10?"),
        ("faces", "known by name are digits, digits16, cifar10, cifar100; or give a path"),
        ("", "known by name are digits, digits16, cifar10, cifar100; or give a path"),
        ("faces.npz", "study/faces.npz does not exist; correct the path"),
        ("../faces", "study/../faces does not exist; correct the path"),
    ],
)
def test_one_that_is_nowhere_is_answered_with_the_nearest_name_or_the_path(tmp_path, models, name, advice):
    (tmp_path / "study").mkdir()
    with pytest.raises(MissingFile) as caught:
        find_dataset(name, folder=tmp_path / "study", models=models)
    assert str(caught.value).startswith(f"there is no data set {name!r}: ")
    assert str(caught.value).endswith(advice)


def test_only_known_ones_can_be_fetched():
    assert published("cifar100").archive == "cifar-100-binary.tar.gz"
    with pytest.raises(BadValue, match="no data set 'cifar-10' can be fetched; did you mean cifar10"):
        published("cifar-10")
    with pytest.raises(BadValue, match="known are cifar10, cifar100"):
        published("faces")


# --- fetching -------------------------------------------------------------------------------------------


def test_a_fetched_one_is_kept_as_one_file_in_place_of_its_archive(server, models, archive, images):
    url, folder, asked = server
    (folder / "cifar-10-binary.tar.gz").write_bytes(archive)
    wanted = replace(published_as("cifar10", archive), url=f"{url}/cifar-10-binary.tar.gz")
    made = fetch_training_set(wanted, models, say=print)
    assert left_in(models) == ["cifar10/cifar10.npz"]
    assert made == fetched_file("cifar10", models)
    pixels, labels = data.load_bytes(str(made))
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), images)
    assert labels.tolist() == [k % 10 for k in range(20)]
    assert fetch_training_set(wanted, models, say=print) == made  # and nothing is asked for again
    assert len(asked) == 1


def test_fine_labels_are_those_of_cifar100(tmp_path, models, images):
    fine = np.arange(20) * 5 + 4
    archive = archive_of(binary_files(images, np.stack([fine // 5, fine], axis=1)))
    (tmp_path / "cifar-100-binary.tar.gz").write_bytes(archive)
    made = fetch_training_set(published_as("cifar100", archive), models, say=print, source=tmp_path)
    pixels, labels = data.load_bytes(str(made))
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), images)
    assert labels.tolist() == fine.tolist()


@pytest.mark.skipif(cifar10.folder() is None, reason=cifar10.MISSING)
def test_real_images_come_through_unchanged(tmp_path, models):
    """The hashes are those of CIFAR-10's test images and labels, byte by byte in the order of its python version."""
    pixels, labels = cifar10.read("test")
    archive = archive_of(binary_files(pixels, labels[:, None]))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(archive)
    made = fetch_training_set(published_as("cifar10", archive), models, say=print, source=tmp_path)
    images, classes = data.load_bytes(str(made))
    found = (images.permute(0, 2, 3, 1).contiguous().numpy(), classes.numpy().astype(np.uint8))
    assert [hashlib.sha256(array.tobytes()).hexdigest() for array in found] == [
        "4674ac8c77f372061aaf9216c8857c99599d5df0bb9f6b16a3de613ef8eb348a",
        "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    ]


def test_ones_own_archive_is_read_where_it_is_and_left_there(tmp_path, models, archive, nobody):
    own = tmp_path / "cifar-10-binary.tar.gz"
    own.write_bytes(archive)
    wanted = replace(published_as("cifar10", archive), url=f"{nobody}/cifar-10-binary.tar.gz")
    fetch_training_set(wanted, models, say=print, source=tmp_path)
    assert own.read_bytes() == archive
    assert left_in(models) == ["cifar10/cifar10.npz"]


def test_an_archive_that_had_come_before_a_run_was_killed_is_not_fetched_again(models, archive, nobody):
    target = fetched_file("cifar10", models)
    (target.parent / "unpacked" / "half").mkdir(parents=True)
    (target.parent / "cifar-10-binary.tar.gz").write_bytes(archive)
    wanted = replace(published_as("cifar10", archive), url=f"{nobody}/cifar-10-binary.tar.gz")
    fetch_training_set(wanted, models, say=print)
    assert left_in(models) == ["cifar10/cifar10.npz"]
    assert not (target.parent / "unpacked").exists()


def test_without_a_network_one_line_says_so_and_nothing_is_left(models, nobody):
    wanted = replace(PUBLISHED["cifar10"], url=f"{nobody}/cifar-10-binary.tar.gz")
    with pytest.raises(FetchError, match=r"cannot reach the server .*without internet .* --from") as caught:
        fetch_training_set(wanted, models, say=print)
    assert "\n" not in str(caught.value)
    assert left_in(models) == []


@pytest.mark.parametrize("own", [True, False])
def test_another_archive_than_the_published_one_is_refused_before_it_is_opened(server, models, archive, own):
    url, folder, _ = server
    (folder / "cifar-10-binary.tar.gz").write_bytes(archive)
    wanted = replace(PUBLISHED["cifar10"], url=f"{url}/cifar-10-binary.tar.gz")
    with pytest.raises(FetchError, match=r"sha256 .*, expected c4a38c50.*not used"):
        fetch_training_set(wanted, models, say=print, source=folder if own else None)
    assert left_in(models) == []


def test_an_archive_that_is_not_where_it_was_said_to_be_is_named(tmp_path, models):
    with pytest.raises(FetchError, match=r"cifar-10-binary\.tar\.gz, which cannot be read .*give the archive"):
        fetch_training_set(PUBLISHED["cifar10"], models, say=print, source=tmp_path)


def test_an_archive_that_cannot_be_converted_leaves_nothing_half_made(tmp_path, models, images):
    """CIFAR-100's images under the name of CIFAR-10: the folder is another."""
    archive = archive_of(binary_files(images, np.zeros((20, 2))))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(archive)
    with pytest.raises(BDenseError, match="cifar-10-batches-bin"):
        fetch_training_set(published_as("cifar10", archive), models, say=print, source=tmp_path)
    assert left_in(models) == []


def test_the_command_answers_a_misspelt_name_with_the_nearest(tmp_path, monkeypatch, capsys):
    from search.cli import main

    monkeypatch.setenv("BDENSE_HOME", str(tmp_path / "home"))
    with pytest.raises(SystemExit) as ended:
        main(["fetch-dataset", "cifar"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no data set 'cifar' can be fetched; did you mean cifar10?\n"
    assert not (tmp_path / "home").exists()
