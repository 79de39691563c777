"""Adam's moments by the names of their parameters: what a snapshot keeps of an optimizer."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

_KEYS = ("step", "exp_avg", "exp_avg_sq")


def kept_moments(optimizer: Optimizer, parameters: Mapping[str, Parameter], *, prefix: str) -> dict[str, Tensor]:
    """All that there are, called `prefix.moment.parameter`; a parameter that never had a gradient has none."""
    return {
        f"{prefix}.{key}.{name}": moment
        for name, parameter in parameters.items()
        for key, moment in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(
    optimizer: Optimizer, parameters: Mapping[str, Parameter], tensors: Mapping[str, Tensor], *, prefix: str
) -> None:
    """The inverse of `kept_moments`; other tensors may be among those."""
    for name, parameter in parameters.items():
        moments = {key: tensors.get(f"{prefix}.{key}.{name}") for key in _KEYS}
        if all(moment is not None for moment in moments.values()):
            optimizer.state[parameter] = {
                key: _placed(optimizer, key, parameter, moment) for key, moment in moments.items() if moment is not None
            }


def _placed(optimizer: Optimizer, key: str, parameter: Parameter, moment: Tensor) -> Tensor:
    """Laid out in memory as the parameter is; the count of steps stays on the CPU unless one kernel does it all."""
    if key == "step":
        return moment.to(parameter.device) if optimizer.defaults.get("fused") else moment.clone()
    return torch.empty_like(parameter).copy_(moment)
