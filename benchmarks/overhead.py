"""What the service costs: trials that do nothing, through the whole launcher, against Ray Tune alone.

    python -m benchmarks.overhead [--trials 40]

Prints JSON: seconds from the command to the first running trial; wall seconds per trial of the launcher
(PostgreSQL, Optuna and Ray, three reports each); the same for Ray Tune with neither database nor Optuna; their ratio.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent

TUNE_ALONE = """
import sys, time
from search import ray_environment
ray_environment.prepare(None)
import ray
from ray import tune
class Nothing(tune.Trainable):
    def setup(self, config): self.i = 0
    def reset_config(self, config): self.i = 0; return True
    def step(self):
        self.i += 1
        return {"value": 1.0, "done": self.i >= 3}
    def save_checkpoint(self, folder): pass
    def load_checkpoint(self, checkpoint): pass
ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
ended = []
class Note(tune.Callback):
    def on_trial_complete(self, iteration, trials, trial, **info): ended.append(time.perf_counter())
n = int(sys.argv[1])
tune.Tuner(
    tune.with_resources(Nothing, {"cpu": 1}),
    tune_config=tune.TuneConfig(num_samples=n, reuse_actors=True),
    run_config=tune.RunConfig(name="nothing", storage_path=sys.argv[2], verbose=0, callbacks=[Note()]),
).fit()
print("PER_TRIAL", (ended[-1] - ended[0]) / (len(ended) - 1))
"""


def launcher(num_trials: int, home: Path) -> tuple[float, float]:
    """(seconds to the first running trial, seconds per trial) of the whole launcher, embedded server included."""
    command = [
        sys.executable, "-u", str(ROOT / "search" / "launch_study.py"), str(ROOT / "studies" / "synthetic.yaml"),
        "--trials", str(num_trials), "--no-dashboard", "--set", "method.seconds=0",
        "--set", "seeds.control_repeats=1", "--set", "pruner.kind=none",
    ]  # fmt: skip
    begin = time.perf_counter()
    first, ended = 0.0, []
    process = subprocess.Popen(
        command,
        env=os.environ | {"BDENSE_HOME": str(home)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        now = time.perf_counter() - begin
        first = first or (now if " started" in line else 0.0)
        if " COMPLETE " in line:
            ended.append(now)
    if process.wait() != 0:
        raise SystemExit("the launcher failed")
    return first, (ended[-1] - ended[0]) / (len(ended) - 1)


def tune_alone(num_trials: int, folder: Path) -> float:
    """Seconds per trial of Ray Tune with its own random search, no database."""
    done = subprocess.run(
        [sys.executable, "-c", TUNE_ALONE, str(num_trials), str(folder)],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    return float(done.stdout.split("PER_TRIAL")[1].split()[0])


@click.command()
@click.option("--trials", default=40, show_default=True)
def main(trials: int) -> None:
    """Measure and print."""
    from search import server

    with tempfile.TemporaryDirectory(prefix="bdense-") as name:
        home = Path(name) / "home"
        cold, _ = launcher(2, Path(name) / "cold")
        server.stop(Path(name) / "cold")
        launcher(2, home)
        first, ours = launcher(trials, home) if trials > 2 else (0.0, 0.0)
        server.stop(home)
        alone = tune_alone(trials, Path(name) / "tune")
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "trials": trials,
        "first_trial_running_s": {"new_database": round(cold, 2), "existing_database": round(first, 2)},
        "launcher_s_per_trial": round(ours, 3),
        "ray_tune_alone_s_per_trial": round(alone, 3),
        "ratio": round(ours / alone, 2),
    }
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
