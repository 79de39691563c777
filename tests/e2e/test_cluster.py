"""Clusters of more than one node: joining, dying, disagreeing. Each node is a Ray of its own on this machine."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bdense_core import assets
from bdense_core.checkpoints import load_network, save_network
from search import postmaster
from search.study_file import studies_folder
from tests.patience import PATIENCE_S
from tests.ray_cluster import Cluster

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = str(Path(sys.executable).parent / "bdense-weights")
LAUNCH = (sys.executable, str(ROOT / "search" / "launch_study.py"))
SYNTHETIC = str(studies_folder() / "synthetic.yaml")
PLAIN = ("--no-dashboard", "--set", "seeds.control_repeats=1", "--set", "pruner.kind=none")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.end()


def states(shown: dict) -> Counter:
    return Counter(trial["state"] for trial in shown["trials"])


def test_trials_move_to_a_node_that_joins_and_away_from_one_that_dies(newcomer, cluster) -> None:
    cluster.add_node()
    newcomer.environment |= cluster.access()
    run = newcomer.start_launch(SYNTHETIC, "--study", "moves", "--trials", "3", *PLAIN, "--set", "method.seconds=8")
    run.wait_for(lambda lines: any(" started" in line for line in lines))
    second = cluster.add_node()
    run.wait_for(lambda lines: any(f"in process {one.pid} " in "".join(lines) for one in cluster.processes(second)))
    cluster.kill_node(second)
    assert run.wait() == 0, "\n".join(run.lines)

    shown = newcomer.show("moves")
    assert states(shown)["COMPLETE"] == 5 and states(shown)["RUNNING"] == 0, run.lines
    lost = next(trial for trial in shown["trials"] if trial["state"] == "FAIL")
    (again,) = [trial for trial in shown["trials"] if trial["retry_of"] == lost["number"]]
    assert again["state"] == "COMPLETE" and (again["a"], again["b"]) == (lost["a"], lost["b"])


@pytest.mark.long
def test_a_study_whose_cluster_is_gone_goes_on_with_another(newcomer, cluster) -> None:
    cluster.add_node()
    newcomer.environment |= cluster.access()
    command = (SYNTHETIC, "--study", "gone", "--trials", "2", *PLAIN, "--set", "method.seconds=2")
    run = newcomer.start_launch(*command)
    run.wait_for(lambda lines: any(" COMPLETE " in line for line in lines))
    cluster.kill_node(0)
    assert run.wait() == 1, "\n".join(run.lines)
    assert any("cluster went away" in line for line in run.lines), run.lines
    assert not any("Traceback" in line for line in run.lines), run.lines
    between = states(newcomer.show("gone"))
    assert between["RUNNING"] == 0 and 1 <= between["COMPLETE"] < 4

    other = Cluster()
    try:
        other.add_node()
        again = newcomer.launch(*command, **other.access())
        assert again.returncode == 0, again.stderr
    finally:
        other.end()
    roles = Counter(trial["role"].partition(":")[0] for trial in newcomer.show("gone")["trials"]
                    if trial["state"] == "COMPLETE")  # fmt: skip
    assert roles == {"search": 2, "control": 2}


def test_a_node_with_other_code_is_refused_before_anything_runs_there(newcomer, cluster, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "search", tmp_path / "other" / "search", ignore=shutil.ignore_patterns("__pycache__"))
    changed = tmp_path / "other" / "search" / "seeds_of_another_version.py"
    changed.write_text("# a file that the launcher does not have\n")
    broken = tmp_path / "broken" / "search"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('not on this node')\n")
    cluster.add_node(options=("--num-cpus=0",))  # a head that runs no trials may have what it likes
    cluster.add_node(PYTHONPATH=str(tmp_path / "other"))
    cluster.add_node(PYTHONPATH=str(tmp_path / "broken"))
    newcomer.environment |= cluster.access()
    done = newcomer.launch(SYNTHETIC, "--study", "refused", "--trials", "2", *PLAIN)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.count("bdense-search source ") == 1 and error.count("(here source ") == 2, error
    assert "not importable: ImportError: not on this node" in error
    assert "install the same code" in error
    assert states(newcomer.show("refused")).keys() <= {"WAITING"}


def test_a_trial_that_fits_on_no_single_node_is_refused(newcomer, cluster) -> None:
    cluster.add_node()
    cluster.add_node()
    newcomer.environment |= cluster.access()
    done = newcomer.launch(SYNTHETIC, "--study", "large", "--trials", "2", *PLAIN, "--set", "resources.cpus=2")
    assert done.returncode == 1
    assert "a trial asks for 2 CPU and 0 GPU on one node" in done.stderr
    assert "Traceback" not in done.stderr


class TwoHosts:
    """Two network namespaces with a cable between them; the second has a host name and a /home/... of its own."""

    LAUNCHER, WORKER = "10.213.77.1", "10.213.77.2"

    def __init__(self, hidden: Path) -> None:
        self.names = [f"bd{secrets.token_hex(3)}{end}" for end in "ab"]
        self.hidden = hidden

    def connect(self) -> None:
        first, second = self.names
        _ip("netns", "add", first)
        _ip("netns", "add", second)
        _ip("link", "add", first, "netns", first, "type", "veth", "peer", "name", second, "netns", second)
        for name, address in zip(self.names, (self.LAUNCHER, self.WORKER), strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def launcher(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.names[0])

    def worker(self) -> tuple[str, ...]:
        own = f'hostname bd-worker && mount -t tmpfs none {self.hidden} && exec "$@"'
        return ("ip", "netns", "exec", self.names[1], "unshare", "--mount", "--uts", "sh", "-c", own, "sh")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def two_hosts(newcomer) -> Iterator[TwoHosts]:
    newcomer.home.mkdir(mode=0o700)
    hosts = TwoHosts(newcomer.home)
    try:
        hosts.connect()
    except (OSError, subprocess.CalledProcessError) as error:
        hosts.remove()
        pytest.skip(f"network namespaces are not permitted here: {error}")
    yield hosts
    hosts.remove()


@pytest.fixture
def postgresql(two_hosts: TwoHosts) -> Iterator[str]:
    """A PostgreSQL on the launcher's host, by TCP; its URL. It refuses to run as root, so it runs as nobody."""
    nobody = 65534
    folder = Path(tempfile.mkdtemp(prefix="bd-pg-", dir="/tmp"))
    os.chown(folder, nobody, nobody)
    data = folder / "data"

    def as_nobody(*command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, user=nobody, group=nobody, extra_groups=[], cwd=folder, env={"LC_ALL": "C"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    initdb = str(postmaster._program("initdb"))
    assert as_nobody(initdb, "-D", str(data), "-A", "trust", "-U", "postgres", "-N").wait(PATIENCE_S) == 0
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write(f"host all all {two_hosts.LAUNCHER}/32 trust\n")
    server = subprocess.Popen(
        [*two_hosts.launcher(), "setpriv", f"--reuid={nobody}", f"--regid={nobody}", "--clear-groups",
         str(postmaster._program("postgres")), "-D", str(data), "-c", f"listen_addresses={two_hosts.LAUNCHER}",
         "-c", "unix_socket_directories=", "-p", "5432"],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    pid_file = data / "postmaster.pid"
    deadline = time.monotonic() + PATIENCE_S
    while not (pid_file.exists() and "ready" in pid_file.read_text()):
        assert server.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    yield f"postgresql+psycopg2://postgres@{two_hosts.LAUNCHER}:5432/postgres"
    server.terminate()
    server.wait(PATIENCE_S)
    shutil.rmtree(folder)


def test_trials_run_on_another_host_that_has_neither_the_database_nor_the_launchers_folders(
    newcomer, cluster, two_hosts: TwoHosts, postgresql: str
) -> None:
    cluster.add_node(prefix=two_hosts.launcher(), options=(f"--node-ip-address={two_hosts.LAUNCHER}", "--num-cpus=0"))
    cluster.add_node(prefix=two_hosts.worker(), options=(f"--node-ip-address={two_hosts.WORKER}",))
    newcomer.environment |= cluster.access() | {"OPTUNA_STORAGE": postgresql}
    teacher = newcomer.home / "teacher.safetensors"
    save_network(load_network(assets.hashed("digits/teacher.safetensors")), teacher, {"made": "for this test"})
    lacking = newcomer.run(*two_hosts.launcher(), *LAUNCH, "--study", "lacking", "--set", f"teacher={teacher}", *PLAIN)
    assert lacking.returncode == 1
    assert f"node {two_hosts.WORKER} (bd-worker) has no {teacher}. Trials read that" in lacking.stderr

    command = [*two_hosts.launcher(), *LAUNCH, SYNTHETIC, "--study", "hosts", "--trials", "2", *PLAIN]
    run = newcomer.start(*command, "--set", "method.seconds=0.5")
    assert run.wait() == 0, "\n".join(run.lines)
    (warning,) = [line for line in run.lines if "does not see this machine's" in line]
    assert f"node {two_hosts.WORKER} (bd-worker)" in warning and str(newcomer.home / "checkpoints") in warning
    shown = newcomer.run(*two_hosts.launcher(), str(WEIGHTS), "show", "--study", "hosts", "--format", "json")
    assert states(json.loads(shown.stdout)) == {"COMPLETE": 4}
