"""The K-fold head of a student: repeat it, drop it.

arXiv 2602.15971: the last layer's weights are repeated K times (C -> K C output channels, K consecutive
groups of C); the backbone is shared and comes from the teacher; only the last group samples.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from bdense_core.errors import BadValue
from bdense_core.networks import Denoiser, build

Network = TypeVar("Network", bound=nn.Module)


def with_branches(network: Denoiser, num_branches: int) -> Denoiser:
    """A copy of an ordinary network whose head is repeated `num_branches` times.

    Raises:
        BadValue: the network already has branches, or its kind of head cannot be repeated.
    """
    if network.config.num_branches != 1:
        raise BadValue(f"the network already has {network.config.num_branches} branches; start from its teacher")
    return _with_head(network, num_branches, lambda tensor: tensor.repeat(num_branches, *[1] * (tensor.ndim - 1)))


def without_branches(student: Denoiser) -> Denoiser:
    """The ordinary network of the last branch: what samples, of the teacher's size."""
    channels = student.config.head_channels
    return _with_head(student, 1, lambda tensor: tensor[-channels:])


def _with_head(network: Denoiser, num_branches: int, transform: Callable[[Tensor], Tensor]) -> Denoiser:
    config = dataclasses.replace(network.config, num_branches=num_branches)
    state = network.state_dict()
    for kind in ("weight", "bias"):
        name = f"{network.head_name}.{kind}"
        state[name] = transform(state[name]).contiguous()
    result = build(config)
    result.load_state_dict(state)
    result.train(network.training)
    parameter = next(network.parameters())
    return result.to(parameter.device, parameter.dtype)


def freeze(network: Network) -> Network:
    """The network in evaluation mode, without gradients."""
    return network.eval().requires_grad_(False)
