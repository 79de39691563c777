"""The shared teacher cache: several processes, damage, a full disk, sudden death. All of it is real."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bdense_core
from bdense_core.cache import Recomputed, TrajectoryCache
from bdense_core.errors import CacheError
from bdense_core.integrity import check_cache
from tests.patience import PATIENCE_S

IDENTITY = {"teacher": "abc", "seed": 1}
NUM_ROWS, SHARD_ROWS = 45, 4  # of the last of 12 shards one row is wanted


def row_values(first, end):
    """Rows that name themselves: row i is [[i, i + 0.25], [i + 0.5, i + 0.75]]."""
    return torch.arange(first, end).view(-1, 1, 1) + torch.tensor([[0, 0.25], [0.5, 0.75]])


def whole(first, end):
    """What a cache is given: the rows, here in one piece."""
    yield row_values(first, end)


def make_cache(root, *, identity=IDENTITY, compute=whole, num_rows=NUM_ROWS, shard_rows=SHARD_ROWS):
    return TrajectoryCache(root, identity=identity, num_rows=num_rows, shard_rows=shard_rows, compute=compute)


def filled(root, **settings):
    cache = make_cache(root, **settings)
    for _ in cache.fill(0, cache.num_rows):
        pass
    return cache


def shards(root):
    return sorted(path.name for path in root.glob("*/shard-*-*.safetensors"))


def leftovers(root):
    return [path for path in root.rglob("*") if path.name.endswith(".tmp")]


# --- reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "end"), [(0, 1), (3, 4), (3, 5), (4, 8), (2, 15), (43, 45), (0, 45)])
def test_rows_are_the_same_within_and_across_shards(tmp_path, first, end):
    rows = filled(tmp_path).rows(first, end)
    assert torch.equal(rows, row_values(first, end))


def test_each_shard_is_computed_once_and_only_when_it_is_needed(tmp_path):
    asked = []

    def compute(first, end):
        asked.append((first, end))
        return [row_values(first, end)]

    cache = make_cache(tmp_path, compute=compute)
    assert list(cache.fill(0, 5)) == [0, 1]
    assert asked == [(0, 4), (4, 8)]
    assert list(cache.fill(0, 8)) == []
    for _ in cache.fill(0, NUM_ROWS + 100):
        pass
    assert asked[-1] == (44, 48)
    assert len(asked) == cache.computed == cache.num_shards == 12
    again = filled(tmp_path, compute=None)  # a second worker finds all of it
    assert again.computed == 0
    assert torch.equal(again.rows(0, NUM_ROWS), row_values(0, NUM_ROWS))


def test_a_longer_run_goes_on_where_a_shorter_one_ended(tmp_path):
    assert filled(tmp_path, num_rows=10).computed == 3
    assert filled(tmp_path, num_rows=20).computed == 2
    assert filled(tmp_path, num_rows=7).computed == 0


def test_an_interrupted_filling_ends_with_the_same_files_as_an_undisturbed_one(tmp_path):
    undisturbed = filled(tmp_path / "whole")
    begun = make_cache(tmp_path / "interrupted")
    work = begun.fill(0, NUM_ROWS)
    for _ in range(5):
        next(work)
    work.close()
    resumed = filled(tmp_path / "interrupted")
    assert (begun.computed, resumed.computed) == (4, 8)  # the fifth was computed but not written yet
    assert shards(tmp_path / "interrupted") == shards(tmp_path / "whole")  # their names hold their contents' hashes
    assert torch.equal(resumed.rows(0, NUM_ROWS), undisturbed.rows(0, NUM_ROWS))


def test_pieces_are_signs_of_life_and_a_worker_that_leaves_between_two_frees_its_shard(tmp_path):
    def piecewise(first, end):
        for row in range(first, end):
            yield row_values(row, row + 1)

    cache = make_cache(tmp_path, compute=piecewise)
    work = cache.fill(0, 4)
    assert [next(work), next(work)] == [0, 0]
    work.close()
    assert shards(tmp_path) == []
    assert list(cache.fill(0, 8)) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(cache.rows(0, 8), row_values(0, 8))
    assert shards(tmp_path) == shards_of_whole(tmp_path / "whole", 8)


def shards_of_whole(root, rows):
    filled(root, num_rows=rows)
    return shards(root)


def test_rows_in_the_middle_are_made_without_those_before_them(tmp_path):
    cache = make_cache(tmp_path)
    assert not cache.is_readable(17, 22)
    assert list(cache.fill(17, 22)) == [4, 5]
    assert cache.is_readable(17, 22)
    assert not cache.is_readable(15, 22)
    assert torch.equal(cache.rows(17, 22), row_values(17, 22))


def test_without_a_cache_the_same_rows_are_computed_again(tmp_path):
    asked = []

    def compute(first, end):
        asked.append(first)
        return [row_values(first, end)]

    rows = Recomputed(num_rows=NUM_ROWS, shard_rows=SHARD_ROWS, compute=compute)
    for first in range(0, NUM_ROWS, 5):
        for _ in rows.fill(first, first + 5):
            pass
        assert rows.is_readable(first, first + 5)
        assert torch.equal(rows.rows(first, first + 5), row_values(first, first + 5))
    assert asked == list(range(0, 48, 4))
    assert not rows.is_readable(0, 1), "what is behind is let go"


# --- the disk -------------------------------------------------------------------------------------------


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_computed(tmp_path):
    cache = make_cache(tmp_path, compute=None)
    with pytest.raises(CacheError, match=r"needs .* GB more, but .*cache\.enabled: false"):
        cache.reserve(10**15)
    cache.reserve(16)
    assert shards(tmp_path) == []


def test_a_budget_counts_what_is_there_and_what_is_missing(tmp_path):
    filled(tmp_path, identity={"teacher": "other"})
    used = sum(path.stat().st_size for path in tmp_path.glob("*/shard-*"))
    cache = make_cache(tmp_path)
    cache.reserve(16, budget_bytes=used + 48 * 16 * 1.1)
    with pytest.raises(CacheError, match=r"cache\.budget_gb .* allows"):
        cache.reserve(16, budget_bytes=used + 48 * 16 * 0.9)
    filled(tmp_path).reserve(16, budget_bytes=0)  # nothing is missing


def test_another_identity_is_another_folder_that_says_what_it_holds(tmp_path):
    caches = [
        make_cache(tmp_path),
        make_cache(tmp_path, identity={"seed": 1, "teacher": "abc"}),
        make_cache(tmp_path, identity=IDENTITY | {"seed": 2}),
        make_cache(tmp_path, identity=IDENTITY | {"teacher": "abd"}),
        make_cache(tmp_path, shard_rows=5),
    ]
    folders = [cache.folder for cache in caches]
    assert folders[0] == folders[1]
    assert len(set(folders)) == 4
    cache = filled(tmp_path, identity=IDENTITY | {"seed": 2}, num_rows=4)
    assert json.loads((cache.folder / "cache.json").read_text()) == {
        "teacher": "abc",
        "seed": 2,
        "shard_rows": 4,
    }


def test_shards_are_readable_by_other_users_of_the_machine(tmp_path):
    """A private mode would hide a common cache from everybody but the worker that happened to write it."""
    cache, plain = filled(tmp_path), tmp_path / "plain"
    plain.touch()
    modes = {path.stat().st_mode for path in cache.folder.glob("shard-*.safetensors")}
    assert modes == {plain.stat().st_mode}


# --- damage ---------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_shard_is_named_and_computed_anew_once_deleted(tmp_path, damage):
    path = sorted(filled(tmp_path).folder.glob("shard-00001-*"))[0]
    whole = path.read_bytes()
    damage(path)
    with pytest.raises(CacheError, match=path.name):
        filled(tmp_path)
    with pytest.raises(CacheError, match=path.name):
        check_cache(tmp_path)
    path.unlink()
    healed = filled(tmp_path)
    assert healed.computed == 1
    assert torch.equal(healed.rows(0, NUM_ROWS), row_values(0, NUM_ROWS))
    assert path.read_bytes() == whole
    assert check_cache(tmp_path) == 12


def test_a_shard_of_something_else_is_refused_even_if_its_name_fits(tmp_path):
    path = sorted(filled(tmp_path).folder.glob("shard-00001-*"))[0]
    other = b"not a tensor"
    path.with_name(f"shard-00001-{hashlib.sha256(other).hexdigest()}.safetensors").write_bytes(other)
    path.unlink()
    with pytest.raises(CacheError, match="shard-00001"):
        filled(tmp_path)


def test_a_shard_deleted_under_a_reader_is_an_error_of_the_cache(tmp_path):
    cache = filled(tmp_path)
    path = sorted(cache.folder.glob("shard-00002-*"))[0]
    path.unlink()
    with pytest.raises(CacheError, match=path.name):
        cache.rows(6, 10)
    assert torch.equal(cache.rows(0, 8), row_values(0, 8))


def test_a_folder_that_cannot_be_written_is_an_error_of_the_cache(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match="cannot be written"):
        filled(tmp_path / "file")


# --- other processes ------------------------------------------------------------------------------------

WORKER = """
import os, resource, signal, sys, time
from pathlib import Path
import torch
from bdense_core.cache import TrajectoryCache
from bdense_core.errors import CacheError

