"""Published weights of DDPM (arXiv 2006.11239) by the names that two PyTorch projects gave them.

"Original": the names that this library has too, as in the files of github.com/pesser/pytorch_diffusion (.ckpt).
"Diffusers": those of `UNet2DModel` in Hugging Face's diffusers, of before and after its attention layers were renamed.
Both are bare state dicts, in safetensors or as `torch.save` writes them. The latter are pickles, which torch reads as
weights alone; what wants more is refused.

Such a file does not say what network it is of: that is read off the names and shapes. Those do not tell DDPM's network
from others that diffusers builds, which compute otherwise, so diffusers' `config.json` has to lie beside its weights.
"""

import json
import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from bdense_core.errors import BadValue, CheckpointError
from bdense_core.files import sha256_of_file
from bdense_core.integrity import METADATA
from bdense_core.network_config import NetworkConfig

ATTENTION = 16
"""DDPM attends at this resolution alone, whatever the images' (arXiv 2006.11239, appendix B)."""
DROPOUT = 0.1
"""On CIFAR-10, its only images of 32x32; none on larger ones (appendix B)."""

_ZIP = b"PK\x03\x04"
_TORCH_BEFORE_ZIP = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # its magic number, pickled
_DAMAGE = (
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError),
    struct.error,
)
"""What torch has been seen to raise at files with bytes changed or cut off, beside `UnpicklingError`."""
_FROM_DIFFUSERS = (
    ("time_embedding.linear_1.", "temb.dense.0."),
    ("time_embedding.linear_2.", "temb.dense.1."),
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("down_blocks.", "down."),
    (".resnets.", ".block."),
    (".attentions.", ".attn."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".time_emb_proj.", ".temb_proj."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".group_norm.", ".norm."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".proj_out."),
    (".query.", ".q."),
    (".key.", ".k."),
    (".value.", ".v."),
    (".proj_attn.", ".proj_out."),
    ("conv_norm_out.", "norm_out."),
)
_AS_DDPM = {
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
}
"""What makes a `UNet2DModel` compute as DDPM's network does; its defaults are others."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DDPMWeights:
    """A network of published weights.

    Attributes:
        state: parameters by the names of `Denoiser`, on the CPU, in the type that the file has.
        names: whose names the file had, "original" or "diffusers".
        sha256: of the whole file.
    """

    config: NetworkConfig
    state: dict[str, Tensor]
    names: str
    sha256: str


def holds_weights(path: Path) -> bool:
    """Whether a file begins as safetensors or as what `torch.save` writes. False if it cannot be read."""
    try:
        with path.open("rb") as file:
            begin = file.read(16)
    except OSError:
        return False
    return begin.startswith((_ZIP, _TORCH_BEFORE_ZIP)) or begin[8:9] == b"{"


def read_ddpm_weights(path: Path) -> DDPMWeights:
    """The weights in a file and the network they are of.

    Raises:
        CheckpointError: the file is missing or damaged, wants more than to be read, or holds something else.
    """
    try:
        digest = sha256_of_file(path)
        state = _tensors(path)
        names = "diffusers" if any(name.startswith("down_blocks.") for name in state) else "original"
        if names == "diffusers":
            _check_settings(path)
            state = _renamed(state)
        config = _config(state)
    except OSError as error:
        raise CheckpointError(f"cannot read the weights {path}: {error.strerror or error}") from error
    except BadValue as error:
        raise CheckpointError(f"{path} holds no network of DDPM: {error}") from error
    except KeyError as error:
        raise CheckpointError(
            f"{path} holds no network of DDPM: it lacks {error}; give the weights of its U-Net, "
            "by the names of pytorch_diffusion or of diffusers"
        ) from error
    state = {f"model.{name}": tensor for name, tensor in state.items()}
    return DDPMWeights(config=config, state=state, names=names, sha256=digest)


def _tensors(path: Path) -> dict[str, Tensor]:
    """What the file holds, by name; nothing but tensors."""
    with path.open("rb") as file:
        content = _safetensors(path) if file.read(9)[8:] == b"{" else _torch_file(path)
    if not isinstance(content, dict) or not all(map(_is_weight, content.items())):
        raise CheckpointError(
            f"{path} holds more than the weights of one network; save the state dict of the averaged network "
            "(EMA) alone, and give that"
        )
    numbers, size = sum(tensor.numel() for tensor in content.values()), path.stat().st_size
    if numbers > size:  # a tensor can claim any size by reading one number again and again
        raise CheckpointError(f"{path} is damaged: it claims {numbers} numbers in {size} bytes; fetch it again")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}  # as DataParallel names them


def _is_weight(entry: tuple[object, object]) -> bool:
    name, tensor = entry
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        return False
    return tensor.is_floating_point() and tensor.layout == torch.strided


def _check_settings(path: Path) -> None:
    """Whether the settings beside weights of diffusers are those of DDPM's network."""
    beside = path.with_name("config.json")
    try:
        settings = dict(json.loads(beside.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} has the names of diffusers, but {beside} cannot be read ({error}); put the config.json that was "
            "published with the weights beside them: it says how their network computes"
        ) from error
    for key, wanted in _AS_DDPM.items():
        found = settings.get(key, "not given")
        if found != wanted:
            raise CheckpointError(
                f"{path} holds no network of DDPM: {key} is {found!r} in {beside}, not {wanted!r}; give weights of DDPM"
            )


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as opened:
            if METADATA in (opened.metadata() or {}):
                raise CheckpointError(
                    f"{path} is no pickle and no published weights; a network of this project needs no import, "
                    "name it as it is"
                )
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}; fetch it again") from error


