"""Mixed precision: a network computes in half precision, its weights are kept and updated in float32."""

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from bdense_core.errors import CheckpointError
from bdense_core.moments import kept_moments, restore_moments
from bdense_core.networks import Denoiser

Precision = Literal["float32", "bfloat16", "float16"]

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_KEPT = (".map_", ".affine.", ".temb", ".class_embed.")
"""Parameters of the embedding of noise level and label: cheap, and eight bits are too few for them."""


def in_precision(network: Denoiser, precision: Precision) -> Denoiser:
    """The network itself for float32, else a copy that computes in half precision, but for its embedding."""
    if precision == "float32":
        return network
    result = copy.deepcopy(network)
    for name, parameter in result.named_parameters():
        if not any(part in name for part in _KEPT):
            parameter.data = parameter.data.to(DTYPES[precision])
    return result


class HalfDenoiser:
    """D(x; sigma) in half precision; where it is not finite, as float16 overflows, that call is answered in float32.

    Args:
        half: what is asked first.
        full: the same network in float32; may be the same object.
    """

    def __init__(self, half: Denoiser, full: Denoiser) -> None:
        self.half, self.full = half, full

    def __call__(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """The denoised images of the last branch, [B, C, H, W]; arguments as `Denoiser.forward`'s."""
        denoised: Tensor = self.half(x, sigma, class_labels)
        if self.half is not self.full and not bool(denoised.isfinite().all()):
            denoised = self.full(x, sigma, class_labels)
        return denoised


class Trainee:
    """A network in training, with Adam.

    `student` holds the float32 weights, `network` computes. In float32 they are the same object; else gradients go
    from `network` to `student` and new weights come back (Micikevicius et al., arXiv 1710.03740, section 3.1),
    without loss scaling, as the authors of SFD do (spec/methods.md 1.5).
    """

    def __init__(self, student: Denoiser, optimizer: torch.optim.Optimizer, precision: Precision = "float32") -> None:
        self.student = student
        self.optimizer = optimizer
        self.precision: Precision = precision
        self.network = in_precision(student, precision)

    def begin(self) -> None:
        """Forget the gradients of the last step."""
        self.network.zero_grad(set_to_none=True)
        self.student.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, which `network` has computed."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """One optimizer step down the gradients since `begin`."""
        if self.network is not self.student:
            self._hand_over_gradients()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                # As the authors: NaN gradients count as 0, infinite ones as 1e5.
                torch.nan_to_num(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        self.optimizer.step()
        self.follow()

    def follow(self) -> None:
        """Bring the weights of `student` to `network`, after they have changed."""
        if self.network is not self.student:
            with torch.no_grad():
                torch._foreach_copy_(list(self.network.parameters()), list(self.student.parameters()))

    def state(self) -> dict[str, Tensor]:
        """Weights and the optimizer's moments, by name: what a snapshot needs to go on."""
        tensors = {f"student.{name}": tensor for name, tensor in self.student.state_dict().items()}
        return tensors | kept_moments(self.optimizer, dict(self.student.named_parameters()), prefix="adam")

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to a `state`.

        Raises:
            CheckpointError: it is another network's.
        """
        begin = "student."
        try:
            self.student.load_state_dict({n.removeprefix(begin): t for n, t in tensors.items() if n.startswith(begin)})
        except RuntimeError as error:
            detail = " ".join(str(error).split())[:300]
            raise CheckpointError(f"the snapshot is another network's: {detail}; choose another folder") from error
        restore_moments(self.optimizer, dict(self.student.named_parameters()), tensors, prefix="adam")
        self.follow()

    def fall_back(self) -> bool:
        """From float16 to float32 for the rest of the run, as the authors do where float16 overflows.

        Gradients since `begin` are lost: begin again.

        Returns:
            Whether anything changed: other precisions have nothing to fall back to.
        """
        if self.precision != "float16":
            return False
        self.precision, self.network = "float32", self.student
        return True

    def _hand_over_gradients(self) -> None:
        for master, working in zip(self.student.parameters(), self.network.parameters(), strict=True):
            master.grad = None if working.grad is None else working.grad.to(master.dtype)
