"""Feature networks by file: what a Fréchet distance looks at, known by name and sha256.

The name is part of the distance's: features "digits" make an `fd-digits`. A safetensors file holds the weights and
the network's name, kind and settings. Inception is the published TorchScript itself, and that one file alone.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bdense_core import protocol
from bdense_core.errors import BadValue, CheckpointError, EvaluationError
from bdense_core.feature_networks import ByteNetwork, CifarResNet, DigitsFeatures, Inception
from bdense_core.files import HashedFile, canonical_json, sha256_of_file, write_bytes_atomically
from bdense_core.integrity import check_file

FEATURE_NETWORKS: dict[str, type[ByteNetwork]] = {kind.kind: kind for kind in (DigitsFeatures, CifarResNet)}
"""The kinds of which there are files of this project."""

_METADATA = "bdense_features"


@dataclass(frozen=True)
class FeatureNetwork:
    """A frozen feature network with its name and the hash of its file.

    `identity` is what statistics are marked with: features of other weights are other features.
    """

    name: str
    sha256: str
    network: ByteNetwork
    device: str = "cpu"

    @property
    def identity(self) -> str:
        return f"{self.name}@{self.sha256[:16]}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, d] of bytes [B, C, H, W], on the network's device; images that are there stay there.

        Raises:
            EvaluationError: images of another shape than the network reads, or not bytes.
        """
        self._check(images)
        with _full_float32(), torch.autocast(torch.device(self.device).type, enabled=False):
            features: Tensor = self.network(images.to(self.device))
        return features

    def _check(self, images: Tensor) -> None:
        expected = self.network.image_shape
        fits = images.dim() == 4 and all(
            want in (None, found) for want, found in zip(expected, images.shape[1:], strict=True)
        )
        if not fits or images.dtype != torch.uint8:
            channels, *size = ("any" if side is None else side for side in expected)
            raise EvaluationError(
                f"{self.name} features read uint8 images [B, {channels}, {', '.join(map(str, size))}], but these are "
                f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}; give features made for such images"
            )


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32, which keeps 10 bits of each factor and is cuDNN's default.

    Rounding of that size moves features, and covariances sum it up: a distance would depend on the kind of GPU.
    """
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolutions.allow_tf32
    matmul.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, convolutions.allow_tf32 = before


# --- files ----------------------------------------------------------------------------------------------


def save_features(network: ByteNetwork, path: Path, *, name: str, source_sha256: str | None = None) -> HashedFile:
    """Write a feature network. Equal weights give equal bytes.

    Args:
        name: what distances are called after: `resnet56` makes an `fd-resnet56`.
        source_sha256: hash of the file the weights were imported from, if any.

    Raises:
        BadValue: a name that is reserved, or cannot be part of a distance's name.
        CheckpointError: the file cannot be written.
    """
    _check_name(name, network.kind)
    about: dict[str, Any] = {"name": name, "settings": network.settings}
    if name != network.kind:
        about["kind"] = network.kind
    if source_sha256 is not None:
        about["source_sha256"] = source_sha256
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    # One entry: safetensors keeps no order among several, and the hash must not vary.
    metadata = {_METADATA: canonical_json(about)}
    try:
        write_bytes_atomically(path, save(state, metadata))
    except OSError as error:
        raise CheckpointError(f"cannot write the features {path}: {error.strerror or error}") from error
    return HashedFile(path=str(path), sha256=sha256_of_file(path))


def _check_name(name: str, kind: str) -> None:
    if protocol.INCEPTION in (name, kind):
        raise BadValue(
            f"{protocol.INCEPTION!r} is reserved for the published TorchScript, used as it is: give its path and "
            f"sha256 {protocol.INCEPTION_SHA256[:16]}..., or choose another name for other features"
        )
    if name in FEATURE_NETWORKS and name != kind:
        raise BadValue(f"{name!r} is the name of another kind of features than {kind!r}; choose another")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise BadValue(f"features are called {name!r}; use small letters, digits, '.', '_' and '-', such as resnet56")


def load_features(file: HashedFile, device: str = "cpu") -> FeatureNetwork:
    """The feature network in a file, frozen. The file is hashed each time, the network kept in memory.

    Raises:
        CheckpointError: the file is missing, altered, or no feature network; or TorchScript other than
            the published Inception.
    """
    check_file(file)
    return _load(file.path, file.sha256, device)


@lru_cache(maxsize=4)
def _load(path: str, sha256: str, device: str) -> FeatureNetwork:
    network: ByteNetwork
    if sha256 == protocol.INCEPTION_SHA256:
        name, network = protocol.INCEPTION, Inception(Path(path))
    else:
        _refuse_code(path)
        name, network = _read(path)
    network.eval().requires_grad_(False)
    return FeatureNetwork(name=name, sha256=sha256, network=network.to(device), device=device)


def _refuse_code(path: str) -> None:
    """TorchScript is a zip file whose programs run when it is loaded or called, so only a known one is."""
    with Path(path).open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            raise CheckpointError(
                f"{path} looks like TorchScript, which is code, and only the published Inception is run: the file "
                f"inception-2015-12-05.pt of sha256 {protocol.INCEPTION_SHA256}; fetch that one, or give safetensors"
            )


def _read(path: str) -> tuple[str, ByteNetwork]:
    """Name and network of a file of `save_features`."""
    try:
        with safe_open(path, framework="pt") as opened:
            about: dict[str, Any] = json.loads((opened.metadata() or {})[_METADATA])
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        name = about["name"]
        kind = about.get("kind", name)
        _check_name(name, kind)
        network = FEATURE_NETWORKS[kind](**about["settings"])
        network.load_state_dict(state)
    except (SafetensorError, BadValue, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no feature network of this project: {error}") from error
    return name, network


# --- weights from elsewhere -----------------------------------------------------------------------------


def import_features(source: Path, destination: Path, *, name: str) -> HashedFile:
    """Turn published weights into a file of `save_features`; so far those of a CIFAR ResNet, its depth found.

    Args:
        source: safetensors with the keys of `CifarResNet`.
        name: what the features are to be called, such as `resnet56`.

    Raises:
        BadValue: a name that is reserved, or cannot be part of a distance's name.
        CheckpointError: the source is unreadable or of another architecture; the message names the tensor.
            Or the destination cannot be written.
    """
    _check_name(name, CifarResNet.kind)
    try:
        sha256 = sha256_of_file(source)
        with safe_open(source, framework="pt") as opened:
            # Counters of batches say nothing about the network; some exports have them.
            keys = [key for key in opened.keys() if not key.endswith(".num_batches_tracked")]  # noqa: SIM118
            state = {key: opened.get_tensor(key) for key in keys}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{source} cannot be read as safetensors: {error}; give published weights") from error
    num_blocks = len({key.split(".")[1] for key in state if key.startswith("layer1.")})
    # With no block at all it is none of ours; the comparison then names what is missing.
    num_classes = state["linear.weight"].numel() // CifarResNet.width if "linear.weight" in state else 10
    network = CifarResNet(depth=6 * max(num_blocks, 1) + 2, num_classes=max(num_classes, 1))
    _require_tensors(source, state, network)
    network.load_state_dict(state)
    return save_features(network, destination, name=name, source_sha256=sha256)


def _require_tensors(source: Path, state: dict[str, Tensor], network: CifarResNet) -> None:
    """Refuse a file whose tensors are not the network's, naming the first that is not.

    Raises:
        CheckpointError: as said.
    """
    expected = {key: tensor.shape for key, tensor in network.state_dict().items()}
    for key in [*expected, *state]:
        if key not in state:
            problem = f"it has no tensor {key!r}"
        elif key not in expected:
            problem = f"its tensor {key!r} has no place there"
        elif state[key].shape != expected[key]:
            problem = f"its tensor {key!r} is {list(state[key].shape)}, not {list(expected[key])}"
        elif not (state[key].is_floating_point() and bool(state[key].isfinite().all())):
            problem = f"its tensor {key!r} holds something else than finite floating-point numbers"
        else:
            continue
        depth = network.settings["depth"]
        raise CheckpointError(f"{source} is no CIFAR ResNet of depth {depth}: {problem}; import weights of one")
