"""What a network is built from: its configuration, the published sizes, and EDM's own arguments.

Nothing here needs torch, so a study can be validated without it.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from bdense_core.errors import BadValue, UnknownKey

Architecture = Literal["song", "dhariwal", "ddpm"]
Preconditioning = Literal["edm", "vp", "ve", "x", "eps", "v", "both", "linear", "cosine"]
EmbeddingType = Literal["positional", "fourier"]
EncoderType = Literal["standard", "skip", "residual"]
DecoderType = Literal["standard", "skip"]

VP_BETA_D, VP_BETA_MIN, VP_STEPS = 19.9, 0.1, 1000  # arXiv 2206.00364, table 1


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Everything needed to build a network; equal configurations give equal state dict layouts.

    Attributes:
        channel_mult: channels of each resolution level, as multiples of `model_channels`.
        attn_resolutions: resolutions with self-attention; the first middle block has it anyway.
        label_dim: number of classes, 0 for an unconditional network.
        augment_dim: width of the augmentation vector, 0 for none.
        label_dropout: chance that a label is replaced by zeros (ddpm: by the null token) in training.
        num_branches: K, the number of output groups of the head.
        norm_groups: groups of every group normalisation of ddpm; the others choose theirs by the width.

    Raises:
        BadValue: a value no network can be built from; the message names the key.
    """

    architecture: Architecture
    preconditioning: Preconditioning = "edm"
    img_resolution: int
    img_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int
    channel_mult: tuple[int, ...]
    channel_mult_emb: int = 4
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    dropout: float = 0.10
    label_dropout: float = 0.0
    embedding_type: EmbeddingType = "positional"
    channel_mult_noise: int = 1
    encoder_type: EncoderType = "standard"
    decoder_type: DecoderType = "standard"
    resample_filter: tuple[int, ...] = (1, 1)
    sigma_data: float = 0.5
    num_branches: int = 1
    norm_groups: int = 32

    def __post_init__(self) -> None:
        for key in ("channel_mult", "attn_resolutions", "resample_filter"):
            object.__setattr__(self, key, _int_tuple(key, getattr(self, key)))
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise BadValue(f"network.{key} is {getattr(self, key)!r}; choose one of {', '.join(choices)}")
        for key, lowest in _LOWEST_INT.items():
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise BadValue(f"network.{key} is {value!r}; give a whole number of at least {lowest}")
        for key in ("dropout", "label_dropout"):
            if not _is_number(getattr(self, key)) or not 0 <= getattr(self, key) < 1:
                raise BadValue(f"network.{key} is {getattr(self, key)!r}; give a number in [0, 1)")
        if not _is_number(self.sigma_data) or not 0 < self.sigma_data < math.inf:
            raise BadValue(f"network.sigma_data is {self.sigma_data!r}; give a positive number")
        self._check_levels()
        self._check_combinations()

    def _check_levels(self) -> None:
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise BadValue(f"network.channel_mult is {list(self.channel_mult)}; give one positive number a level")
        if self.img_resolution % 2 ** (len(self.channel_mult) - 1):
            raise BadValue(
                f"network.img_resolution is {self.img_resolution}, which cannot be halved "
                f"{len(self.channel_mult) - 1} times; shorten network.channel_mult"
            )
        taps = self.resample_filter
        if not taps or len(taps) % 2 or sum(taps) == 0:
            raise BadValue(f"network.resample_filter is {list(taps)}; give an even number of taps, e.g. [1, 1]")

    def _check_combinations(self) -> None:
        if self.num_branches > 1 and self.decoder_type == "skip":
            raise BadValue(
                f"network.num_branches is {self.num_branches}, but the skip decoder adds the outputs of "
                "several levels and has no single head to repeat; use decoder_type standard"
            )
        for key, only in _FIXED[self.architecture].items():
            if getattr(self, key) != only:
                raise BadValue(
                    f"network.{key} is {getattr(self, key)!r}; the {self.architecture} architecture wants {only!r}"
                )
        if self.architecture == "ddpm" and (self.model_channels % 2 or self.model_channels % self.norm_groups):
            raise BadValue(
                f"network.model_channels is {self.model_channels}; the ddpm architecture wants an even number that "
                f"network.norm_groups ({self.norm_groups}) divides"
            )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Resolution of each level, finest first."""
        return tuple(self.img_resolution >> level for level in range(len(self.channel_mult)))

    @property
    def head_channels(self) -> int:
        """Channels of one branch of the raw output F: C, or 2 C where image and noise are both predicted."""
        return self.img_channels * (2 if self.preconditioning == "both" else 1)

    @property
    def out_channels(self) -> int:
        """Channels of the raw output F, K groups of `head_channels`."""
        return self.num_branches * self.head_channels

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values.

        Keys that came later are left out where they change nothing: older files stay reproducible to the byte.
        """
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        return {key: v for key, v in values.items() if key not in _LATER or v != _LATER[key]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            UnknownKey: a key no network has; the message names the nearest one.
            BadValue: a missing or impossible value.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise _unknown_key(key, known)
        required = ("architecture", "img_resolution", "img_channels", *_ARCHITECTURE_KEYS)
        if missing := [key for key in required if key not in values]:
            raise BadValue(f"network lacks {', '.join(missing)}; give each of them")
        return cls(**values)

    @classmethod
    def ddpmpp(cls, *, img_resolution: int, img_channels: int = 3, **overrides: Any) -> Self:
        """DDPM++ with the sizes EDM trained at 32x32 (55.7M parameters on CIFAR-10)."""
        return cls.from_dict(
            {
                "img_resolution": img_resolution,
                "img_channels": img_channels,
                **_SONG,
                "channel_mult": (2, 2, 2),
            }
            | overrides
        )

    @classmethod
    def ncsnpp(cls, *, img_resolution: int, img_channels: int = 3, **overrides: Any) -> Self:
        """NCSN++: Fourier embedding, residual encoder and a four-tap filter."""
        return cls.ddpmpp(img_resolution=img_resolution, img_channels=img_channels, **_NCSNPP | overrides)

    @classmethod
    def adm(cls, *, img_resolution: int, img_channels: int = 3, **overrides: Any) -> Self:
        """ADM with the sizes of ImageNet-64 (295.9M parameters with 1000 labels)."""
        return cls.from_dict({"img_resolution": img_resolution, "img_channels": img_channels, **_DHARIWAL} | overrides)

    @classmethod
    def ddpm(cls, *, img_resolution: int, img_channels: int = 3, **overrides: Any) -> Self:
        """DDPM with its sizes at 32x32 (35.7M parameters on CIFAR-10; those of DASH's teacher with 10 labels)."""
        return cls.from_dict({"img_resolution": img_resolution, "img_channels": img_channels, **_DDPM} | overrides)

    @classmethod
    def from_edm_kwargs(cls, class_name: str, kwargs: Mapping[str, Any]) -> Self:
        """The configuration behind the `init_kwargs` stored in a published EDM checkpoint.

        Args:
            class_name: name of the wrapper, such as `EDMPrecond`.
            kwargs: the wrapper's keyword arguments, those of the U-Net among them. What was left out
                has the default of that U-Net class; half precision and sigma limits are not part of
                a network here and are dropped.

        Raises:
            BadValue: a wrapper or U-Net that is not supported, or other VP constants.
            UnknownKey: an argument without counterpart.
        """
        if class_name not in _EDM_WRAPPERS:
            raise BadValue(f"EDM wrapper {class_name!r} is not supported; known are {', '.join(_EDM_WRAPPERS)}")
        values = {key: value for key, value in kwargs.items() if key not in _EDM_DROPPED}
        for key, only in _EDM_FIXED.items():
            if values.pop(key, only) != only:
                raise BadValue(f"EDM argument {key} is {kwargs[key]!r}; only {only} is supported")
        preconditioning, default_type = _EDM_WRAPPERS[class_name]
        model_type = values.pop("model_type", default_type)
        if model_type not in _EDM_MODELS:
            raise BadValue(f"EDM model_type {model_type!r} is not supported; known are {', '.join(_EDM_MODELS)}")
        return cls.from_dict({"preconditioning": preconditioning, **_EDM_MODELS[model_type], **values})


_ARCHITECTURE_KEYS = ("model_channels", "channel_mult", "num_blocks", "attn_resolutions")
_CHOICES: dict[str, tuple[str, ...]] = {
    "architecture": get_args(Architecture),
    "preconditioning": get_args(Preconditioning),
    "embedding_type": get_args(EmbeddingType),
    "encoder_type": get_args(EncoderType),
    "decoder_type": get_args(DecoderType),
}
_LOWEST_INT = {
    "img_resolution": 1,
    "img_channels": 1,
    "label_dim": 0,
    "augment_dim": 0,
    "model_channels": 4,
    "channel_mult_emb": 1,
    "num_blocks": 1,
    "channel_mult_noise": 1,
    "num_branches": 1,
    "norm_groups": 1,
}
_LATER: dict[str, Any] = {"norm_groups": 32}
_PLAIN: dict[str, Any] = {
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": (1, 1),
}
_FIXED: dict[str, dict[str, Any]] = {
    "song": {"norm_groups": 32},
    "dhariwal": _PLAIN | {"norm_groups": 32},
    "ddpm": _PLAIN | {"augment_dim": 0},
}
"""What an architecture does not let one choose."""
# Sizes and dropout of the two U-Net classes where a published configuration leaves them out.
_SONG: dict[str, Any] = {
    "architecture": "song",
    "model_channels": 128,
    "channel_mult": (1, 2, 2, 2),
    "num_blocks": 4,
    "attn_resolutions": (16,),
}
_DHARIWAL: dict[str, Any] = {
    "architecture": "dhariwal",
    "model_channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "num_blocks": 3,
    "attn_resolutions": (32, 16, 8),
}
_DDPM: dict[str, Any] = {
    "architecture": "ddpm",
    "preconditioning": "linear",
    "model_channels": 128,
    "channel_mult": (1, 2, 2, 2),
    "num_blocks": 2,
    "attn_resolutions": (16,),
}
_NCSNPP: dict[str, Any] = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": (1, 3, 3, 1),
}
_EDM_WRAPPERS = {
    "EDMPrecond": ("edm", "DhariwalUNet"),
    "VPPrecond": ("vp", "SongUNet"),
    "VEPrecond": ("ve", "SongUNet"),
}
_EDM_MODELS = {"SongUNet": _SONG, "DhariwalUNet": _DHARIWAL}
_EDM_DROPPED = ("use_fp16", "sigma_min", "sigma_max", "epsilon_t")
_EDM_FIXED = {"beta_d": VP_BETA_D, "beta_min": VP_BETA_MIN, "M": VP_STEPS}


def _int_tuple(key: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
        raise BadValue(f"network.{key} is {value!r}; give a list of whole numbers")
    return tuple(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unknown_key(key: str, known: list[str]) -> UnknownKey:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean network.{near[0]}?" if near else f"known are {', '.join(known)}"
    return UnknownKey(f"unknown key network.{key}; {hint}")
