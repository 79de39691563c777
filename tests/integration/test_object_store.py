"""Teacher caches and checkpoints in an object store, over S3's real protocol."""

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from bdense_core import shared_cache
from bdense_core.cache import TrajectoryCache
from bdense_core.errors import BadValue, CheckpointError
from search.checkpoints import Checkpoints, local_state
from search.places import check_writable
from tests.object_store import ObjectStore, serving

NUM_ROWS, SHARD_ROWS = 10, 4


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with serving() as served:
        yield served
        fsspec.filesystem("s3").clear_instance_cache()


def row_values(first: int, end: int) -> torch.Tensor:
    return torch.arange(float(first), float(end)).view(-1, 1)


class Machine:
    """One that shares no folder with others; it counts what it computes."""

    def __init__(self, home: Path, url: str) -> None:
        self.asked: list[int] = []
        self.cache = TrajectoryCache(
            home, identity={"teacher": "abc"}, num_rows=NUM_ROWS, shard_rows=SHARD_ROWS, compute=self._compute,
            shared_url=url,
        )  # fmt: skip

    def _compute(self, first: int, end: int) -> list[torch.Tensor]:
        self.asked.append(first // SHARD_ROWS)
        return [row_values(first, end)]

    def rows(self, first: int = 0, end: int = NUM_ROWS) -> torch.Tensor:
        for _ in self.cache.fill(first, end):
            pass
        return self.cache.rows(first, end)


@pytest.fixture(params=["s3", "folder"])
def url(request: pytest.FixtureRequest, store: ObjectStore, tmp_path: Path) -> str:
    return f"{store.url}/{tmp_path.name}" if request.param == "s3" else str(tmp_path / "shared")


def test_what_one_machine_computed_no_other_computes_again(tmp_path: Path, url: str) -> None:
    first, second = Machine(tmp_path / "one", url), Machine(tmp_path / "two", url)
    first.rows(0, 5)
    assert torch.equal(second.rows(), row_values(0, NUM_ROWS))
    assert (first.asked, second.asked) == ([0, 1], [2])
    assert torch.equal(first.rows(), row_values(0, NUM_ROWS))
    assert first.asked == [0, 1]
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def shards(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.glob("*/*") if path.suffix == ".safetensors"}


def test_a_damaged_copy_is_never_used_and_is_replaced(
    tmp_path: Path, store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{store.url}/{tmp_path.name}"
    Machine(tmp_path / "one", url).rows()
    damaged = next(name for name in store.names() if name.startswith(tmp_path.name) and "shard-00001" in name)
    whole = store.read(damaged)
    store.write(damaged, whole[:-1])
    with caplog.at_level(logging.WARNING):
        second = Machine(tmp_path / "two", url)
        assert torch.equal(second.rows(), row_values(0, NUM_ROWS))
    assert second.asked == [1]
    assert "is damaged" in caplog.text and "shards are computed here" in caplog.text
    assert store.read(damaged) == whole


@pytest.mark.parametrize("url", ["s3://no-such-bucket/cache", "s3://bucket-of-others", "nosuch://host/x"])
def test_a_store_that_cannot_be_reached_is_said_once_and_ends_nothing(
    tmp_path: Path, store: ObjectStore, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    alone = Machine(tmp_path, url)
    with caplog.at_level(logging.WARNING, logger="bdense_core.shared_cache"):
        assert torch.equal(alone.rows(), row_values(0, NUM_ROWS))
    assert alone.asked == [0, 1, 2]
    (record,) = [record for record in caplog.records if record.name == "bdense_core.shared_cache"]
    assert url in record.getMessage()


def test_a_store_that_does_not_answer_is_waited_for_once_and_with_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared_cache, "_ANSWER_WITHIN_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections, and says nothing
        alone = Machine(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}/cache")
        pieces = list(alone.cache.fill(0, NUM_ROWS))
    assert alone.asked == [0, 1, 2]
    assert torch.equal(alone.cache.rows(0, NUM_ROWS), row_values(0, NUM_ROWS))
    (record,) = [record for record in caplog.records if record.name == "bdense_core.shared_cache"]
    assert "no answer within 1 s; shards are computed here" in record.getMessage()
    assert 5 <= pieces.count(0) <= 20 and pieces.count(1) == pieces.count(2) == 1
    assert sorted(path.suffix for path in alone.cache.folder.glob("*shard*")) == [".lock"] * 3 + [".safetensors"] * 3


def test_what_a_killed_worker_left_of_a_shard_goes_with_the_next_one(tmp_path: Path, store: ObjectStore) -> None:
    one = Machine(tmp_path, f"{store.url}/{tmp_path.name}")
    half = one.cache.folder / ".shard-00001-half.tmp"
    half.mkdir(parents=True)
    (half / "shard-00001-abc.safetensors").write_bytes(b"half")
    other = one.cache.folder / ".shard-00001-written.tmp"
    other.write_bytes(b"half")
    one.rows()
    assert not half.exists() and not other.exists()


def test_a_launch_finds_out_early_whether_the_store_can_be_written(store: ObjectStore, tmp_path: Path) -> None:
    before = store.names()
    check_writable(f"{store.url}/any/where", "cache.url")
    assert store.names() == before
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"the shared teacher cache at .*/file/x.* change cache\.url"):
        check_writable(str(tmp_path / "file" / "x"), "cache.url")
    with pytest.raises(BadValue, match=r"cache\.url nosuch://host/x cannot be used: .*install the driver's package"):
        check_writable("nosuch://host/x", "cache.url")


def test_the_state_of_a_trial_goes_to_the_store_and_comes_back_on_another_machine(store: ObjectStore) -> None:
    kept = Checkpoints(f"{store.url}/checkpoints")
    kept.prepare()
    location = kept.location("digits-1", 3)
    with local_state(location) as state:
        assert state.folder is not None
        state.folder.mkdir(parents=True)
        (state.folder / "snapshot-00000010-abc.safetensors").write_bytes(b"weights")
        (state.folder / ".snapshot-half.tmp").write_bytes(b"half")
        assert state.follow() is None
    assert kept.trials("digits-1") == [3]
    with local_state(location) as state:
        assert state.folder is not None
        assert [path.name for path in state.folder.iterdir()] == ["snapshot-00000010-abc.safetensors"]
        assert next(state.folder.iterdir()).read_bytes() == b"weights"
    kept.remove("digits-1", [3])
    assert kept.trials("digits-1") == []
    assert not [name for name in store.names() if name.startswith("checkpoints/")]
