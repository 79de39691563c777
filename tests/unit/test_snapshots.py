"""Snapshots of a run: what comes back, and what damage, a full disk and a second writer do to them."""

import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save

import bdense_core
from bdense_core.errors import CheckpointError
from bdense_core.snapshots import Snapshots
from tests.patience import PATIENCE_S

IDENTITY = {"teacher": "abc", "network": {"dropout": 0.1, "channel_mult": (1, 2)}}


def make(folder, *, identity=IDENTITY, keep=2, required=True):
    return Snapshots(folder, identity=identity, keep=keep, required=required)


def state(step):
    """Tensors that name their step."""
    return {"weights": torch.arange(1000) + step}


def save_steps(folder, *steps, **settings):
    snapshots = make(folder, **settings)
    for step in steps:
        snapshots.save(step, state(step), {"loss": step / 3})
    return snapshots


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("snapshot-*.safetensors"))


def path_of(folder, step):
    (path,) = folder.glob(f"snapshot-{step:08d}-*.safetensors")
    return path


def leftovers(folder):
    return [path for path in folder.iterdir() if path.name.endswith(".tmp")]


# --- what comes back ------------------------------------------------------------------------------------


def test_tensors_and_values_come_back_bit_for_bit(tmp_path):
    source = torch.Generator().manual_seed(1)
    tensors = {
        "float32": torch.randn(3, 4, generator=source),
        "bfloat16": torch.randn(5, generator=source).bfloat16(),
        "float16": torch.randn(5, generator=source).half(),
        "int64": torch.tensor([2**62, -1]),
        "uint8": torch.get_rng_state(),
        "step": torch.tensor(7.0),
        "turned": torch.randn(3, 4, generator=source).t(),
        "channels_last": torch.randn(2, 3, 4, 4, generator=source).to(memory_format=torch.channels_last),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "none": torch.empty(0, 3),
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    values = {"loss": 0.1 + 0.2, "tiny": 5e-324, "none": None, "text": "Fréchet", "nested": {"list": [1, 2.5]}}
    make(tmp_path / "a" / "b").save(12, tensors, values)
    found = make(tmp_path / "a" / "b").latest()
    assert found.step == 12
    assert found.values == values
    assert set(found.tensors) == set(tensors)
    for name, tensor in tensors.items():
        back = found.tensors[name]
        assert (back.dtype, back.shape, back.device.type) == (tensor.dtype, tensor.shape, "cpu")
        assert back.contiguous().view(-1).view(torch.uint8).tolist() == (
            tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()
        ), name


def test_a_snapshots_tensors_are_the_readers_own(tmp_path):
    snapshots = save_steps(tmp_path, 1)
    first = snapshots.latest()
    first.tensors["weights"].zero_()
    assert torch.equal(snapshots.latest().tensors["weights"], state(1)["weights"])


def test_equal_states_give_equal_files_whose_names_hold_their_hashes(tmp_path):
    for name in ("one", "other"):
        save_steps(tmp_path / name, 3)
    path = path_of(tmp_path / "one", 3)
    assert path.name == path_of(tmp_path / "other", 3).name
    assert path.stem.split("-")[2] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_nothing_was_saved_yet(tmp_path):
    assert make(tmp_path / "new").latest() is None


def test_values_that_json_cannot_hold_are_refused_and_write_nothing(tmp_path):
    snapshots = save_steps(tmp_path, 1)
    with pytest.raises(ValueError, match="Out of range"):
        snapshots.save(2, state(2), {"loss": float("nan")})
    assert steps(tmp_path) == [1]


def test_the_newest_few_stay(tmp_path):
    save_steps(tmp_path / "two", 8, 9, 10, 100_000_000)
    assert steps(tmp_path / "two") == [10, 100_000_000]
    assert make(tmp_path / "two").latest().step == 100_000_000  # a ninth digit sorts as a number
    save_steps(tmp_path / "one", 1, 2, keep=1)
    assert steps(tmp_path / "one") == [2]


def test_the_end_of_a_run_clears_its_snapshots(tmp_path):
    snapshots = save_steps(tmp_path, 1, 2)
    (tmp_path / ".snapshot-00000003-abc.safetensors.123.tmp").touch()
    (tmp_path / "teacher.safetensors").touch()
    snapshots.clear()
    assert {path.name for path in tmp_path.iterdir()} <= {"teacher.safetensors", "snapshots.lock"}
    assert snapshots.latest() is None


# --- another run ----------------------------------------------------------------------------------------


def test_another_runs_snapshot_is_refused_and_the_differences_named(tmp_path):
    save_steps(tmp_path, 1)
    other = {"teacher": "abd", "network": {"dropout": 0.2, "channel_mult": [1, 2]}, "seed": 0}
    with pytest.raises(CheckpointError, match=r"differs in network\.dropout, seed, teacher; .*another folder or rem"):
        make(tmp_path, identity=other).latest()
    assert steps(tmp_path) == [1]


# --- damage ---------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


DAMAGE = pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])


