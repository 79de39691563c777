"""Rules that learn branch weights while a student trains. Experimental (spec/methods.md 5.1).

Both look at where the endpoint wants to go, on trajectories that the student has not seen yet:

- `gate` (after Du et al., arXiv 1812.02224): a branch counts as far as its gradient agrees with the endpoint's.
- `meta` (after Auto-Lambda, arXiv 2202.03091): shares move to the branches whose step would lower the endpoint's loss
  on held-out noise, to first order.

Neither descends on the weighted loss itself: its gradient with respect to w_k is L_k >= 0, which sends all weight to
the branch that is easiest, not to the one that helps.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d, cosine_similarity

from bdense_core.errors import BadValue
from bdense_core.loops.sfd import Grid, branch_losses, branch_states, first_states
from bdense_core.loops.sfd_targets import Batch
from bdense_core.methods.sfd import SFD
from bdense_core.networks import Denoiser
from bdense_core.weights import Rule

EVERY = 10
"""Iterations from one look at the gradients to the next; in between the weights stay."""
META_RATE = 4.0
"""How far the logarithm of a weight moves over a whole run in which its branch's cosine is always 1. A choice of ours:
on the digits (two seeds) 4 and 8 did alike and 2 worse."""

_STATE = "rule.factors"


def relative_work(rule: Rule, num_branches: int) -> float:
    """What a rule's iteration costs, its looks among it, beside one with fixed weights: in network evaluations.

    Plain training takes 3 for each image and trained interval, as going back counts as two. In each look `gate` asks
    the network once; the passes through the head alone, K of some 0.1% each, are left out. `meta` runs each half of the
    rows once, goes back once for each branch on one half, and once on the other.
    """
    looks = {"fixed": 0.0, "gate": 1.0, "meta": 1.0 + 2 * (num_branches + 1) / 2}
    return 1.0 + looks[rule] / EVERY / 3


class Learned(ABC):
    """Factors on a run's weights, [J', K], 1 at first, found by looking at a student's gradients now and then.

    A look takes the student as it is at the beginning of an iteration, without dropout, down the grid from fresh noise;
    it draws no random number and changes no gradient, so what it costs is time alone, which the run pays for with
    iterations (`relative_work`).

    Args:
        grid: its J' trained intervals and K branches.
        rows: of a batch, that a look takes; fewer for a device with little memory.
    """

    def __init__(self, grid: Grid, rows: int, device: torch.device) -> None:
        self._grid, self._rows = grid, rows
        self.factors = torch.ones(grid.num_intervals - grid.first_trained, grid.inner.shape[1], device=device)

    def look(self, network: Denoiser, batch: Batch) -> None:
        """Take what a batch says that the network is about to be trained on."""
        taken = slice(0, self._rows)
        labels = None if batch.labels is None else batch.labels[taken]
        network.eval()
        cosines = self._cosines(network, Batch(batch.noise[taken], labels, batch.states[taken]))
        network.train()
        self._learn(cosines.nan_to_num(0.0))  # a gradient that overflows in float16 says nothing

    def applied(self, weights: Tensor) -> Tensor:
        """The weights [J', K] as the rule has them now."""
        return weights * self.factors

    def state(self) -> dict[str, Tensor]:
        """What a snapshot needs to go on."""
        return {_STATE: self.factors}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to a `state`."""
        self.factors = tensors[_STATE].to(self.factors)

    @abstractmethod
    def _cosines(self, network: Denoiser, batch: Batch) -> Tensor:
        """How each branch agrees with the endpoint, [J', K]."""

    @abstractmethod
    def _learn(self, cosines: Tensor) -> None:
        """Take them into the factors."""


class Gate(Learned):
    """w_k max(0, cos(g_k, g_K)), g being the gradient at the input of the head, the last thing all branches share."""

    def _cosines(self, network: Denoiser, batch: Batch) -> Tensor:
        return head_cosines(network, batch, self._grid)

    def _learn(self, cosines: Tensor) -> None:
        self.factors = cosines.clamp(min=0.0)
        self.factors[:, -1] = 1.0  # also where its gradient vanishes


class Meta(Learned):
    """Shares whose logarithms move by the cosine of g_k with the held-out endpoint's gradient.

    That cosine is, up to a factor, how fast the held-out endpoint's loss falls along a step down L_k alone.

    Args:
        num_looks: in the whole run.
    """

    def __init__(self, grid: Grid, rows: int, device: torch.device, *, num_looks: int) -> None:
        super().__init__(grid, rows, device)
        self._rate = META_RATE / num_looks

    def applied(self, weights: Tensor) -> Tensor:
        """A softmax in effect: an interval's sum stays. Adam would cancel it, half precision would not."""
        found = super().applied(weights)
        return found / found.sum(1, keepdim=True) * weights.sum(1, keepdim=True)

    def _cosines(self, network: Denoiser, batch: Batch) -> Tensor:
        return lookahead_cosines(network, batch, self._grid)

    def _learn(self, cosines: Tensor) -> None:
        self.factors = self.factors * (self._rate * cosines).exp()


def make_rule(
    rule: Rule, method: SFD, grid: Grid, device: torch.device, *, micro_batch: int | None, num_looks: int
) -> Learned | None:
    """What learns the weights of a run, in so many looks; None where they are fixed.

    Raises:
        BadValue: `meta` with batches of one row, of which none can be held out.
    """
    rows = min(method.batch, micro_batch or method.batch)
    if rule == "gate":
        return Gate(grid, rows, device)
    if rule == "meta":
        if rows < 2:
            raise BadValue("rule meta holds out half of a batch; give a method.batch and resources.micro_batch of 2")
        return Meta(grid, rows, device, num_looks=num_looks)
    return None


@torch.no_grad()
def head_cosines(network: Denoiser, batch: Batch, grid: Grid) -> Tensor:
    """cos(g_k, g_K) of the gradients of the branch losses at the head's input, [J', K].

    No pass back is needed: L_k is a sum of absolute errors, and branch k's state is the head's k-th output times a
    positive number, the same for all rows, plus what does not depend on it (see `branch_states`). So g_k is, up to
    that number, the transposed convolution of the errors' signs with the head's k-th group of weights. (With
    preconditionings of negative c_out all g_k change their sign together.)
    """
    head = network.get_submodule(network.head_name)
    assert isinstance(head, nn.Conv2d) and not isinstance(head.padding, str)
    groups = head.weight.float().chunk(grid.inner.shape[1])
    cosines = []
    for predicted, target in _intervals(network, batch, grid):
        signs = (predicted - target).sign().unbind(1)  # K of [B, C, H, W]
        gradients = [
            conv_transpose2d(sign, group, padding=head.padding).flatten()
            for sign, group in zip(signs, groups, strict=True)
        ]
        cosines.append(torch.stack([cosine_similarity(g, gradients[-1], dim=0) for g in gradients]))
    return torch.stack(cosines)


def lookahead_cosines(network: Denoiser, batch: Batch, grid: Grid) -> Tensor:
    """cos(g_k, h) over all parameters that branches share, [J', K].

    g_k is the gradient of branch k's loss on the first half of the rows, h that of the endpoint's on the others.
    """
    half = len(batch.noise) // 2
    tried, held_out = (_intervals(network, _part(batch, rows), grid) for rows in (slice(half), slice(half, None)))
    shared = [p for name, p in network.named_parameters() if not name.startswith(f"{network.head_name}.")]

    def gradient(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, shared, retain_graph=True, materialize_grads=True)
        return torch.cat([g.flatten().float() for g in found])

    cosines = []
    for before, after in zip(tried, held_out, strict=True):
        wanted = gradient(branch_losses(*after)[-1])
        cosines.append(
            torch.stack([cosine_similarity(gradient(loss), wanted, dim=0) for loss in branch_losses(*before)])
        )
    return torch.stack(cosines)


def _intervals(network: Denoiser, batch: Batch, grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """The branches' states and their targets in each trained interval, [B, K, C, H, W], of a network that stands still.

    An interval begins at the endpoint of the one before, detached, as in training.
    """
    x = first_states(batch.noise, grid)
    for j, target in enumerate(batch.states.unbind(1), start=grid.first_trained):
        predicted = branch_states(network, x, grid.student[j], grid.inner[j], batch.labels)
        yield predicted, target
        x = predicted[:, -1].detach()


def _part(batch: Batch, rows: slice) -> Batch:
    labels = None if batch.labels is None else batch.labels[rows]
    return Batch(batch.noise[rows], labels, batch.states[rows])
