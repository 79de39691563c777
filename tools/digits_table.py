"""Distil a digits study with several branch weightings and training seeds, by one protocol: docs/NAME.md.

    python tools/digits_table.py              # studies/digits.yaml
    python tools/digits_table.py digits16 --weighting "endpoint only" --weighting uniform    # these alone

Settings are the study file's. What stands in the page from "How the settings were chosen" on is kept.
"""

import datetime
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import click
import torch

from bdense_core import assets
from bdense_core.checkpoints import load_network
from bdense_core.evaluation import Metric
from bdense_core.files import canonical_json, write_text_atomically
from bdense_core.loops import sfd
from bdense_core.methods.sfd import SFD
from bdense_core.task import Evaluation, Score
from bdense_core.weights import PAPER_BEST, Weights, endpoint_only, log_linear, shares, uniform
from search.spec import Study
from search.study_file import load_study, studies_folder

WEIGHTINGS: dict[str, Weights] = {
    "endpoint only": endpoint_only(4),
    "a = 4": log_linear(4, 0, 4),
    "a = 2.5": log_linear(2.5, 0, 4),
    "paper (1.386, -4.274)": log_linear(*PAPER_BEST, 4),
    "a = 0.7": log_linear(0.7, 0, 4),
    "uniform": uniform(4),
    "a = -0.5": log_linear(-0.5, 0, 4),
    "a = -1": log_linear(-1, 0, 4),
}
KEPT = "## How the settings were chosen"


@dataclass(frozen=True)
class Run:
    """The scores of one distillation as it trained, and its CPU seconds."""

    scores: list[Score]
    seconds: float

    @property
    def value(self) -> float:
        return self.scores[-1].value


def evaluation_of(study: Study) -> Evaluation:
    """The study's, with all samples at every score, so that the table's columns have one protocol."""
    assert study.evaluation is not None
    return replace(study.evaluation, early_samples=None)


def method_of(study: Study) -> SFD:
    assert isinstance(study.spec.method, SFD)
    return study.spec.method


def distil(study: Study, weights: Weights, seed: int, cache_root: Path) -> Run:
    task = replace(study.task(weights, seed, cache_root=cache_root), evaluation=evaluation_of(study))
    start = time.process_time()
    scores = [event for event in study.spec.method.run(task) if isinstance(event, Score)]
    run = Run(scores=scores, seconds=time.process_time() - start)
    click.echo(f"{', '.join(f'{share:.2f}' for share in shares(weights))}, seed {seed}: {run.value:.3f}", err=True)
    return run


def all_of_seed(study: Study, names: Sequence[str], cache_root: Path, seed: int) -> list[Run]:
    """Each of these weightings on one seed; the first run makes the seed's teacher cache."""
    torch.set_num_threads(1)
    return [distil(study, WEIGHTINGS[name], seed, cache_root) for name in names]


def evaluation_seconds(study: Study) -> float:
    """CPU seconds of one score: a student that has learned nothing costs what any other does."""
    assert study.teacher is not None
    network, grid = load_network(study.teacher), sfd.make_grid(method_of(study))
    config, metric = network.config, Metric(evaluation_of(study))
    shape = (config.img_channels, config.img_resolution, config.img_resolution)
    start = time.process_time()
    metric(lambda noise, labels: sfd.sample(network, noise, grid, labels), shape, config.label_dim)
    return time.process_time() - start


