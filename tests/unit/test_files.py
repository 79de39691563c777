"""Files that are never half-written, and the hashes they are known by."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bdense_core
from bdense_core.files import (
    canonical_json,
    sha256_of,
    sha256_of_file,
    write_atomically,
    write_bytes_atomically,
    write_text_atomically,
)
from tests.patience import PATIENCE_S


def test_a_file_is_written_with_its_folders_and_replaced_whole(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_text_atomically(path, "Fréchet")
    assert path.read_bytes() == "Fréchet".encode()
    write_bytes_atomically(path, b"\x00\n")
    assert path.read_bytes() == b"\x00\n"
    assert list(path.parent.iterdir()) == [path]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("new, but not all of it")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # a rename between disks would not be one step
        temporary.write_text("new")

    with path.open() as reader:
        write_atomically(path, write)
        assert reader.read() == "old"  # who began with the old file reads on in it
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [OSError("no space"), ValueError("a fault"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_the_old_file_and_no_litter(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_writes_nothing_is_an_error_and_no_empty_file(tmp_path):
    path = tmp_path / "file.txt"
    with pytest.raises(FileNotFoundError):
        write_atomically(path, lambda temporary: None)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_os_error_and_leaves_the_old_file_alone(tmp_path):
    """In a process whose files may not grow beyond 1000 bytes: the write itself fails."""
    path = tmp_path / "file.txt"
    path.write_text("old")
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from bdense_core.files import write_bytes_atomically\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    write_bytes_atomically(Path(sys.argv[1]), b'x' * 5000)\n"
        "except OSError as error:\n"
        "    print(error.strerror)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(bdense_core.__file__).parents[1])}
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S, check=True)
    assert done.stdout == "File too large\n"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_equal_values_have_one_text_and_one_hash():
    assert canonical_json({"b": [1, 2.5], "a": None}) == '{"a":null,"b":[1,2.5]}'
    assert sha256_of({"b": 1, "a": 2}) == sha256_of({"a": 2, "b": 1})
    assert sha256_of([1, 2]) != sha256_of([2, 1])
    assert sha256_of({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))


def test_the_hash_of_a_file_is_that_of_its_content(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256_of_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
