"""A cluster whose nodes share nothing but the network: PostgreSQL behind a password, all files in an object store."""

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from search import server
from search.study_file import studies_folder
from tests.e2e.conftest import User
from tests.object_store import ObjectStore, serving
from tests.patience import PATIENCE_S
from tests.ray_cluster import Cluster
from tests.tcp_postgres import Postgres, listening

pytestmark = [pytest.mark.e2e, pytest.mark.long]

SHORT = (
    "--set", "method.budget_kimg=2", "--set", "evaluation.n_samples=200", "--set", "evaluation.batch=100",
    "--set", "seeds.control_repeats=1", "--set", "pruner.kind=none",
)  # fmt: skip
STUDY = (str(studies_folder() / "digits.yaml"), *SHORT)


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    with serving() as served:
        yield served


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """Debian's server where it is installed, else the wheel's."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    with listening(installed[-1].parent if installed else server.programs()) as running:
        yield running


@pytest.fixture
def cluster(newcomer: User, store: ObjectStore) -> Iterator[Cluster]:
    """A head that runs no trials and three workers, each of which finds the launcher's home empty and its own."""
    newcomer.home.mkdir(mode=0o700)
    made = Cluster(**store.environment, BDENSE_HOME=str(newcomer.home))
    try:
        made.add_node(options=("--num-cpus=0",))
        for _ in range(3):
            made.add_node(prefix=_own(newcomer.home))
        yield made
    finally:
        made.end()


def _own(folder: Path) -> tuple[str, ...]:
    """What a command is prefixed with so that a folder is empty and its own; nothing where that is not permitted."""
    alone = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {folder} && exec "$@"', "sh")
    permitted = subprocess.run([*alone, "true"], capture_output=True, check=False).returncode == 0
    return alone if permitted else ()


def test_nodes_that_share_no_folder_work_on_one_study_and_none_computes_what_another_did(
    newcomer: User, cluster: Cluster, store: ObjectStore, postgres: Postgres
) -> None:
    newcomer.environment |= cluster.access() | store.environment
    newcomer.environment |= {"OPTUNA_STORAGE": postgres.url(), "PGPASSWORD": postgres.password}
    run = newcomer.start_launch(
        *STUDY, "--study", "apart", "--trials", "3", "--no-dashboard",
        "--set", f"cache.url={store.url}/cache", "--set", f"checkpoints.url={store.url}/checkpoints",
        "--set", "checkpoints.every_s=0",
    )  # fmt: skip
    run.wait_for(lambda lines: any("checkpoints/" in name for name in store.names()))
    assert run.wait(PATIENCE_S) == 0, "\n".join(run.lines)

    shown = newcomer.show("apart")
    finished = [trial for trial in shown["trials"] if trial["state"] == "COMPLETE"]
    assert Counter(trial["role"].partition(":")[0] for trial in finished)["search"] == 3
    if _own(newcomer.home):
        assert not list(newcomer.home.glob("cache/*/shard-*.safetensors")), "the workers' caches are their own"
    names = store.names()
    kinds = Counter(name.partition("/")[0] for name in names)
    assert kinds["cache"] > 0 and kinds["checkpoints"] == 0, names  # what no open trial needs is removed
    shards = [name for name in names if "/shard-" in name]
    assert len(shards) == len({name.rpartition("-")[0] for name in shards}), "nodes of one kind compute the same bits"

    control = next(trial for trial in finished if trial["role"] == "control:endpoint_only")
    done = newcomer.weights(
        "distill", *STUDY, "--control", "endpoint_only", "--output", str(newcomer.home / "alone"), "--format", "json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["value"] == control["value"], "the same bits without a cluster, store or cache"