def _torch_file(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it wants more than weights consist of, or is damaged; nothing of it was run, "
            f"do not open it otherwise ({_told(error)})"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(f"{path} is damaged: {_told(error)}; fetch it again") from error


def _told(error: Exception) -> str:
    """What torch found; the rest of its message advises to trust the file."""
    lines = str(error).splitlines() or [type(error).__name__]
    found = next((line for line in lines if "GLOBAL" in line or "WeightsUnpickler" in line), lines[0])
    return found.rpartition("WeightsUnpickler error: ")[2].strip()[:200]


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the original names. diffusers counts `up_blocks` from the coarsest level, and attends with linear layers."""
    top = max((int(name.split(".")[1]) for name in state if re.match(r"up_blocks\.\d+\.", name)), default=0)
    found = {}
    for theirs, tensor in state.items():
        name = re.sub(r"^up_blocks\.(\d+)\.", lambda level: f"up.{top - int(level[1])}.", theirs)
        for old, new in _FROM_DIFFUSERS:
            name = name.replace(old, new)
        is_linear = tensor.dim() == 2 and re.search(r"\.(q|k|v|proj_out)\.weight$", name)
        found[name] = tensor[:, :, None, None] if is_linear else tensor
    return found


def _config(state: Mapping[str, Tensor]) -> NetworkConfig:
    """What the names and shapes say.

    Raises:
        KeyError: the state lacks a layer that every network of DDPM has.
        BadValue: it is another network.
    """
    width, img_channels = _channels(state, "conv_in")
    levels = list(takewhile(lambda level: f"down.{level}.block.0.conv1.weight" in state, count()))
    blocks = list(takewhile(lambda block: f"down.0.block.{block}.conv1.weight" in state, count()))
    attending = [level for level in levels if f"down.{level}.attn.0.q.weight" in state]
    if len(attending) != 1:
        raise BadValue(f"its encoder attends at {len(attending)} resolutions, DDPM's at one; give weights of DDPM")
    side = ATTENTION << attending[0]
    return NetworkConfig.ddpm(
        img_resolution=side,
        img_channels=img_channels,
        model_channels=width,
        channel_mult=[_channels(state, f"down.{level}.block.0.conv1")[0] // width for level in levels],
        channel_mult_emb=_channels(state, "temb.dense.0")[0] // width,
        num_blocks=len(blocks),
        attn_resolutions=[ATTENTION],
        dropout=DROPOUT if side == 32 else 0.0,
    )


def _channels(state: Mapping[str, Tensor], layer: str) -> tuple[int, int]:
    """What a layer gives and reads."""
    shape = list(state[f"{layer}.weight"].shape)
    if len(shape) < 2 or 0 in shape:
        raise BadValue(f"its {layer}.weight is {shape}; give weights of DDPM")
    return shape[0], shape[1]
