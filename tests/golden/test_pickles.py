"""EDM pickles: what comes out of real ones, and that hostile ones are refused (shared/vectors/sfd/README.md)."""

import json
import os
import subprocess

import pytest
import torch

from bdense_core.checkpoints import import_edm, load_network
from bdense_core.edm_pickle import read_edm_pickle
from bdense_core.errors import UnsafePickle
from bdense_core.files import sha256_of_file
from bdense_core.network_config import NetworkConfig

pytestmark = pytest.mark.golden


@pytest.mark.files("sfd/pickle/*.safetensors")
def test_a_pickle_gives_the_stored_state_configuration_and_images(path, read_vectors, tmp_path):
    vectors = read_vectors(path)
    source = path.with_name(vectors.meta["pickle"])
    read = read_edm_pickle(source)
    assert (read.class_name, read.key) == (vectors.meta["class_name"], "ema")
    assert read.config == NetworkConfig.from_edm_kwargs(vectors.meta["class_name"], vectors.meta["init_kwargs"])
    assert read.sha256 == sha256_of_file(source)
    expected = {k.removeprefix("state."): v for k, v in vectors.arrays.items() if k.startswith("state.")}
    assert set(read.state) == set(expected)
    for name, tensor in read.state.items():
        assert (tensor.dtype, expected[name].dtype) == (torch.float32, torch.float32), name
        assert torch.equal(tensor, expected[name]), name
    network = load_network(import_edm(source, tmp_path / "teacher.safetensors"))
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in expected.items())
    with torch.no_grad():
        vectors.check("D", network(vectors.arrays["x"], vectors.arrays["sigma"], vectors.arrays.get("class_labels")))
    assert not vectors.unchecked("state.", "x", "sigma", "class_labels")


@pytest.mark.files("sfd/pickle/*.pkl")
def test_every_pickle_is_known_to_these_tests(path):
    hostile = json.loads(path.with_name("hostile.json").read_text())
    assert (path.name in hostile) != path.with_suffix(".meta.json").exists()


@pytest.mark.files("sfd/pickle/hostile.json")
def test_hostile_pickles_are_refused_by_name_and_nothing_of_them_is_run(path, monkeypatch):
    def called(*_: object) -> None:
        raise AssertionError("a pickle was run")

    monkeypatch.setattr(os, "system", called)
    monkeypatch.setattr("posix.system", called)
    monkeypatch.setattr(subprocess, "Popen", called)
    monkeypatch.setattr("builtins.eval", called)
    monkeypatch.setattr("builtins.exec", called)
    cases = json.loads(path.read_text())
    assert cases
    for name, case in cases.items():
        assert case["expected"] == "refuse", f"{name}: a case of an unknown kind"
        # A text that were run would raise SystemExit, which is no UnsafePickle.
        with pytest.raises(UnsafePickle) as refusal:
            read_edm_pickle(path.with_name(name))
        message = str(refusal.value)
        assert "\n" not in message
        assert name in message
        assert any(wanted in message for wanted in case["globals"]), message
        assert case["globals"]
