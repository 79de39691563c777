"""EDM pickles: what comes out of real ones, and that hostile ones are refused (shared/vectors/sfd/README.md)."""

import codecs
import json
import pickle
import sys

import pytest
import torch

from bdense_core.checkpoints import import_edm, load_network
from bdense_core.edm import read_edm_pickle
from bdense_core.edm.names import CONSTRUCTORS
from bdense_core.errors import CheckpointError
from bdense_core.files import sha256_of_file
from bdense_core.network_config import NetworkConfig

pytestmark = pytest.mark.golden

NEVER = ("pickle.", "marshal.", "exec", "compile", "import", "os.", "subprocess.", "shutil.", "socket.", "ctypes.")
"""Beginnings of audit events; a reader only opens the file."""


@pytest.mark.files("sfd/pickle/*.safetensors")
def test_a_pickle_gives_the_stored_state_configuration_and_images(path, read_vectors, tmp_path):
    vectors = read_vectors(path)
    source = path.with_name(vectors.meta["pickle"])
    read = read_edm_pickle(source)
    assert (read.class_name, read.key) == (vectors.meta["class_name"], "ema")
    assert read.config == NetworkConfig.from_edm_kwargs(vectors.meta["class_name"], vectors.meta["init_kwargs"])
    assert read.sha256 == sha256_of_file(source)
    expected = vectors.state()
    assert set(read.state) == set(expected)
    for name, tensor in read.state.items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, expected[name]), name
    network = load_network(import_edm(source, tmp_path / "teacher.safetensors"))
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in expected.items())
    with torch.no_grad():
        vectors.check("D", network(vectors.arrays["x"], vectors.arrays["sigma"], vectors.arrays.get("class_labels")))
    assert not vectors.unchecked("state.", "x", "sigma", "class_labels")


@pytest.mark.files("sfd/pickle/*.pkl")
def test_every_pickle_is_known_to_these_tests(path):
    hostile = json.loads(path.with_name("hostile.json").read_text())
    networks = [json.loads(meta.read_text())["pickle"] for meta in path.parent.glob("*.meta.json")]
    assert [*hostile, *networks].count(path.name) == 1


@pytest.fixture(scope="session")
def watched():
    """Call it with a function: the names of what happens meanwhile that no reader of plain data does."""
    seen, watching = [], []

    def hook(event, args):
        if watching and event.startswith(NEVER):
            seen.append(f"{event} {args}")

    for codec in ("ascii", "latin-1", "utf-8", "raw-unicode-escape", "unicode-escape"):
        codecs.lookup(codec)  # imported when first asked for, which is none of a pickle's doing
    sys.addaudithook(hook)

    def watch(act):
        watching.append(True)
        try:
            act()
        finally:
            watching.clear()
            events, seen[:] = list(seen), []
            assert not events

    return watch


@pytest.mark.files("sfd/pickle/hostile.json")
def test_hostile_pickles_are_refused_by_name_and_nothing_of_them_is_run(path, watched, tmp_path):
    cases = json.loads(path.read_text())
    assert cases
    for name, case in cases.items():
        assert case["expected"] == "refuse", f"{name}: a case of an unknown kind"
        # A text that were run would raise something else, or be noticed.
        with pytest.raises(CheckpointError) as refusal:
            watched(lambda name=name: read_edm_pickle(path.with_name(name)))
            import_edm(path.with_name(name), tmp_path / "none.safetensors")  # read as plain data, but no network
        message = str(refusal.value)
        assert "\n" not in message
        assert name in message
        # A trick that names nothing, such as EXT1, or only what networks name too, is refused as what it is.
        by_kind = set(case["globals"]) <= set(CONSTRUCTORS)
        assert by_kind or any(wanted in message for wanted in case["globals"]), message


def test_a_pickle_that_were_run_would_be_noticed(watched):
    with pytest.raises(AssertionError, match=r"pickle\.find_class"):
        watched(lambda: pickle.loads(b"cbuiltins\nlen\n."))  # noqa: S301
    with pytest.raises(AssertionError, match="exec"):
        watched(lambda: exec("pass"))
