"""What is lost where the teacher's states are kept in float16: in grey levels, and in the student's score.

    python tools/target_precision.py [--trajectories 1024]      # about four minutes on one thread

The shipped digits teacher and the settings of `studies/digits.yaml`. The first table compares states that were kept
and read back with the teacher's own, once as this project keeps them (less their part of the noise,
`bdense_core/loops/sfd_targets.py`) and once as plain float16. The second trains students on targets in float16 and in
float32, each with the training seeds 0, 1 and 2. Prints Markdown; `docs/full-size.md` has it.
"""

import platform
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import Tensor

from bdense_core.branches import freeze
from bdense_core.checkpoints import load_network
from bdense_core.distill import distill
from bdense_core.loops.sfd import latents, make_grid, teacher_states
from bdense_core.loops.sfd_targets import Targets
from bdense_core.methods.sfd import SFD
from bdense_core.task import Score
from search.spec import Study
from search.study_file import load_study, studies_folder

GREY_LEVEL = 1 / 127.5
"""Images span [-1, 1], their files 0 to 255."""
SEEDS = (0, 1, 2)


def digits(*overrides: str) -> Study:
    """The quickstart's study."""
    return load_study(studies_folder() / "digits.yaml", overrides=overrides)


def errors_of_states(trajectories: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exact states, and the errors of ours and of plain float16 states, [rows, J', K, C, H, W] each."""
    study = digits("method.targets=float16")
    assert isinstance(study.spec.method, SFD)
    method = replace(study.spec.method, batch=trajectories, budget_kimg=trajectories / 1000)
    task = replace(study.task(study.controls()["paper"].weights, SEEDS[0], cache_root=Path()), cache_root=None)
    assert task.teacher is not None
    teacher, grid = freeze(load_network(task.teacher)), make_grid(method)
    noise = latents(task.seed, 0, trajectories, (1, 8, 8))
    exact = teacher_states(teacher, noise, grid)[:, grid.first_trained :]
    with Targets(method, task, grid, teacher.config, torch.device("cpu")) as targets:
        for _ in targets.fill(0):
            pass
        kept = targets.batch(0).states
    return exact, kept - exact, exact.half().float() - exact


def table_of_states(trajectories: int) -> list[str]:
    """Rows by interval and branch."""
    exact, ours, plain = errors_of_states(trajectories)
    study = digits()
    assert isinstance(study.spec.method, SFD)
    grid = make_grid(study.spec.method)
    lines = [
        "| interval | branch | level t_k | largest state | ours: max | RMS | plain: max | RMS |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for j in range(exact.shape[1]):
        for k in range(exact.shape[2]):
            level = float(grid.inner[grid.first_trained + j, k])
            cells = [f"{level:.4g}", f"{exact[:, j, k].abs().max():.3g}"]
            for error in (ours, plain):
                grey = error[:, j, k].double() / GREY_LEVEL
                cells += [f"{grey.abs().max():.2g}", f"{grey.square().mean().sqrt():.2g}"]
            lines.append(f"| {grid.first_trained + j} | {k + 1} | " + " | ".join(cells) + " |")
    return lines


def score(targets: str, seed: int, cache_root: str) -> float:
    """The last fd-digits of a student with the paper's weights."""
    study = digits(f"method.targets={targets}")
    task = study.task(study.controls()["paper"].weights, seed, cache_root=Path(cache_root))
    return [event.value for event in distill(study.spec.method, task) if isinstance(event, Score)][-1]


def table_of_scores() -> list[str]:
    """Rows by precision, their difference, and the spread between seeds."""
    with tempfile.TemporaryDirectory(prefix="bdense-") as cache_root:
        found = {kind: [score(kind, seed, cache_root) for seed in SEEDS] for kind in ("float16", "float32")}
    lines = [
        "| targets | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean | standard deviation of seeds |",
        "| --- " * (len(SEEDS) + 3) + "|",
    ]
    for kind, values in found.items():
        cells = [*values, statistics.mean(values), statistics.stdev(values)]
        lines.append(f"| {kind} | " + " | ".join(f"{value:.4f}" for value in cells) + " |")
    apart = [half - single for half, single in zip(*found.values(), strict=True)]
    cells = [*apart, statistics.mean(apart)]
    lines.append("| difference | " + " | ".join(f"{value:+.4f}" for value in cells) + " | |")
    return lines


@click.command(help=__doc__)
@click.option("--trajectories", default=1024, show_default=True)
def main(trajectories: int) -> None:
    torch.set_num_threads(1)
    click.echo("\n".join(table_of_states(trajectories)) + "\n")
    click.echo("\n".join(table_of_scores()) + "\n")
    click.echo(
        f"Grey levels are 1/127.5; {trajectories} trajectories of seed {SEEDS[0]}. Scores are fd-digits, lower is "
        f"better. Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, one thread."
    )


if __name__ == "__main__":
    main()
