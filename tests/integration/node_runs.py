"""Questions to the nodes of a real cluster for test_nodes.py, in a process of its own. Prints all answers as JSON."""

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from search import ray_environment
from tests.patience import PATIENCE_S
from tests.ray_cluster import Cluster

_cluster = Cluster()
os.environ.update(_cluster.environment)
ray_environment.prepare("a cluster")

import ray  # noqa: E402

from search import nodes, placement  # noqa: E402
from search.errors import ClusterError  # noqa: E402
from search.nodes import NodeCheck  # noqa: E402
from search.sections import ResourcesSection  # noqa: E402
from search.version import versions  # noqa: E402

_PROBE = nodes._probe
SOMETHING = ResourcesSection(cpus=1)


def check(asked: NodeCheck) -> list[str]:
    """Its warnings, or the error."""
    try:
        return asked.run()
    except ClusterError as error:
        return [f"ClusterError: {error}"]


def first() -> dict[str, Any]:
    """One node, asked by launchers of their own."""
    answers = {"fine": check(NodeCheck(SOMETHING))}
    answers["no such file"] = check(NodeCheck(SOMETHING, files=["/nowhere/teacher"]))
    nodes.versions = lambda: versions() | {"torch": "0.0"}
    answers["other torch"] = check(NodeCheck(SOMETHING))
    nodes.versions = versions
    for name, probe in {"dies": _dies, "fails": _fails}.items():
        nodes._probe = probe
        answers[name] = check(NodeCheck(SOMETHING))
    nodes._probe = _PROBE
    unknown, silent = nodes._ask({"ab" * 28: "nowhere"}, [], [], PATIENCE_S)
    return answers | {"no such node": [unknown, list(silent.values())]}


def joined() -> dict[str, Any]:
    """A second node, and a third that is gone as soon as it is asked."""
    ours = NodeCheck(SOMETHING)
    answers = {"before": check(ours)}
    _cluster.add_node()
    nodes._SILENT_AGAIN_AFTER_S = 3600.0
    nodes._probe = _dies
    answers["dies"] = check(ours)
    answers["not asked again yet"] = check(ours)
    ours._silent = dict.fromkeys(ours._silent, 0.0)  # the hour is over
    answers["dies again"] = check(ours)
    ours._silent = dict.fromkeys(ours._silent, 0.0)
    nodes._probe = _PROBE
    answers["answers"] = check(ours)
    answers["all asked"] = [len(ours._asked)]
    third = _cluster.add_node()
    nodes._probe = _takes_its_node_along
    answers["takes its node along"] = check(ours)
    _cluster.kill_node(third)
    nodes._probe = _PROBE
    until = time.monotonic() + PATIENCE_S
    while len(nodes._alive()) == 3 and time.monotonic() < until:
        time.sleep(0.1)
    answers["gone"] = check(ours)
    return answers


def _dies() -> Callable[..., Any]:
    def probe(files: list[str], markers: list[str]) -> None:
        os._exit(1)

    return probe


def _fails() -> Callable[..., Any]:
    def probe(files: list[str], markers: list[str]) -> None:
        raise ValueError("not on this node")

    return probe


def _takes_its_node_along() -> Callable[..., Any]:
    def probe(files: list[str], markers: list[str]) -> None:
        os.kill(os.getppid(), signal.SIGKILL)  # the node's raylet
        time.sleep(PATIENCE_S)

    return probe


if __name__ == "__main__":
    try:
        _cluster.add_node()
        with placement.cluster(_cluster.address):
            told = {"first": first(), "joined": joined()}
            assert ray.is_initialized()
    finally:
        _cluster.end()
    print(json.dumps(told))
