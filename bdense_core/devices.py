"""Where networks compute: a device that exists, set up for exact float32, and networks placed on it."""

import torch

from bdense_core.errors import BadValue
from bdense_core.networks import Denoiser


def check_device(name: str) -> torch.device:
    """The device of a name such as `cpu`, `cuda` or `cuda:1`, ready for work.

    On a GPU convolutions in float32 would otherwise round to TF32, of ten bits; and the fastest algorithm for each
    shape is looked for, since shapes repeat. That choice goes by time: two runs may round differently.

    Raises:
        BadValue: torch does not know the name, or sees no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadValue(_unknown(name)) from error
    if device.type not in ("cpu", "cuda"):
        raise BadValue(_unknown(name))
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise BadValue(
                f"device {name} is asked for, but torch {torch.__version__} sees {found} GPU(s) on this machine; "
                "run it where one is, install a torch built for it, or ask for none (resources.gpus: 0, --device cpu)"
            )
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    return device


def _unknown(name: str) -> str:
    return f"device is {name!r}; give cpu, cuda or cuda:NUMBER"


def place(network: Denoiser, device: torch.device) -> Denoiser:
    """The network on the device, its convolutions laid out as tensor cores want them."""
    if device.type == "cuda":
        return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
    return network.to(device)
