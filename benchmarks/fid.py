"""What symmetric eigenproblems save: our Fréchet distance against the root of a general matrix, in one run.

    python -m benchmarks.fid [--width 2048] [--samples 6000] [--repeats 3]

Statistics of random features whose spectrum falls over three decades and whose axes differ, both of full rank. Ours is
`frechet_distance`; the other is the textbook's tr (S_x S_y)^(1/2) by `scipy.linalg.sqrtm`, in turn with ours, with as
many threads. Two cases: statistics seen for the first time, and the next distance to the same reference, as in a study;
we keep nothing of a reference, so both should cost the same. Prints JSON: on all cores seconds by the clock, on one
thread the processor's seconds; the ratios pair by pair and their median; by how much the distances differ. Which SciPy
matters: the roots of 1.17 are several times as fast as those before.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click
import numpy as np
import scipy
import torch
from scipy.linalg import sqrtm
from threadpoolctl import threadpool_limits

from bdense_core import seeds
from bdense_core.frechet import Statistics, frechet_distance, statistics_of


def random_statistics(width: int, n_samples: int, seed: int) -> Statistics:
    """Statistics of normal features with the standard deviations 1 to 1/1000 along random axes."""
    generator = seeds.generator(seed, "benchmark")
    features = torch.randn(n_samples, width, generator=generator, dtype=torch.float64)
    features *= torch.logspace(0, -3, width, dtype=torch.float64)
    axes, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return statistics_of(features @ axes, "benchmark")


def by_general_root(x: Statistics, y: Statistics) -> float:
    """The distance by the root of a matrix that is not symmetric, as FIDs are usually computed."""
    product = x.covariance.numpy() @ y.covariance.numpy()
    overlap = np.trace(sqrtm(product)).real
    apart = float((x.mean - y.mean).square().sum())
    return float(apart + x.covariance.trace() + y.covariance.trace() - 2 * overlap)


@click.command()
@click.option("--width", default=2048, show_default=True)
@click.option("--samples", default=6000, show_default=True)
@click.option("--repeats", default=3, show_default=True)
def main(width: int, samples: int, repeats: int) -> None:
    """Measure and print."""
    x, y = (random_statistics(width, samples, seed) for seed in (0, 1))
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__},
        "width": width,
        "samples": samples,
        "distance": frechet_distance(x, y),
        "relative_difference": abs(frechet_distance(x, y) / by_general_root(x, y) - 1),
        "all_cores_clock_s": measure(x, y, repeats, os.cpu_count() or 1, time.perf_counter),
        "one_thread_processor_s": measure(x, y, repeats, 1, time.process_time),
    }
    click.echo(json.dumps(result, indent=2))
    click.echo(in_a_line(result), err=True)


def measure(x: Statistics, y: Statistics, repeats: int, threads: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of both forms, in turn, and how many times as long the general root takes."""
    torch.set_num_threads(threads)
    fresh, same, general = [], [], []
    with threadpool_limits(threads):  # numpy's and SciPy's
        for _ in range(repeats):
            frechet_distance(x, y)  # a first one after sqrtm would pay for memory that it has given back
            new = replace(y)  # nothing can be kept in it
            fresh.append(seconds(frechet_distance, x, new, clock))
            same.append(seconds(frechet_distance, x, new, clock))
            general.append(seconds(by_general_root, x, y, clock))
    return {
        "general_root": [round(value, 2) for value in general],
        "ours": [round(value, 2) for value in fresh],
        "ours_same_reference": [round(value, 2) for value in same],
        "ratio": ratios(general, fresh),
        "ratio_same_reference": ratios(general, same),
    }


def in_a_line(result: dict[str, Any]) -> str:
    """The ratios, for people."""
    cores, thread = result["all_cores_clock_s"], result["one_thread_processor_s"]
    return (
        f"times as fast as sqrtm: all cores {cores['ratio']['median']} (same reference "
        f"{cores['ratio_same_reference']['median']}), one thread {thread['ratio']['median']} (same reference "
        f"{thread['ratio_same_reference']['median']}); relative difference {result['relative_difference']:.1e}"
    )


def seconds(
    distance: Callable[[Statistics, Statistics], float], x: Statistics, y: Statistics, clock: Callable[[], float]
) -> float:
    """Of one distance, by the given clock: the processor's depends less on what else is running."""
    begin = clock()
    distance(x, y)
    return clock() - begin


def ratios(slow: list[float], fast: list[float]) -> dict[str, Any]:
    """Pair by pair."""
    found = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": round(statistics.median(found), 1), "all": [round(value, 1) for value in found]}


if __name__ == "__main__":
    main()
