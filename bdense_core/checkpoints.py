"""Networks as safetensors: weights, configuration and origin in one file, known by its sha256."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bdense_core.ddpm_weights import holds_weights, read_ddpm_weights
from bdense_core.edm import read_edm_pickle
from bdense_core.errors import CheckpointError, ConfigError
from bdense_core.files import HashedFile, canonical_json, sha256_of_file, write_bytes_atomically
from bdense_core.integrity import METADATA, check_file, read_metadata
from bdense_core.networks import Denoiser, NetworkConfig, build


def save_network(network: Denoiser, path: Path, about: dict[str, Any] | None = None) -> HashedFile:
    """Write a network with its configuration; `about` is any JSON-able description of its origin.

    Raises:
        CheckpointError: the file cannot be written.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    # One entry: safetensors keeps no order among several, and equal networks must give equal bytes.
    metadata = {METADATA: canonical_json({"config": network.config.to_dict(), "about": about or {}})}
    try:
        write_bytes_atomically(path, save(state, metadata))
    except OSError as error:
        raise CheckpointError(f"cannot write the network {path}: {error.strerror or error}") from error
    return HashedFile(path=str(path), sha256=sha256_of_file(path))


def load_network(file: HashedFile) -> Denoiser:
    """The network in a file, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, altered, damaged, or of another architecture.
    """
    check_file(file)
    try:
        with safe_open(file.path, framework="pt") as opened:
            if METADATA not in (opened.metadata() or {}):
                raise CheckpointError(
                    f"{file.path} is no network of this project: it has no entry {METADATA}; "
                    "name a file that this project wrote as a network"
                )
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        config = NetworkConfig.from_dict(read_metadata(file.path)["config"])
    except KeyError as error:
        raise CheckpointError(f"{file.path} is no network of this project: its description lacks {error}") from error
    except (SafetensorError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{file.path} is no network of this project: {error}") from error
    return _with_state(config, state, file.path)


def import_network(source: Path, destination: Path) -> HashedFile:
    """Turn a published network into a network file: an EDM checkpoint or DDPM's weights, told apart by content.

    Raises:
        UnsafePickle, CheckpointError: as `import_edm` and `import_ddpm`.
    """
    return (import_ddpm if holds_weights(source) else import_edm)(source, destination)


def import_ddpm(source: Path, destination: Path) -> HashedFile:
    """Turn published weights of DDPM, as `bdense_core.ddpm_weights` knows them, into a network file.

    Raises:
        CheckpointError: they are missing, damaged or of another network, or the network file cannot be written.
    """
    read = read_ddpm_weights(source)
    network = _with_state(read.config, read.state, str(source))
    about = {"source": source.name, "source_sha256": read.sha256, "format": f"DDPM weights, {read.names} names"}
    return save_network(network, destination, about)


def import_edm(source: Path, destination: Path) -> HashedFile:
    """Turn a published EDM checkpoint, a pickle, into a network file. Nothing in the pickle is run.

    Raises:
        UnsafePickle: the pickle names something beyond the parts of an EDM network.
        CheckpointError: it is missing, damaged or incomplete, or the network file cannot be written.
    """
    read = read_edm_pickle(source)
    network = _with_state(read.config, read.state, str(source))
    about = {"source": source.name, "source_sha256": read.sha256, "format": f"EDM pickle, {read.class_name}"}
    return save_network(network, destination, about)


def _with_state(config: NetworkConfig, state: dict[str, Tensor], where: str) -> Denoiser:
    """The network of a configuration with these weights, all of them and no others."""
    if difference := _difference(_layout(config, state, where), state):
        raise CheckpointError(
            f"{where} holds another architecture than it says: {difference}; fetch or make the file again"
        )
    network = build(config)
    network.load_state_dict(state)
    return network.eval()


def _layout(config: NetworkConfig, state: dict[str, Tensor], where: str) -> dict[str, list[int]]:
    """Names and shapes that a configuration means, worked out without memory for the weights.

    So a file that describes a giant but holds a dwarf is refused before anything large is made.
    """
    if config.num_blocks * len(config.channel_mult) > len(state):
        raise CheckpointError(
            f"{where} holds another architecture than it says: {len(state)} tensors cannot be "
            f"{len(config.channel_mult)} levels of {config.num_blocks} blocks; fetch or make the file again"
        )
    try:
        with torch.device("meta"):
            return {name: list(tensor.shape) for name, tensor in build(config).state_dict().items()}
    except (ConfigError, RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        detail = str(error).partition("\n")[0]
        raise CheckpointError(f"{where} describes a network that cannot be built: {detail}") from error


def _difference(wanted: dict[str, list[int]], state: dict[str, Tensor]) -> str | None:
    """The first parameter that is missing, left over or of another shape."""
    for name, shape in wanted.items():
        if name not in state:
            return f"{name} {shape} is missing"
        if list(state[name].shape) != shape:
            return f"{name} is {list(state[name].shape)}, but its configuration means {shape}"
    if extra := next((name for name in state if name not in wanted), None):
        return f"{extra} {list(state[extra].shape)} is no part of its configuration"
    return None
