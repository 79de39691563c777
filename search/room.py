"""How many trials the cluster has room for, asked of Ray at most once a second."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import (
    state,
)  # public `available_resources` adds the nodes up; whether a trial fits is a node's matter

from search.errors import ClusterError
from search.sections import ResourcesSection

_LOOK_AGAIN_S = 1.0
_EPSILON = 1e-6  # Ray counts in steps of 1e-4


@dataclass(frozen=True, slots=True)
class Node:
    """What a living node has, and what of it nobody holds."""

    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float

    def fits(self, resources: ResourcesSection) -> int:
        """How many trials an otherwise empty node holds."""
        cpus = _times(self.cpus, resources.cpus)
        return min(cpus, _gpu_places(self.gpus, resources.gpus)) if resources.gpus else cpus

    def fits_now(self, resources: ResourcesSection) -> int:
        """How many more trials it holds, taking whatever holds a part of a GPU for a trial of the same size."""
        cpus = _times(self.free_cpus, resources.cpus)
        if not resources.gpus:
            return cpus
        taken = math.ceil((self.gpus - self.free_gpus) / resources.gpus - _EPSILON)
        free = _times(self.free_gpus, resources.gpus)
        return max(0, min(cpus, free, _gpu_places(self.gpus, resources.gpus) - taken))


def _times(available: float, needed: float) -> int:
    return int(available / needed + _EPSILON)


def _gpu_places(gpus: float, needed: float) -> int:
    """A trial has whole GPUs, or a part of one: 0.4 fits twice into each, whatever is left of the others."""
    return _times(gpus, needed) if needed >= 1 else int(gpus) * _times(1.0, needed)


class Room:
    """How many trials of one size fit; follows nodes and other launchers as they come and go."""

    def __init__(self, resources: ResourcesSection) -> None:
        self._resources = resources
        self._looked = -math.inf
        self._total = 0
        self._free = 0
        self._has_fitted = False

    def total(self) -> int:
        """How many of our trials can run at once if nobody else runs any.

        Raises:
            ClusterError: no node is large enough for a single one, nor was one before.
        """
        self._look()
        if not self._has_fitted:
            raise ClusterError(self._too_small())
        return min(self._total, self._resources.max_parallel or self._total)

    def left(self, *, ours: int, held: int) -> int:
        """How many more trials could start now.

        With no room at all it is still 1 if we have none: that one waits for the first place, and
        makes a cluster grow that can.

        Args:
            ours: our trials, those that wait for a place with the others.
            held: places that Ray has given us, with a trial in them or not.
        """
        self._look()
        # Ray's view of what is free lags by a fraction of a second; for a launcher alone, the first term is exact.
        left = min(self._total, self._free + held, self._resources.max_parallel or self._total) - ours
        return max(left, 0 if ours else 1)

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_AGAIN_S:
            return
        self._looked = now
        with contextlib.suppress(
            Exception
        ):  # a cluster that does not answer now: as it was; its loss is seen elsewhere
            nodes = list(_nodes())
            self._total = sum(node.fits(self._resources) for node in nodes)
            self._free = sum(node.fits_now(self._resources) for node in nodes)
            self._has_fitted |= self._total > 0

    def _too_small(self) -> str:
        nodes = [f"{node.cpus:g} CPU and {node.gpus:g} GPU" for node in _nodes()]
        return (
            f"a trial asks for {self._resources.cpus:g} CPU and {self._resources.gpus:g} GPU on one node, and no node "
            f"of the cluster has that ({', '.join(sorted(set(nodes))) or 'none is alive'}); "
            "lower resources.cpus or resources.gpus"
        )


def node_of(entry: dict[str, Any], free: dict[str, float] | None = None) -> Node:
    """A node from its entry in `ray.nodes()`, and what is free of it."""
    has, left = entry["Resources"], free or {}
    return Node(has.get("CPU", 0.0), has.get("GPU", 0.0), left.get("CPU", 0.0), left.get("GPU", 0.0))


def _nodes() -> Iterator[Node]:
    free = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    for entry in ray.nodes():  # type: ignore[no-untyped-call]
        if entry["Alive"]:
            yield node_of(entry, free.get(entry["NodeID"]))
