"""What the service costs, with trials that do nothing or only wait.

    python -m benchmarks.service [--part driver|cycle|scale]...

Prints JSON. Each part sets up its own databases on one embedded PostgreSQL, and its own local Ray:

driver  200 trials that report once and end, through our launcher and through stock Ray Tune with its OptunaSearch (on
        the same PostgreSQL, and in memory), in turns: seconds of the clock and of the driver's CPU for each trial.
cycle   ask, report and tell with 0, 1,000 and 10,000 stored trials: ours (claim under a lock, lease, heartbeat,
        pruner) and Optuna's own calls without any of it.
scale   10,000 trials that wait, on many logical CPUs: how much of the ideal rate is reached, and the launcher's memory.
"""

import json
import logging
import os
import platform
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import psutil

ROOT = Path(__file__).resolve().parent.parent
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}  # fmt: skip


# -- one launch, in a process of its own


class _Ends(logging.Handler):
    """Notes when trials end: (by the clock, by the processor, memory in MB)."""

    def __init__(self) -> None:
        super().__init__()
        self.begin: tuple[float, float] | None = None
        self.ends: list[tuple[float, float, float]] = []
        self._process = psutil.Process()

    def note(self) -> None:
        memory = self._process.memory_info().rss / 1e6 if len(self.ends) % 100 == 0 else 0.0
        self.ends.append((time.perf_counter(), time.process_time(), memory))

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", None)
        if event == "started" and self.begin is None:
            self.begin = time.perf_counter(), time.process_time()
        if event == "ended":
            self.note()

    def report(self) -> dict[str, Any]:
        (wall, cpu, _), (last_wall, last_cpu, _) = self.ends[0], self.ends[-1]
        rest = len(self.ends) - 1
        begun = self.begin[0] if self.begin else wall
        return {
            "trials": len(self.ends),
            "wall_s_per_trial": (last_wall - wall) / rest,
            "driver_cpu_s_per_trial": (last_cpu - cpu) / rest,
            "wall_s": last_wall - begun,
            "memory_mb": [round(memory) for _, _, memory in self.ends if memory][:: max(1, len(self.ends) // 1000)],
        }


def ours(url: str, home: str, trials: int, seconds: float, cpus: float, address: str | None) -> dict[str, Any]:
    """Our launcher."""
    from search import launch
    from search.settings import Settings
    from search.study_file import load_study

    ends = _Ends()
    logging.getLogger().addHandler(ends)
    logging.getLogger("search").setLevel(logging.INFO)
    study = load_study(
        Path("synthetic"),
        name=f"b-{uuid.uuid4().hex[:8]}",
        overrides=(
            f"budget.trials={trials}", f"method.seconds={seconds}", "method.budget_kimg=1", "seeds.control_repeats=1",
            f"resources.cpus={cpus}",
        ),
    )  # fmt: skip
    settings = Settings.load(storage=url, home=Path(home), ray_address=address, environ={})
    launch.launch(study, settings, with_dashboard=False, dashboard_port=0)
    return ends.report()


def stock(url: str, home: str, trials: int, seconds: float, cpus: float, address: str | None) -> dict[str, Any]:
    """Ray Tune with its own OptunaSearch, the same sampler, on the same PostgreSQL or in memory (no URL)."""
    import optuna
    import ray
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    class Nothing(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            pass

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

        def step(self) -> dict[str, Any]:
            time.sleep(seconds)
            return {"value": 1.0, "done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

        def load_checkpoint(self, checkpoint: Any) -> None:
            pass

    ends = _Ends()

    class Note(tune.Callback):
        def on_trial_complete(self, **_: Any) -> None:
            ends.note()

        def __reduce__(self) -> Any:
            return (tune.Callback, ())

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    ray.init(address=address or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    search = OptunaSearch(
        {"a": optuna.distributions.FloatDistribution(-1, 3), "b": optuna.distributions.FloatDistribution(-5, 0)},
        metric="value",
        mode="min",
        sampler=optuna.samplers.TPESampler(multivariate=True, constant_liar=True, n_startup_trials=6, seed=0),
        study_name=f"b-{uuid.uuid4().hex[:8]}",
        storage=optuna.storages.RDBStorage(url) if url else None,
    )
    tune.Tuner(
        tune.with_resources(Nothing, {"cpu": cpus}),
        tune_config=tune.TuneConfig(search_alg=search, num_samples=trials, reuse_actors=True),
        run_config=tune.RunConfig(name="stock", storage_path=home, verbose=0, callbacks=[Note()]),
    ).fit()
    return ends.report()


def in_a_process(name: str, *arguments: Any) -> dict[str, Any]:
    """One of the functions above in a fresh process, so that none profits from another's imports and memory."""
    code = (
        "import json, sys; from benchmarks import service; "
        f"print('RESULT', json.dumps(service.{name}(*json.loads(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        cwd=ROOT, env=os.environ | _QUIET, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.split("RESULT ")[1])
    return result


def driver(url: str, home: str, trials: int, rounds: int) -> dict[str, Any]:
    """Seconds per trial of trials that do nothing; the sides take turns."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "stock_postgresql": [], "stock_memory": []}
    for _ in range(rounds):
        for name, function, where in (
            ("ours", "ours", url),
            ("stock_postgresql", "stock", url),
            ("stock_memory", "stock", ""),
        ):
            runs[name].append(in_a_process(function, where, home, trials, 0.0, 1.0, None))
    found: dict[str, Any] = {"trials": trials, "rounds": rounds}
    for key in ("wall_s_per_trial", "driver_cpu_s_per_trial"):
        found[key] = {name: [round(run[key], 4) for run in each] for name, each in runs.items()}
        for other in ("stock_postgresql", "stock_memory"):
            pairs = [mine[key] / theirs[key] for mine, theirs in zip(runs["ours"], runs[other], strict=True)]
            found[f"{key}_ours_over_{other}"] = round(statistics.median(pairs), 3)
    return found


# -- one cycle


def fill(database: Any, study_id: int, count: int) -> None:
    """Finished trials by the thousand, as a launcher would have left them."""
    from sqlalchemy import text

    statements = """
        INSERT INTO trials (study_id, number, state, datetime_start, datetime_complete)
            SELECT :study, n + 2, 'COMPLETE', LOCALTIMESTAMP, LOCALTIMESTAMP FROM generate_series(0, :count - 1) n;
        INSERT INTO trial_values (trial_id, objective, value, value_type)
            SELECT trial_id, 0, 4 + random(), 'FINITE' FROM trials WHERE study_id = :study AND number > 1;
        INSERT INTO trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
            SELECT trial_id, s, 4 + random(), 'FINITE' FROM trials, generate_series(1, 3) s
            WHERE study_id = :study AND number > 1;
        INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
            SELECT trial_id, p, CASE p WHEN 'a' THEN 4 * random() - 1 ELSE -5 * random() END,
                   CASE p WHEN 'a' THEN :a ELSE :b END
            FROM trials, (VALUES ('a'), ('b')) names (p) WHERE study_id = :study AND number > 1;
        INSERT INTO trial_user_attributes (trial_id, key, value_json)
            SELECT trial_id, k, v FROM trials, (VALUES ('role', '"search"'), ('weights', '[0.1, 0.2, 0.3, 0.4]'),
                ('shares', '[0.1, 0.2, 0.3, 0.4]'), ('seeds', '[0]'), ('protocol', '"x"'), ('code', '"x"'),
                ('owner', '"somebody|elsewhere|1|1"')) attributes (k, v)
            WHERE study_id = :study AND number > 1;
    """
    from optuna.distributions import FloatDistribution, distribution_to_json

    values = {
        "study": study_id,
        "count": count,
        "a": distribution_to_json(FloatDistribution(-1, 3)),
        "b": distribution_to_json(FloatDistribution(-5, 0)),
    }
    with database.transaction() as connection:
        for statement in statements.split(";")[:-1]:
            used = {key: value for key, value in values.items() if f":{key}" in statement}
            connection.execute(text(statement), used)
        connection.execute(text("ANALYZE"))


def _milliseconds(action: Callable[[], object], times: int) -> float:
    spent = []
    for _ in range(times):
        begin = time.perf_counter()
        action()
        spent.append(time.perf_counter() - begin)
    return round(1000 * statistics.median(spent), 1)


def cycle(url: str, stored: int, times: int) -> dict[str, Any]:
    """Milliseconds of one cycle beside so many stored trials: medians, after one that fills the caches."""
    import warnings

    import optuna

    from search.database import Database
    from search.storage import Studies
    from search.study_file import load_study

    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    database = Database(url)
    study = load_study(Path("synthetic"), name=f"b-{uuid.uuid4().hex[:8]}", overrides=("budget.trials=1000000",))
    store = Studies(database).create_or_resume(study)
    for _ in range(2):
        claim = store.trials.claim()
        assert claim is not None
        store.trials.complete(claim.number, 4.0)
    if stored:
        fill(database, store.optuna_study._study_id, stored)

    def mine() -> None:
        claim = store.trials.claim()
        assert claim is not None
        store.trials.report(claim.number, 4.5, 1, may_prune=True)
        store.trials.complete(claim.number, 4.5)

    plain = optuna.load_study(
        study_name=study.name,
        storage=optuna.storages.RDBStorage(url),
        sampler=optuna.samplers.TPESampler(multivariate=True, constant_liar=True, n_startup_trials=6, seed=0),
        pruner=optuna.pruners.MedianPruner(),
    )

    def theirs() -> None:
        trial = plain.ask()
        trial.suggest_float("a", -1, 3)
        trial.suggest_float("b", -5, 0)
        trial.report(4.5, 1)
        trial.should_prune()
        plain.tell(trial, 4.5)

    first = _milliseconds(mine, 1)
    _milliseconds(theirs, 1)
    _milliseconds(mine, 5)
    found = {"first_ms": first, "ours_ms": _milliseconds(mine, times), "optuna_alone_ms": _milliseconds(theirs, times)}
    database.close()
    return found


def cycles(url: str, times: int) -> dict[str, Any]:
    found: dict[str, Any] = {str(stored): in_a_process("cycle", url, stored, times) for stored in (0, 1000, 10000)}
    for side in ("ours_ms", "optuna_alone_ms"):
        found[f"growth_{side.removesuffix('_ms')}"] = round(found["10000"][side] / found["0"][side], 2)
    return found


# -- many trials


def scale(url: str, home: str, trials: int, cpus: int, seconds: float) -> dict[str, Any]:
    """The share of the ideal rate that `cpus` logical CPUs reach with trials that wait for `seconds`."""
    environment = os.environ | _QUIET | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.update(environment)
    ray = str(Path(sys.executable).parent / "ray")
    head = [ray, "start", "--head", "--port=0", f"--num-cpus={cpus}", "--include-dashboard=false", "--block"]
    cluster = subprocess.Popen(
        head, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert cluster.stdout is not None
    try:
        address = next(found[1] for line in cluster.stdout if (found := re.search(r"--address='([^']+)'", line)))
        threading.Thread(target=cluster.stdout.read, daemon=True).start()
        found = in_a_process("ours", url, home, trials, seconds, 1.0, address)
    finally:
        cluster.terminate()
        cluster.wait(60)
    ideal = (trials + 2) * seconds / cpus
    return {
        "trials": trials,
        "logical_cpus": cpus,
        "seconds_per_trial": seconds,
        "ideal_s": round(ideal, 1),
        "wall_s": round(found["wall_s"], 1),
        "efficiency": round(ideal / found["wall_s"], 3),
        "driver_cpu_s_per_trial": round(found["driver_cpu_s_per_trial"], 4),
        "launcher_memory_mb": found["memory_mb"],
    }


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice(["driver", "cycle", "scale"]), help="Default: all.")
@click.option("--trials", default=200, show_default=True, help="Of `driver`.")
@click.option("--rounds", default=3, show_default=True, help="Of `driver`.")
@click.option("--scale-trials", default=10000, show_default=True)
@click.option("--logical-cpus", default=32, show_default=True)
@click.option("--seconds", default=4.0, show_default=True, help="How long a trial of `scale` waits.")
def main(
    parts: tuple[str, ...], trials: int, rounds: int, scale_trials: int, logical_cpus: int, seconds: float
) -> None:
    """Measure and print."""
    from search import server

    with tempfile.TemporaryDirectory(prefix="bdense-") as name:
        home = Path(name) / "home"
        url = server.ensure_running(home)
        try:
            result: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
            if not parts or "driver" in parts:
                result["driver"] = driver(url, str(home), trials, rounds)
            if not parts or "cycle" in parts:
                result["cycle"] = cycles(url, times=20)
            if not parts or "scale" in parts:
                result["scale"] = scale(url, str(home), scale_trials, logical_cpus, seconds)
        finally:
            server.stop(home)
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