root, name = Path(sys.argv[1]), sys.argv[2]
seen = root.parent / "seen"

def row_values(first, end):
    return torch.arange(first, end).view(-1, 1, 1) + torch.tensor([[0, 0.25], [0.5, 0.75]])

def wait_for(condition):
    deadline = time.monotonic() + 600
    while not condition():
        if time.monotonic() > deadline:
            sys.exit("deadline")
        time.sleep(0.002)

def make(compute, rows=45, shard_rows=4):
    return TrajectoryCache(
        root, identity={"teacher": "abc", "seed": 1}, num_rows=rows, shard_rows=shard_rows, compute=compute
    )

def fill(cache):
    for _ in cache.fill(0, cache.num_rows):
        pass
"""

SHARING = """
def compute(first, end):
    (seen / f"{first}-{end}-{name}").touch()
    (seen / f"began-{name}").touch()
    wait_for(lambda: len(list(seen.glob("began-*"))) == 3)  # everybody holds a shard before anybody ends one
    return [row_values(first, end)]

cache = make(compute, 400, 1)
fill(cache)
assert torch.equal(cache.rows(0, 400), row_values(0, 400))
print(cache.computed)
"""

ENDLESS = """
def compute(first, end):
    (seen / "computing").touch()
    time.sleep(600)

