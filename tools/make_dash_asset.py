"""Train the DASH teacher of the 8x8 digits, and describe what came out.

Writes into `bdense_core/assets/digits-dash`: `teacher.safetensors` (the network, and in its description the logits of
TIRT and a sampler), `card.json` and `CARD.md`. Feature network and reference statistics are those of `digits`.
One thread and fixed seeds: on one machine a second run gives the same file bit for bit.

    python tools/make_dash_asset.py            # about seven minutes
    python tools/make_dash_asset.py --check    # retrain elsewhere, compare hashes and figures
"""

import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from make_digits_assets import EVALUATION_SEED, N_SAMPLES, USE, compare

from bdense_core import assets, data
from bdense_core.checkpoints import load_network, save_network
from bdense_core.evaluation import Metric
from bdense_core.files import HashedFile, canonical_json, write_text_atomically
from bdense_core.guidance import GuidedSampler
from bdense_core.loops.dash_teacher import Teacher, TeacherTraining, preset, pretrain
from bdense_core.task import Evaluation

NAME, DATASET = "digits-dash", "digits"
COMMAND = "python tools/make_dash_asset.py"
NETWORK = preset(torch.empty(1, 1, 8, 8), label_dim=10, channels=32)
TRAINING = TeacherTraining(budget_kimg=300.0, lr=2e-3, ema=0.999, gamma=0.1)
"""With the authors' gamma of 5 the noisy end is hardly trained: half of the unguided digits are of another class."""
SAMPLERS = {
    "guidance_1.5_20_steps_fd": GuidedSampler(num_steps=20, guidance=1.5),
    "unguided_20_steps_fd": GuidedSampler(num_steps=20),
    "tag_1_to_4_20_steps_fd": GuidedSampler(num_steps=20, guidance=4.0, tag_min=1.0),
}
"""Those whose figures the card has; the first is the teacher's own."""


def make(folder: Path) -> dict[str, Any]:
    """Train the teacher, write its file into `folder`, return the card."""
    teacher = train()
    about = {
        "dataset": DATASET,
        "training": TRAINING.to_dict(),
        "command": COMMAND,
        "weights": "moving average",
        "tirt": teacher.tirt,
        "sampler": next(iter(SAMPLERS.values())).to_dict(),
    }
    file = save_network(teacher.network, folder / "teacher.safetensors", about)
    return {
        "dataset": DATASET,
        "command": COMMAND,
        "files": {"teacher.safetensors": {"sha256": file.sha256, "bytes": Path(file.path).stat().st_size}},
        "settings": {
            "teacher": TRAINING.to_dict(), "network": NETWORK.to_dict(),
            "samplers": {name: sampler.to_dict() for name, sampler in SAMPLERS.items()},
            "evaluation": {"n_samples": N_SAMPLES, "seed": EVALUATION_SEED},
        },
        "figures": figures(file, teacher.tirt),
        "made": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "python": platform.python_version(),
            "torch": torch.__version__, "machine": f"{platform.machine()}, 1 thread",
        },
    }  # fmt: skip


def train() -> Teacher:
    """The trained teacher; says on the way how far it is."""
    training = pretrain(*data.load(DATASET), NETWORK, TRAINING)
    said = -1
    while True:
        try:
            progress = next(training)
        except StopIteration as end:
            teacher: Teacher = end.value
            return teacher
        if int(progress.done * 10) > said:
            said = int(progress.done * 10)
            click.echo(f"{progress.kimg:.0f} of {TRAINING.budget_kimg:g} kimg, loss {progress.loss:.4f}", err=True)


def figures(file: HashedFile, logits: list[float]) -> dict[str, float]:
    """Size and distances of the teacher, and how far its logits have gone."""
    network = load_network(file)
    metric = Metric(
        Evaluation(
            features_name=DATASET,
            features=assets.hashed(f"{DATASET}/features.safetensors"),
            reference=assets.hashed(f"{DATASET}/reference.safetensors"),
            n_samples=N_SAMPLES,
            seed=EVALUATION_SEED,
            batch=500,
        )
    )
    shape = (NETWORK.img_channels, NETWORK.img_resolution, NETWORK.img_resolution)
    found = {name: metric(sampler.bind(network), shape, NETWORK.label_dim) for name, sampler in SAMPLERS.items()}
    size = sum(parameter.numel() for parameter in network.parameters())
    return {"teacher_parameters": size, **found, "tirt_lowest": min(logits), "tirt_highest": max(logits)}


def describe(card: dict[str, Any]) -> str:
    """The card for people, in Markdown."""
    made = card["made"]
    files = "\n".join(f"| `{name}` | {f['bytes']} | `{f['sha256']}` |" for name, f in card["files"].items())
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in sorted(card["figures"].items()))
    return f"""# The DASH teacher of the digits

Made by `{card["command"]}` on {made["date"]} (Python {made["python"]}, torch {made["torch"]}; {made["machine"]}).
Data: nine tenths of scikit-learn's digits, 8x8, with their classes (`{card["dataset"]}`).
Run again on the same machine it gives the same file bit for bit; `--check` retrains and compares.

| file | bytes | sha256 |
| --- | --- | --- |
{files}

| figure | value |
| --- | --- |
{rows}

Distances are fd-digits (a Fréchet distance, not an FID) of {N_SAMPLES} samples of seed {EVALUATION_SEED} against all
1797 images. `tag` is time-aware guidance; the first sampler is the teacher's own. The logits are those that TIRT has
learned, from 0: lowest at the clean end, where the noise is hardest to see.

Training: `{canonical_json(card["settings"]["teacher"])}`.
Network: `{canonical_json(card["settings"]["network"])}`.

{USE}"""


@click.command(help=__doc__.partition("\n")[0] if __doc__ else None)
@click.option("--check", is_flag=True, help="Retrain in a temporary folder and compare; write nothing.")
def main(check: bool) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if check:
        with tempfile.TemporaryDirectory() as folder:
            agree = compare(make(Path(folder)), assets.card(NAME))
        sys.exit(0 if agree else 1)
    folder = Path(assets.__file__).parent / NAME
    folder.mkdir(exist_ok=True)
    card = make(folder)
    write_text_atomically(folder / "card.json", json.dumps(card, indent=2, sort_keys=True) + "\n")
    write_text_atomically(folder / "CARD.md", describe(card))
    click.echo(json.dumps(card["figures"], indent=2))


if __name__ == "__main__":
    main()