@DAMAGE
def test_a_damaged_snapshot_is_named_and_the_one_before_it_taken(tmp_path, damage, caplog):
    save_steps(tmp_path, 10, 20)
    path = path_of(tmp_path, 20)
    damage(path)
    snapshots = make(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert snapshots.latest().step == 10
    assert f"{path} is damaged" in caplog.text
    assert steps(tmp_path) == [10, 20]  # whoever wants to look into it still can
    snapshots.save(15, state(15), {})
    assert steps(tmp_path) == [10, 15]
    assert make(tmp_path).latest().step == 15


@DAMAGE
def test_a_step_that_is_computed_anew_replaces_its_damaged_file(tmp_path, damage):
    save_steps(tmp_path, 10, 20)
    whole = path_of(tmp_path, 20).read_bytes()
    damage(path_of(tmp_path, 20))
    snapshots = make(tmp_path)
    assert snapshots.latest().step == 10
    snapshots.save(20, state(20), {"loss": 20 / 3})
    assert steps(tmp_path) == [10, 20]
    assert path_of(tmp_path, 20).read_bytes() == whole
    assert make(tmp_path).latest().step == 20


def test_where_all_are_damaged_the_run_begins_anew(tmp_path):
    save_steps(tmp_path, 10, 20)
    for step in (10, 20):
        truncate(path_of(tmp_path, step))
    snapshots = make(tmp_path)
    assert snapshots.latest() is None
    snapshots.save(5, state(5), {})
    assert steps(tmp_path) == [5]


@pytest.mark.parametrize("content", [b"not a tensor", save({"weights": torch.ones(2)})], ids=["text", "tensors"])
def test_something_else_is_no_snapshot_even_if_its_name_fits(tmp_path, content):
    save_steps(tmp_path, 10)
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / f"snapshot-00000020-{digest}.safetensors").write_bytes(content)
    assert make(tmp_path).latest().step == 10


def test_a_folder_that_cannot_be_made_is_an_error_before_anything_ran(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for act in (lambda s: s.latest(), lambda s: s.save(1, state(1), {}), lambda s: s.clear()):
        with pytest.raises(CheckpointError, match=r"file/run cannot be .*choose another"):
            act(make(tmp_path / "file" / "run"))


# --- snapshots that a run can do without ----------------------------------------------------------------


def test_a_frozen_writer_stops_nobody_from_reading_and_costs_only_the_snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr("bdense_core.snapshots._LOCK_WITHIN_S", 0.1)
    save_steps(tmp_path, 10)
    snapshots = make(tmp_path, required=False)
    with FileLock(tmp_path / "snapshots.lock"):
        assert snapshots.latest().step == 10
        assert not snapshots.save(20, state(20), {})
        assert "could not be acquired" in snapshots.take_note()
        with pytest.raises(CheckpointError, match="could not be acquired"):
            make(tmp_path).latest()
    assert snapshots.save(30, state(30), {})
    assert steps(tmp_path) == [10, 30]


def test_trouble_that_recurs_is_noted_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    snapshots = make(tmp_path / "file" / "run", required=False)
    assert snapshots.latest() is None
    assert "the run goes on without" in snapshots.take_note()
    assert not snapshots.save(1, state(1), {})
    assert snapshots.take_note() is None


def test_another_runs_newer_snapshots_do_not_push_out_the_own(tmp_path):
    save_steps(tmp_path, 100, 200)
    snapshots = make(tmp_path, identity=IDENTITY | {"teacher": "abd"}, required=False)
    assert snapshots.latest() is None
    assert snapshots.take_note().count("differs in teacher; looking for an older one") == 2
    assert snapshots.save(10, state(10), {})
    assert steps(tmp_path) == [10]
    assert snapshots.latest().step == 10


# --- other processes ------------------------------------------------------------------------------------

WRITER = """
import resource, signal, sys
from pathlib import Path
import torch
from bdense_core.errors import CheckpointError
from bdense_core.snapshots import Snapshots

folder, name = Path(sys.argv[1]), sys.argv[2]
snapshots = Snapshots(
    folder, identity={"teacher": "abc", "network": {"dropout": 0.1, "channel_mult": (1, 2)}}, keep=2
)
"""

LARGE = """
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
if name == "dies":
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
try:
    snapshots.save(20, {"weights": torch.ones(100_000)}, {})
except CheckpointError as error:
    print(error)
"""

RACING = """
for step in range(1, 101):
    snapshots.save(step, {"weights": torch.arange(1000) + step}, {"by": name})
    found = snapshots.latest()
    assert found.step >= step, (found.step, step)
    assert torch.equal(found.tensors["weights"], torch.arange(1000) + found.step)
"""


def start(script, folder, name):
    environment = os.environ | {"PYTHONPATH": str(Path(bdense_core.__file__).parents[1])}
    command = [sys.executable, "-c", WRITER + script, str(folder), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_full_disk_is_an_error_that_leaves_the_last_snapshot(tmp_path):
    """A limit on the size of files stands for the disk: the write itself fails."""
    save_steps(tmp_path, 10)
    writer = start(LARGE, tmp_path, "fails")
    stdout, stderr = writer.communicate(timeout=PATIENCE_S)
    assert writer.returncode == 0, stderr
    assert f"the snapshots in {tmp_path} cannot be written: File too large; free some space" in stdout
    assert leftovers(tmp_path) == []
    assert make(tmp_path).latest().step == 10


def test_a_writer_killed_in_its_write_leaves_no_snapshot_and_the_next_one_tidies_up(tmp_path):
    """The kernel ends it in the middle of the write: the limit's signal is not caught."""
    save_steps(tmp_path, 10)
    writer = start(LARGE, tmp_path, "dies")
    writer.communicate(timeout=PATIENCE_S)
    assert writer.returncode < 0
    assert len(leftovers(tmp_path)) == 1
    snapshots = make(tmp_path)
    assert snapshots.latest().step == 10
    snapshots.save(20, state(20), {})
    assert leftovers(tmp_path) == []
    assert steps(tmp_path) == [10, 20]


def test_two_writers_of_one_run_do_not_harm_each_other(tmp_path):
    """The first worker of a trial was taken for dead and is not."""
    writers = [start(RACING, tmp_path, name) for name in ("a", "b")]
    outputs = [writer.communicate(timeout=PATIENCE_S) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], outputs
    assert leftovers(tmp_path) == []
    assert len(steps(tmp_path)) == 2
    assert make(tmp_path).latest().step == 100
