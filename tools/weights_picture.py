"""The picture of branches and their weights: `python tools/weights_picture.py` writes docs/weights.png."""

from pathlib import Path

import click
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bdense_core.weights import PAPER_BEST, log_linear, shares

NUM_BRANCHES = 4
SLOPES = ((-1.0, "#d55e00"), (0.0, "#009e73"), (PAPER_BEST[0], "#cc79a7"), (3.0, "#0072b2"))
"""Falling, uniform, the paper's best, and steep enough to be almost the endpoint alone."""
TEACHER, STUDENT, DIM = "#3b4252", "#0072b2", "#8a8f98"


def trajectory(time: float) -> float:
    """A made-up path of the teacher, from noise at 0 to the end of the interval at 1."""
    return 0.95 - 0.12 * time - 0.72 * float(time**2.2)


def draw_branches(axes: Axes) -> None:
    """One interval of the student: K teacher steps, and a branch for each, all from one call at its start."""
    times = [i / 200 for i in range(201)]
    axes.plot(times, [trajectory(t) for t in times], color=TEACHER, lw=2, zorder=2)
    axes.text(0.6, 0.93, "the teacher's trajectory,\none step after the other", color=TEACHER, fontsize=10)
    axes.text(0.04, 0.42, "one call of the student:\na branch to each state", color=STUDENT, fontsize=10)
    start = (0.0, trajectory(0.0))
    axes.plot(*start, "o", color=TEACHER, ms=9, zorder=3)
    for k in range(NUM_BRANCHES):
        time = (k + 1) / NUM_BRANCHES
        end, is_last = (time, trajectory(time)), k == NUM_BRANCHES - 1
        style = {
            "arrowstyle": "-|>", "color": STUDENT, "lw": 2.4 if is_last else 1.2, "shrinkB": 5, "shrinkA": 6,
            "linestyle": "-" if is_last else "--",
        }  # fmt: skip
        axes.annotate("", end, start, arrowprops=style)
        axes.plot(*end, "o", color=TEACHER, ms=7, zorder=3)
        axes.text(time + 0.025, end[1] + 0.03, f"k = {k}", fontsize=10, color=TEACHER)
    axes.text(
        0.95,
        trajectory(1.0) - 0.01,
        "the endpoint:\nit alone makes images",
        fontsize=10,
        color=STUDENT,
        ha="right",
        va="top",
    )
    axes.set(xlim=(-0.04, 1.16), ylim=(-0.03, 1.08), xticks=[], yticks=[])
    axes.set_title("One interval of the student: K = 4 branches", fontsize=11)
    axes.set_xlabel("noise  →  image")


def draw_shares(axes: Axes) -> None:
    """What part of all weight each branch has, for some slopes."""
    ks = range(NUM_BRANCHES)
    for slope, color in SLOPES:
        found = shares(log_linear(slope, 0.0, NUM_BRANCHES))
        axes.plot(ks, found, "o-", color=color, lw=2, label=f"a = {slope:g}")
    axes.set(xticks=list(ks), ylim=(-0.03, 1.03), xlabel="branch k", ylabel="share of the weights")
    axes.grid(color=DIM, alpha=0.25)
    axes.legend(frameon=False, loc="upper left")
    axes.set_title("$w_k = e^{ak + b}$, over their sum: b cancels", fontsize=11)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default="docs/weights.png", show_default=True)
def main(output: Path) -> None:
    """Draw both halves into one PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(1.35, 1), layout="constrained")
    draw_branches(left)
    draw_shares(right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
