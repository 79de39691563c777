"""The services of docker/compose.yaml together, without an engine: each with namespaces of its own, as in a container.

What stands in for the engine here: a network without a way out for each network of the file, names for the services, a
user without rights, folders of its own, the secrets as files. What it cannot show: that the image builds.
"""

import importlib.util
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from search import postmaster
from tests import compose_file
from tests.compose_file import DOCKER, ROOT

pytestmark = pytest.mark.e2e

USER = 10001
HAS_RAYS_PAGES = all(importlib.util.find_spec(name) for name in ("aiohttp", "opencensus"))
"""The image has ray[default]; where the tests run without it, a node says in its log alone that it is up."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Service:
    """A started service: its outermost process, and what it says."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self._log = process, log

    @property
    def says(self) -> str:
        return self._log.read_text()

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 250) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.says
            time.sleep(0.2)

    def first(self) -> psutil.Process:
        """The process that is number one inside."""
        (inside,) = psutil.Process(self.process.pid).children()
        return inside


class Engine:
    """Starts services of compose.yaml, each as often as wanted."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bd-c-", dir="/var/tmp"))  # /tmp is another one for each service
        self.folder.chmod(0o755)
        self.secrets = {"ray_token": secrets.token_hex(32), "postgres_password": f"pw {secrets.token_hex(8)}"}
        content = compose_file.load(WORKER_CPUS="2")
        self.services: dict[str, dict[str, Any]] = content["services"]
        self.networks = list(content["networks"])
        self.tag = f"bd{secrets.token_hex(2)}"
        self.addresses: dict[tuple[str, str], str] = {}
        self.started: list[Service] = []
        self.programs = self._folder("programs")
        (self.programs / "bdense-entrypoint").symlink_to(DOCKER / "entrypoint.sh")
        (self.programs / "bdense-healthy").symlink_to(DOCKER / "healthy.py")
        (self.programs / "pg_isready").symlink_to(postmaster._program("pg_isready"))
        (self.folder / "passwd").write_text(f"root:x:0:0::/root:/bin/sh\nbdense:x:{USER}:{USER}::/tmp:/bin/sh\n")

    def connect(self) -> None:
        """A network for each of the file's, and every service on its own ones."""
        switch = f"{self.tag}-switch"
        ip("netns", "add", switch)
        for number in range(len(self.networks)):
            ip("-n", switch, "link", "add", f"br{number}", "type", "bridge")
            ip("-n", switch, "link", "set", f"br{number}", "up")
        for place, (name, service) in enumerate(self.services.items()):
            own = f"{self.tag}-{name}"
            ip("netns", "add", own)
            ip("-n", own, "link", "set", "lo", "up")
            for network in service["networks"]:
                number = self.networks.index(network)
                inside, outside = f"eth{number}", f"v{place}x{number}"
                ip("link", "add", inside, "netns", own, "type", "veth", "peer", "name", outside, "netns", switch)
                ip("-n", switch, "link", "set", outside, "master", f"br{number}", "up")
                self.addresses[name, network] = f"10.214.{number}.{place + 10}"
                ip("-n", own, "address", "add", f"{self.addresses[name, network]}/24", "dev", inside)
                ip("-n", own, "link", "set", inside, "up")

    def start(self, name: str, arguments: list[str] | None = None) -> Service:
        """The service with its own command, or another."""
        service = self.services[name]
        entrypoint = service.get("entrypoint", ["bdense-entrypoint"])
        return self._start(name, [*entrypoint, *(arguments or service["command"])])

    def _start(self, name: str, command: list[str]) -> Service:
        service, here = self.services[name], self._folder(f"{name}-{secrets.token_hex(3)}")
        log = here / "log"
        prepared = "\n".join(["set -e", *self._mounts(name, service, here), 'exec "$@"'])
        with log.open("w") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", f"{self.tag}-{name}",
                 "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc",
                 "bash", "-c", prepared, "bash", *self._as_user(), *command],
                env=self._environment(service), stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self.started.append(Service(process, log))
        return self.started[-1]

    def execute(self, name: str, running: Service, command: list[str]) -> subprocess.CompletedProcess[str]:
        """A further command beside a running one, as a health check is: not through the entry point."""
        inside = ["nsenter", "-t", str(running.first().pid), "-m", "-u", "-i", "-n", "-p", *self._as_user()]
        environment = self._environment(self.services[name])
        return subprocess.run([*inside, *command], env=environment, capture_output=True, text=True, check=False)

    def healthy(self, name: str, running: Service) -> bool:
        _, *test = self.services[name]["healthcheck"]["test"]
        inside = psutil.Process(running.process.pid).children()
        if not inside or inside[0].uids().real != USER:
            return False  # its folders are being made
        return self.execute(name, running, test).returncode == 0

    def postgresql(self) -> Service:
        """What the image of PostgreSQL makes of its variables, roughly: this user, this database, this password."""
        settings = self.services["postgres"]["environment"]
        secret = settings["POSTGRES_PASSWORD_FILE"]
        data, program = "/tmp/data", postmaster._program
        lines = [
            f"{program('initdb')} -D {data} -U {settings['POSTGRES_USER']} -A scram-sha-256 --pwfile={secret} -N >&2",
            f"echo 'host all all all scram-sha-256' >> {data}/pg_hba.conf",
            f"echo 'CREATE DATABASE {settings['POSTGRES_DB']}' | {program('postgres')} --single -D {data} postgres >&2",
            f"exec {program('postgres')} -D {data} -c listen_addresses='*' -c unix_socket_directories=/tmp",
        ]
        return self._start("postgres", ["sh", "-ec", "\n".join(lines)])

    def end(self) -> None:
        for service in self.started:
            service.process.kill()  # --kill-child takes all that is inside with it
            service.process.wait(20)
        for name in ("switch", *self.services):
            subprocess.run(["ip", "netns", "del", f"{self.tag}-{name}"], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folder(self, name: str) -> Path:
        made = self.folder / name
        made.mkdir(exist_ok=True)
        return made

    def _volume(self, name: str) -> Path:
        made = self._folder(f"volume-{name}")
        os.chown(made, USER, USER)
        made.chmod(0o700)
        return made

    def _as_user(self) -> list[str]:
        as_user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs"]
        return [*as_user, "--bounding-set=-all", "--inh-caps=-all"]

    def _environment(self, service: dict[str, Any]) -> dict[str, str]:
        own = {name: str(value) for name, value in service.get("environment", {}).items()}
        image = {
            "PATH": f"{self.programs}:{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp",
            "BDENSE_HOME": "/var/lib/bdense", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8",
            "RAY_raylet_start_wait_time_s": "100",  # the machine may be busy
        }  # fmt: skip
        return image | own

    def _mounts(self, name: str, service: dict[str, Any], here: Path) -> Iterator[str]:
        """Shell lines that make the service's own view of the folders."""
        host = secrets.token_hex(6)
        hosts = ["127.0.0.1 localhost"]
        for (other, network), address in self.addresses.items():
            if network in service["networks"]:
                hosts.append(f"{address} {f'{host} ' * (other == name)}{other}")
        (here / "hosts").write_text("\n".join(hosts) + "\n")
        own_secrets = here / "secrets"
        own_secrets.mkdir()
        for secret in service.get("secrets", []):
            (own_secrets / secret).write_text(self.secrets[secret] + "\n")
            (own_secrets / secret).chmod(0o444)
        yield f"hostname {host}"
        yield f"mount --bind {here}/hosts /etc/hosts && mount --bind {self.folder}/passwd /etc/passwd"
        yield f"mount -t tmpfs -o size={service.get('shm_size', '64mb').removesuffix('b')} none /dev/shm"
        yield f"mount -t tmpfs none /run && mkdir /run/secrets && mount --bind {own_secrets} /run/secrets"
        yield "mount -t tmpfs none /srv && mkdir -p /srv/bdense/studies"
        yield f"mount --bind {shlex.quote(str(ROOT / 'studies'))} /srv/bdense/studies"
        yield "mount -t tmpfs none /var/lib && mkdir /var/lib/bdense"
        for volume in service.get("volumes", []):
            source, target = volume.split(":")[:2]
            if target.startswith("/var/lib/bdense"):
                yield f"mount --bind {self._volume(source)} {target}"
        yield from _own_tmp(here)
        yield "cd /srv/bdense"


def _own_tmp(here: Path) -> Iterator[str]:
    """/tmp anew, and whatever else the user may not enter, with nothing in it but Python and this checkout."""
    needed = [Path(sys.prefix), Path(sys.base_prefix), ROOT]
    closed = {parent for path in needed for parent in path.parents if not parent.stat().st_mode & 0o001}
    for number, hidden in enumerate([Path("/tmp"), *sorted(closed)]):
        fresh = here / f"fresh-{number}"
        yield f"mkdir -m 1777 {fresh}"
        for path in needed:
            if path.is_relative_to(hidden):
                place = shlex.quote(str(fresh / path.relative_to(hidden)))
                yield f"mkdir -p {place} && mount --bind {shlex.quote(str(path))} {place}"
        yield f"mount --rbind {fresh} {hidden}"


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    try:
        subprocess.run([sys.executable, "-c", ""], user=USER, group=USER, extra_groups=[], cwd="/", check=True)
    except (OSError, subprocess.CalledProcessError):
        made.end()
        pytest.skip("other users cannot run this Python")
    try:
        made.connect()
    except (OSError, subprocess.CalledProcessError) as error:
        made.end()
        pytest.skip(f"network namespaces are not permitted here: {error}")
    yield made
    made.end()


@pytest.mark.long
def test_the_services_run_a_study_that_is_interrupted_and_goes_on(engine: Engine) -> None:
    postgres = engine.postgresql()
    postgres.wait_for(lambda: engine.healthy("postgres", postgres))
    nodes = {}
    for name in ("ray-head", "ray-worker"):
        node = nodes[name] = engine.start(name)
        node.wait_for(lambda node=node: "Ray runtime started" in node.says)
        if HAS_RAYS_PAGES:
            node.wait_for(lambda name=name, node=node: engine.healthy(name, node))
    dashboard = engine.start("dashboard")

    command = ["launch", "studies/synthetic.yaml", "--no-dashboard", "--metrics-port=9100", "--trials", "3"]
    command += ["--set", "seeds.control_repeats=1", "--set", "pruner.kind=none", "--set", "method.seconds=5"]
    launcher = engine.start("launcher", command)
    launcher.wait_for(lambda: "runs in process" in launcher.says)
    assert engine.healthy("launcher", launcher)
    with_password = [
        process for process in launcher.first().children(recursive=True) if "PGPASSWORD" in process.environ()
    ]
    assert "PGPASSWORD" in launcher.first().environ() and not with_password, "Ray's processes have the password"
    for node in nodes.values():
        assert not any("PGPASSWORD" in process.environ() for process in node.first().children(recursive=True))
    launcher.first().send_signal(getattr(signal, engine.services["launcher"]["stop_signal"]))
    assert launcher.process.wait(60) == 130, launcher.says

    again = engine.start("launcher", command)
    assert again.process.wait(250) == 0, again.says
    shown = engine.start("launcher", ["show", "--study", "synthetic", "--format", "json"])
    assert shown.process.wait(60) == 0, shown.says
    trials = json.loads(shown.says[shown.says.index("\n{") :])["trials"]
    assert Counter(trial["state"] for trial in trials if trial["state"] != "FAIL") == {"COMPLETE": 5}
    dashboard.wait_for(lambda: engine.healthy("dashboard", dashboard))


def test_a_node_without_the_token_cannot_join(engine: Engine) -> None:
    head = engine.start("ray-head")
    head.wait_for(lambda: "Ray runtime started" in head.says)
    engine.secrets["ray_token"] = secrets.token_hex(32)
    stranger = engine.start("ray-worker")
    assert stranger.process.wait(250) != 0
    assert "Ray runtime started" not in stranger.says
    assert head.process.poll() is None