fill(make(compute))
"""

LARGE = """
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
if name == "dies":
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
cache = make(lambda first, end: [torch.ones(end - first, 10_000)])
try:
    fill(cache)
except CacheError as error:
    print(error)
"""


@pytest.fixture
def start(tmp_path):
    """Starts workers on the cache below `tmp_path / "cache"` and ends those that are left."""
    (tmp_path / "seen").mkdir()
    started = []

    def run(script, name):
        environment = os.environ | {"PYTHONPATH": str(Path(bdense_core.__file__).parents[1])}
        command = [sys.executable, "-c", WORKER + script, str(tmp_path / "cache"), name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_three_workers_fill_one_cache_together_and_no_shard_twice(tmp_path, start):
    """Many small shards, so that often one looks for a shard while another is just putting it in place."""
    workers = [start(SHARING, name) for name in ("a", "b", "c")]
    outputs = [worker.communicate(timeout=PATIENCE_S) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], outputs
    counts = [int(stdout) for stdout, _ in outputs]
    assert min(counts) >= 1
    assert sum(counts) == 400
    computed = sorted(tuple(map(int, path.name.split("-")[:2])) for path in (tmp_path / "seen").glob("*-*-*"))
    assert computed == [(first, first + 1) for first in range(400)]
    filled(tmp_path / "alone", num_rows=400, shard_rows=1)
    assert shards(tmp_path / "cache") == shards(tmp_path / "alone")  # their names hold the hashes
    assert leftovers(tmp_path) == []


def test_a_worker_killed_while_it_computes_frees_its_shard(tmp_path, start):
    worker = start(ENDLESS, "doomed")
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "seen" / "computing").exists():
        assert worker.poll() is None, worker.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    waiting = make_cache(tmp_path / "cache", num_rows=4)
    work = waiting.fill(0, 4)
    assert next(work) == 0  # the shard is taken: nothing to do but wait
    assert waiting.computed == 0
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert shards(tmp_path) == []
    for _ in work:
        pass
    assert waiting.computed == 1
    assert torch.equal(waiting.rows(0, 4), row_values(0, 4))


def test_a_worker_killed_while_it_writes_leaves_no_shard_and_the_next_one_tidies_up(tmp_path, start):
    """The kernel ends the worker in the middle of its write: the limit's signal is not caught."""
    worker = start(LARGE, "dies")
    worker.communicate(timeout=PATIENCE_S)
    assert worker.returncode == -signal.SIGXFSZ
    root = tmp_path / "cache"
    (left,) = leftovers(root)
    assert 0 < left.stat().st_size <= 50_000
    assert shards(root) == []
    assert check_cache(root) == 0
    cache = filled(root)
    assert cache.computed == 12
    assert torch.equal(cache.rows(0, NUM_ROWS), row_values(0, NUM_ROWS))
    assert leftovers(root) == []


def test_a_full_disk_is_an_error_of_the_cache_and_leaves_nothing(tmp_path, start):
    """A limit on the size of files stands for the disk: the write itself fails."""
    worker = start(LARGE, "fails")
    stdout, stderr = worker.communicate(timeout=PATIENCE_S)
    assert worker.returncode == 0, stderr
    root = tmp_path / "cache"
    assert f"the teacher cache {root}" in stdout
    assert "cannot be written: File too large" in stdout
    assert leftovers(root) == []
    assert shards(root) == []
