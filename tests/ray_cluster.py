"""Ray clusters of several nodes on this machine, each of which can be killed."""

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.patience import PATIENCE_S

RAY = str(Path(sys.executable).parent / "ray")


class Cluster:
    """Nodes of one CPU each, whose processes are known, so that exactly they can be killed."""

    def __init__(self, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bd-ray-", dir="/tmp"))  # Ray's sockets want a short path
        access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment = environment | access
        self.address = ""
        self.nodes: list[subprocess.Popen[str]] = []

    def add_node(self, *, prefix: tuple[str, ...] = (), options: tuple[str, ...] = (), **environment: str) -> int:
        """Start a node, the head first; its number. `prefix` runs it elsewhere, such as in a network namespace."""
        number = len(self.nodes)
        role = [f"--address={self.address}"] if self.nodes else ["--head", "--port=0", "--include-dashboard=false"]
        command = [
            *prefix, RAY, "start", *role, "--num-cpus=1", "--object-store-memory=80000000",
            f"--temp-dir={self.folder / str(number)}", "--disable-usage-stats", "--block", *options,
        ]  # fmt: skip
        output = self.folder / f"node-{number}.log"
        with output.open("w") as log:
            self.nodes.append(
                subprocess.Popen(
                    command, env=os.environ | self.environment | environment, stdout=log, stderr=log, text=True,
                    start_new_session=True,
                )
            )  # fmt: skip
        deadline = time.monotonic() + PATIENCE_S
        while "Ray runtime started" not in (text := output.read_text()):
            assert self.nodes[-1].poll() is None and time.monotonic() < deadline, text
            time.sleep(0.1)
        if not self.address:
            found = re.search(r"--address='([^']+)'", text)
            assert found, text
            self.address = found[1]
        return number

    def processes(self, number: int) -> list[psutil.Process]:
        process = psutil.Process(self.nodes[number].pid)
        return [*process.children(recursive=True), process]

    def kill_node(self, number: int) -> None:
        if self.nodes[number].poll() is None:
            victims = self.processes(number)
            for victim in victims:
                if psutil.pid_exists(victim.pid):
                    victim.kill()
            psutil.wait_procs(victims, timeout=20)
        self.nodes[number].wait(PATIENCE_S)

    def end(self) -> None:
        for number in reversed(range(len(self.nodes))):
            self.kill_node(number)
        shutil.rmtree(self.folder, ignore_errors=True)

    def access(self) -> dict[str, str]:
        """What a launcher needs to join."""
        return self.environment | {"RAY_ADDRESS": self.address}
