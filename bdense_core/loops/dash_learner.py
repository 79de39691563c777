"""One update of a network in DASH, student or teacher: AdamW, clipping, moving average (spec/methods.md 3)."""

import copy
import math
from collections.abc import Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from bdense_core.branches import freeze
from bdense_core.errors import CheckpointError
from bdense_core.moments import kept_moments, restore_moments

Network = TypeVar("Network", bound=nn.Module)


class Learner(Generic[Network]):
    """A network in training: AdamW, a limit on the gradient's norm, and the moving average that is kept in the end.

    The average starts as a copy, and is neither warmed up nor corrected, as the authors'.

    Args:
        logits: trained beside the network by the same AdamW, without that limit: a teacher's curriculum, [T].
    """

    def __init__(
        self,
        network: Network,
        *,
        lr: float,
        weight_decay: float,
        ema: float,
        grad_clip: float,
        logits: nn.Parameter | None = None,
    ) -> None:
        self.network = network
        self.average = freeze(copy.deepcopy(network))
        self._ema, self._grad_clip = ema, grad_clip
        self._trained = dict(network.named_parameters()) | ({} if logits is None else {"tirt.logits": logits})
        on_gpu = next(network.parameters()).device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self._trained.values(),
            lr=lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=weight_decay,
            fused=True if on_gpu else None,
        )

    def step(self, rate: float) -> Tensor:
        """One update down the gradients found so far; returns their norm, before it was limited."""
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - self._ema)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Weights, their average and AdamW's moments, by name."""
        tensors = {f"network.{name}": parameter.detach() for name, parameter in self._trained.items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        return tensors | kept_moments(self.optimizer, self._trained, prefix="adamw")

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to a `state`.

        Raises:
            CheckpointError: it is another network's.
        """
        try:
            with torch.no_grad():
                for name, parameter in self._trained.items():
                    parameter.copy_(tensors[f"network.{name}"])
            average = {name: tensors[f"average.{name}"] for name in self.average.state_dict()}
            self.average.load_state_dict(average)
        except (KeyError, RuntimeError) as error:
            detail = " ".join(str(error).split())[:300]
            raise CheckpointError(f"the snapshot is another network's: {detail}; choose another folder") from error
        restore_moments(self.optimizer, self._trained, tensors, prefix="adamw")


def cosine_rate(lr: float, lr_min: float, epoch: int, num_epochs: int) -> float:
    """The learning rate of an epoch, counted from 0: half a cosine from `lr` to `lr_min` at the end of the last."""
    return lr_min + (lr - lr_min) * (1 + math.cos(math.pi * epoch / num_epochs)) / 2
