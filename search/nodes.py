"""Does every node of a cluster run the code that this launcher runs, and see the files and folders that it uses?

A node with other code or another torch gives other scores, silently; a study must not mix them. On one without the
teacher every trial fails.
"""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from search import room
from search.errors import ClusterError
from search.sections import ResourcesSection
from search.version import differences, version_reader, versions

_ANSWER_WITHIN_S = 60.0  # a node starts a process for the question, perhaps from a slow network disk
_JOINED_ANSWER_WITHIN_S = 10.0  # trials run meanwhile, and nobody listens to them while we wait
_SILENT_AGAIN_AFTER_S = 300.0


@dataclass(frozen=True, slots=True)
class _Answer:
    node: str
    versions: dict[str, str]
    absent: list[str]
    unseen: list[str]
    read_only: list[str]


class NodeCheck:
    """Asks each node once; `run` it again to have the nodes asked that joined since."""

    def __init__(self, resources: ResourcesSection, *, files: Sequence[str] = (), folders: Sequence[Path] = ()) -> None:
        """
        Args:
            resources: nodes too small for such a trial are not asked.
            files: that trials will read.
            folders: of this machine, there already, that trials will use on theirs.
        """
        self._resources = resources
        self._files = list(files)
        self._folders = [str(folder.resolve()) for folder in folders]
        self._asked: set[str] = set()
        self._silent: dict[str, float] = {}  # when they are asked again

    def run(self) -> list[str]:
        """Ask all nodes that were not asked yet, and wait for their answers; at once if there are none.

        Returns:
            One warning for each folder that a node does not see or cannot write to, or this machine cannot.

        Raises:
            ClusterError: a node has other code or other packages, cannot import the code, or lacks a file; at the
                first time also: it gives no answer. Later that is a warning, given once, and it is asked again after
                minutes. A node that has died meanwhile is none of the cluster.
        """
        new = {
            node_id: _name(node)
            for node_id, node in _alive().items()
            if node_id not in self._asked and not self._waits(node_id)
            if room.node_of(node).fits(self._resources) >= 1
        }
        if not new:
            return []
        with _markers(self._folders) as (markers, unmarked):
            timeout_s = _JOINED_ANSWER_WITHIN_S if self._asked else _ANSWER_WITHIN_S
            answers, silent = _ask(new, self._files, markers, timeout_s)
        if silent:
            silent = {node_id: why for node_id, why in silent.items() if node_id in _alive()}
        no_answer = [
            f"node {new[node_id]} {why}; look at it with `ray status`"
            for node_id, why in silent.items()
            if node_id not in self._silent
        ]
        if silent and not self._asked:
            raise ClusterError(f"{no_answer[0]}, or take it out of the cluster")
        self._silent |= dict.fromkeys(silent, time.monotonic() + _SILENT_AGAIN_AFTER_S)
        _check(answers)
        self._asked |= new.keys() - silent.keys()
        unseen = [warning for answer in answers for warning in _warnings(answer)]
        return no_answer + (unmarked if answers else []) + unseen

    def _waits(self, node_id: str) -> bool:
        return time.monotonic() < self._silent.get(node_id, 0.0)


def _alive() -> dict[str, dict[str, Any]]:
    """The living nodes by their ids."""
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"


def _ask(
    nodes: dict[str, str], files: list[str], markers: list[str], timeout_s: float
) -> tuple[list[_Answer], dict[str, str]]:
    """The answers, and which nodes gave none, with what they did instead."""
    questions = {}
    for node_id in nodes:
        pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
        # no CPU: a node that is busy answers too
        task = ray.remote(_probe()).options(num_cpus=0, max_retries=0, scheduling_strategy=pinned)
        questions[task.remote(files, markers)] = node_id
    answered, late = ray.wait(list(questions), num_returns=len(questions), timeout=timeout_s)
    for question in late:
        ray.cancel(question, force=True)
    answers: list[_Answer] = []
    silent = {questions[question]: "does not answer" for question in late}
    for question in answered:
        node_id = questions[question]
        try:
            answers.append(_answer(nodes[node_id], question))
        except RayError as error:  # not the question failed but what was to run it: the process, its memory, the node
            silent[node_id] = f"does not answer ({type(error).__name__})"
    return answers, silent


def _answer(name: str, question: Any) -> _Answer:
    try:
        return _Answer(name, **ray.get(question))
    except RayTaskError as error:
        raise ClusterError(
            f"node {name} cannot run Python tasks ({_last_line(error)}); look at its Ray logs, or take it out"
        ) from error


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _probe() -> Callable[[list[str], list[str]], dict[str, Any]]:
    """The question: as `version_reader`, a nested function that travels by value."""
    read_versions = version_reader()

    def probe(files: list[str], markers: list[str]) -> dict[str, Any]:
        import os

        absent = [file for file in files if not os.path.exists(file)]  # noqa: PTH110
        unseen = [marker for marker in markers if not os.path.exists(marker)]  # noqa: PTH110
        read_only = [
            marker
            for marker in markers
            if marker not in unseen and not os.access(os.path.dirname(marker), os.W_OK)  # noqa: PTH120
        ]
        return {"versions": read_versions(), "absent": absent, "unseen": unseen, "read_only": read_only}

    return probe


def _check(answers: list[_Answer]) -> None:
    compared = [(answer.node, differences(answer.versions, versions(), whose="here")) for answer in answers]
    if wrong := [f"node {node} has {different}" for node, different in compared if different]:
        raise ClusterError(
            f"{'; '.join(wrong)}. Trials there would not be comparable: install the same code and packages on "
            "every node, restart Ray there, and launch again"
        )
    lacking = [f"node {answer.node} has no {' and no '.join(answer.absent)}" for answer in answers if answer.absent]
    if lacking:
        raise ClusterError(
            f"{'; '.join(lacking)}. Trials read that: put it there at the same path, such as by a BDENSE_HOME on "
            "storage that all nodes have, and launch again"
        )


def _warnings(answer: _Answer) -> Iterator[str]:
    for marker in answer.unseen:
        yield (
            f"node {answer.node} does not see this machine's {Path(marker).parent}: what trials keep there stays on "
            "their node and is lost with it; set BDENSE_HOME to storage that every node has"
        )
    for marker in answer.read_only:
        yield f"node {answer.node} cannot write to {Path(marker).parent}; give Ray's user there the right to"


@contextlib.contextmanager
def _markers(folders: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    """A file in each folder, and a warning for each folder that takes none, such as one on a full disk.

    Nobody else has a file of that name: the same path elsewhere may be another folder.
    """
    markers: list[Path] = []
    warnings = []
    try:
        for folder in folders:
            marker = Path(folder) / f".seen-{secrets.token_hex(8)}"
            try:
                marker.touch()
            except OSError as error:
                warnings.append(
                    f"this machine cannot write to {folder} ({error.strerror}), so nobody knows whether other nodes "
                    "see it; free some space, or give the right to write"
                )
            else:
                markers.append(marker)
        yield [str(marker) for marker in markers], warnings
    finally:
        for marker in markers:
            with contextlib.suppress(OSError):  # it is empty, and no reason to end a launch
                marker.unlink(missing_ok=True)
