"""What the shared teacher cache saves: one trial with and without it.

    python -m benchmarks.teacher_cache [--kimg 2] [--pairs 3]

Trains the quickstart's student on one thread, once with an empty cache folder (the trial computes its teacher's
trajectories itself) and once with a filled one, in turn; scored once, on few samples. Prints JSON: seconds of both
and the median of the ratios pair by pair. Counting network evaluations, 12 + 6 against 6, the bound is 3.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import click
import torch

from bdense_core.task import Score
from search.study_file import load_study, studies_folder


def training_seconds(kimg: int, cache_root: Path) -> float:
    """Seconds of a whole trial, from the teacher's file to a first score of 65 samples, which costs next to nothing."""
    study = load_study(
        studies_folder() / "digits.yaml",
        overrides=(f"method.budget_kimg={kimg}", "evaluation.n_samples=65", "budget.every_kimg=1000"),
    )
    weights = study.controls()["paper"].weights
    events = study.spec.method.run(study.task(weights, 0, cache_root=cache_root))
    begin = time.perf_counter()
    next(event for event in events if isinstance(event, Score))
    return time.perf_counter() - begin


@click.command()
@click.option("--kimg", default=2, show_default=True)
@click.option("--pairs", default=3, show_default=True)
def main(kimg: int, pairs: int) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    without, cached = [], []
    with tempfile.TemporaryDirectory(prefix="bdense-") as name:
        training_seconds(1, Path(name) / "warm-up")
        training_seconds(kimg, Path(name) / "shared")
        for pair in range(pairs):
            without.append(training_seconds(kimg, Path(name) / f"own-{pair}"))
            cached.append(training_seconds(kimg, Path(name) / "shared"))
    ratios = [slow / fast for slow, fast in zip(without, cached, strict=True)]
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread",
        "kimg": kimg,
        "without_cache_s": [round(seconds, 2) for seconds in without],
        "with_cache_s": [round(seconds, 2) for seconds in cached],
        "ratio_median": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
    }
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
