"""Networks as safetensors: weights, configuration and origin in one file, known by its sha256."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

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
            config = NetworkConfig.from_dict(read_metadata(file.path)["config"])
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{file.path} is no network of this project: {error}") from error
    network = build(config)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(f"{file.path} holds another architecture than it says: {detail}") from error
    return network.eval()