def table(runs: dict[str, list[Run]]) -> list[str]:
    """A row for each weighting: every seed, their mean and range, the means of the intermediate values."""
    some = next(iter(runs.values()))
    kimg = [score.kimg for score in some[0].scores]
    head = [
        "weights",
        "shares",
        *(f"seed {seed}" for seed in range(len(some))),
        "mean",
        "range",
        *(f"at {k} kimg" for k in kimg[:-1]),
    ]
    rows = [head, ["---"] * len(head)]
    for name, some in runs.items():
        values = [run.value for run in some]
        on_the_way = [statistics.mean(run.scores[i].value for run in some) for i in range(len(kimg) - 1)]
        fractions = " ".join(f"{share:.2f}" for share in shares(WEIGHTINGS[name]))
        numbers = [*values, statistics.mean(values), max(values) - min(values), *on_the_way]
        rows.append([name, fractions, *(f"{number:.2f}" for number in numbers)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def page(study: Study, runs: dict[str, list[Run]], evaluation_s: float, notes: str) -> str:
    """The whole document; `notes` are what people wrote below it."""
    values = {name: [run.value for run in some] for name, some in runs.items()}
    means = [statistics.mean(some) for some in values.values()]
    deviation = statistics.mean(statistics.stdev(some) for some in values.values())
    widest = max(max(some) - min(some) for some in values.values())
    first, *others = runs.values()
    seconds = statistics.median(run.seconds for some in others for run in some)
    cold_s = statistics.median(run.seconds for run in first) - seconds
    name, method, evaluation = study.name, method_of(study), evaluation_of(study)
    figures = assets.card(name)["figures"]
    teacher, untrained = figures["teacher_12_steps_fd"], figures["untrained_student_nfe2_fd"]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    settings = {key: value for key, value in asdict(method).items() if value is not None}
    every, argument = study.spec.budget.every_kimg, "" if name == "digits" else f" {name}"
    is_scored_once = len(first[0].scores) == 1
    columns = "" if is_scored_once else ' Columns "at ... kimg" are means over the seeds.'
    return f"""# Branch weightings on the {name}

{study.metric} (lower is better; not an FID) of students at NFE {method.nfe} with K = {method.num_branches},
distilled from the shipped teacher. That teacher scores {teacher:.2f} itself with 12 steps, an untrained
student {untrained:.1f} (both on 2000 samples, `bdense_core/assets/{name}/CARD.md`). All weightings share one
protocol; all that were run with these settings are here, with every seed.

{chr(10).join(table(runs))}

- Spread between weightings: their means span {max(means) - min(means):.2f}.
- Spread between training seeds: standard deviation {deviation:.3f} on average, range of {len(first)} seeds at
  most {widest:.2f}. Differences of that size are no findings.
- Cost of a trial: {seconds:.1f} s of CPU time (median, one thread) with its teacher cache,
  {evaluation_s:.1f} s of it for the evaluations. The first trial of a seed needs {cold_s:.1f} s more, to make
  the cache.
- Settings: `{canonical_json(settings)}`; {method.num_iterations} iterations, scored every {every} kimg.
- Evaluation: {evaluation.n_samples} samples of seed {evaluation.seed}.{columns}
- Made by `python tools/digits_table.py{argument}` on {today}:
  Python {platform.python_version()}, torch {torch.__version__}, {_cpu()}, one thread, and other work on the
  machine's two cores at the same time.

{notes}"""


def _notes(path: Path) -> str:
    """The part of the page that is kept."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return KEPT + text.partition(KEPT)[2] if KEPT in text else ""


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


@click.command(help=__doc__)
@click.argument("name", type=click.Choice(["digits", "digits16"]), default="digits")
@click.option("--weighting", "names", type=click.Choice(list(WEIGHTINGS)), multiple=True, help="Default: all.")
@click.option("--seeds", type=click.IntRange(2), default=3, show_default=True, help="Training seeds, from 0.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Seeds at once.")
@click.option("--output", type=click.Path(path_type=Path), help="Default: docs/NAME.md")
def main(name: str, names: tuple[str, ...], seeds: int, jobs: int, output: Path | None) -> None:
    torch.set_num_threads(1)
    output, names = output or Path("docs") / f"{name}.md", names or tuple(WEIGHTINGS)
    study = load_study(studies_folder() / f"{name}.yaml")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        by_seed = list(pool.map(partial(all_of_seed, study, names, Path(folder)), range(seeds)))
    runs = {names[i]: [some[i] for some in by_seed] for i in range(len(names))}
    scoring = len(by_seed[0][0].scores) * evaluation_seconds(study)
    write_text_atomically(output, page(study, runs, scoring, _notes(output)))
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
