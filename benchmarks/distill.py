"""Our SFD training against a plain loop in the authors' manner, in one run.

    python -m benchmarks.distill [--device cpu|cuda] [--network small|cifar10|imagenet64] [--precision float32]
        [--iterations N] [--pairs P] [--batch B] [--compile]

The plain loop: fresh noise for each batch, the teacher walks its 12 steps, then an Adam step for each trained interval;
endpoint only, nothing cached or read ahead, never compiled. Ours goes through `Distillation` and `Targets` as a real
run does, without evaluation: endpoint only (K = 1) and K = 4, each with a full cache and without one. All take turns,
in every second round backwards. Weights are drawn at random: speed does not depend on them.

Prints JSON: images per second, ratios pair by pair, what K = 4 costs, model FLOPs a second and their share of what a
large matrix product reaches. On a GPU seconds are the clock's; on a CPU they are the processor's on one thread, which
depend less on what else is running. Peak memory is measured in a process for each variant: on a GPU what torch
allocated, on a CPU what the process held beyond Python and torch (Linux only). Counting network evaluations, a full
cache saves 18 / 6 = 3.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from bdense_core import assets
from bdense_core.branches import freeze, with_branches
from bdense_core.checkpoints import load_network, save_network
from bdense_core.devices import check_device, place
from bdense_core.files import HashedFile, sha256_of_file
from bdense_core.loops import sfd_targets
from bdense_core.loops.sfd import adam, first_states, make_grid, teacher_states
from bdense_core.loops.sfd_run import Distillation
from bdense_core.methods.sfd import SFD
from bdense_core.networks import NetworkConfig, build, forward_flops
from bdense_core.precision import DTYPES, Trainee, in_precision
from bdense_core.task import Evaluation, Task
from bdense_core.weights import PAPER_BEST, endpoint_only, log_linear


@dataclass(frozen=True)
class Size:
    """A network, and how much of it is measured at once unless told otherwise."""

    config: NetworkConfig
    batch: int
    iterations: int


SIZES = {
    # 0.55M parameters. The head of K = 4 has 1.3 % of the FLOPs, of the real network 0.1 %: narrower is not like it.
    "small": Size(
        NetworkConfig.ddpmpp(
            img_resolution=32, model_channels=32, channel_mult=(1, 1, 1), num_blocks=2, attn_resolutions=(),
            channel_mult_emb=2,
        ),
        batch=16,
        iterations=2,
    ),
    "cifar10": Size(NetworkConfig.ddpmpp(img_resolution=32, augment_dim=9, dropout=0.13), batch=128, iterations=16),
    "imagenet64": Size(NetworkConfig.adm(img_resolution=64, label_dim=1000), batch=64, iterations=8),
}  # fmt: skip

ENDPOINT = SFD(nfe=2, num_branches=1, teacher_steps=4)
DENSE = replace(ENDPOINT, num_branches=4)
OURS = {
    "endpoint only, cache": (ENDPOINT, True),
    "K = 4, cache": (DENSE, True),
    "endpoint only, no cache": (ENDPOINT, False),
    "K = 4, no cache": (DENSE, False),
}
PLAIN = "plain loop"

Advance = Callable[[], None]
"""Trains as many iterations as are measured at once."""


@dataclass(frozen=True)
class Setup:
    """One run of the benchmark."""

    network: str
    device: str
    precision: str
    batch: int
    iterations: int
    pairs: int
    compiled: bool

    @property
    def config(self) -> NetworkConfig:
        return SIZES[self.network].config

    @property
    def images(self) -> int:
        """Trained on in one measurement."""
        return self.batch * self.iterations

    def sized(self, method: SFD) -> SFD:
        """The method for as many iterations as all rounds and the warm-up take."""
        kimg = self.images * (self.pairs + 1) / 1000
        return replace(method, batch=self.batch, budget_kimg=kimg, precision=self.precision)  # type: ignore[arg-type]


# --- the variants ---------------------------------------------------------------------------------------


def make_teacher(config: NetworkConfig, folder: Path) -> HashedFile:
    """A network whose every weight is drawn, so that no layer is idle behind its zero start."""
    torch.manual_seed(0)
    network = build(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    return save_network(network, folder / "teacher.safetensors")


def plain_loop(setup: Setup, teacher_file: HashedFile) -> Advance:
    """Training as the authors write it, with our networks, precision and optimizer."""
    device, method = check_device(setup.device), setup.sized(ENDPOINT)
    original, grid = load_network(teacher_file), make_grid(method)
    teacher = place(freeze(in_precision(original, method.precision)), device)
    student = place(with_branches(original, 1), device).requires_grad_(True).train()
    trainee = Trainee(student, adam(student, method), method.precision)
    config = original.config
    shape = (setup.batch, config.img_channels, config.img_resolution, config.img_resolution)

    def iteration() -> None:
        noise, labels = torch.randn(shape, device=device), None
        if config.label_dim:
            labels = torch.eye(config.label_dim, device=device)[torch.randint(config.label_dim, (setup.batch,))]
        targets = teacher_states(teacher, noise, grid, labels)
        x = first_states(noise, grid)
        for interval in range(grid.first_trained, grid.num_intervals):
            t, after = (grid.student[i].to(x) for i in (interval, interval + 1))
            reached = x + (after - t) * (x - trainee.network(x, t, labels)) / t
            trainee.begin()
            trainee.backward((reached - targets[:, interval, 0]).abs().sum() / len(x))
            trainee.step()
            x = reached.detach()

    def advance() -> None:
        for _ in range(setup.iterations):
            iteration()

    return advance


def our_loop(setup: Setup, teacher_file: HashedFile, name: str, folder: Path) -> Advance:
    """A real run's training; with a cache, its targets are there beforehand."""
    method, cached = setup.sized(OURS[name][0]), OURS[name][1]
    task = Task(
        weights=endpoint_only(1) if method.num_branches == 1 else log_linear(*PAPER_BEST, method.num_branches),
        seed=0,
        every_kimg=1_000_000,
        teacher=teacher_file,
        evaluation=Evaluation(
            features_name="digits", features=assets.hashed("digits/features.safetensors"),
            reference=assets.hashed("digits/reference.safetensors"), n_samples=2, seed=0, batch=2,
        ),  # never used
        cache_root=str(folder / name) if cached else None,
        device=setup.device,
        compile=setup.compiled,
    )  # fmt: skip
    distillation = Distillation(method, task)
    if cached:
        for iteration in range(method.num_iterations):
            for _ in distillation.targets.fill(iteration):
                pass
        # A trial that finds its targets never loads the teacher.
        distillation.targets.teacher.release()

    def advance() -> None:
        for _ in range(setup.iterations):
            for _ in distillation.prepare():
                pass
            distillation.advance()

    return advance


def prepare(setup: Setup, teacher: HashedFile, name: str, folder: Path) -> Advance:
    return plain_loop(setup, teacher) if name == PLAIN else our_loop(setup, teacher, name, folder)


# --- measuring ------------------------------------------------------------------------------------------


def seconds(advance: Callable[[], object], device: str) -> float:
    """The clock's on a GPU, once it is done; else the processor's."""
    if not device.startswith("cuda"):
        begin = time.process_time()
        advance()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    advance()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def rounds(setup: Setup, teacher: HashedFile, folder: Path) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one that does not count."""
    variants = {name: prepare(setup, teacher, name, folder) for name in (PLAIN, *OURS)}
    found: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(setup.pairs + 1):
        for name in list(variants) if number % 2 else reversed(list(variants)):
            took = seconds(variants[name], setup.device)
            if number:
                found[name].append(took)
    return found


def matmul_flops(device: str, precision: str) -> float:
    """FLOPs a second of a large square product; the best of five."""
    side, repeats = (8192, 20) if device.startswith("cuda") else (2048, 2)
    a, b = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))  # type: ignore[index]
    product = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=product)

    return 2 * side**3 * repeats / min(seconds(multiply, device) for _ in range(5))


def peak_memory(setup: Setup, name: str, folder: Path) -> int:
    """Bytes, of a process that trains one variant only."""
    command = [
        sys.executable, "-m", "benchmarks.distill", "--device", setup.device, "--network", setup.network,
        "--precision", setup.precision, "--batch", str(setup.batch), "--iterations", str(setup.iterations),
        "--pairs", "1", "--memory-of", name, "--folder", str(folder), *(["--compile"] if setup.compiled else []),
    ]  # fmt: skip
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def memory_here(setup: Setup, name: str, folder: Path) -> int:
    """Trains in this process; its peak. The teacher and a cache, where there is one, are there already."""
    path = folder / "teacher.safetensors"
    before = resident("VmRSS")
    advance = prepare(setup, HashedFile(path=str(path), sha256=sha256_of_file(path)), name, folder)
    if setup.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    advance()
    advance()
    return torch.cuda.max_memory_allocated() if setup.device.startswith("cuda") else resident("VmHWM") - before


def resident(key: str) -> int:
    """Bytes of this process now (VmRSS) or at its peak (VmHWM); getrusage would count the parent's in."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


# --- the result -----------------------------------------------------------------------------------------


def model_flops(setup: Setup, name: str) -> float:
    """Of one image: the teacher's steps, where they are walked, and three forward passes for each trained interval."""
    method, cached = (ENDPOINT, False) if name == PLAIN else OURS[name]
    walked, trained = method.forward_units()
    student = forward_flops(replace(setup.config, num_branches=method.num_branches))
    return trained * student + (0 if cached else walked * forward_flops(setup.config))


def ratios(slow: list[float], fast: list[float]) -> dict[str, Any]:
    """Pair by pair."""
    found = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": round(statistics.median(found), 3), "all": [round(ratio, 3) for ratio in found]}


def costs(took: dict[str, list[float]], memory: dict[str, int], kind: str) -> dict[str, Any]:
    """What K = 4 costs over endpoint only, in percent."""
    dense, endpoint = f"K = 4, {kind}", f"endpoint only, {kind}"
    share = [100 * (a / b - 1) for a, b in zip(took[dense], took[endpoint], strict=True)]
    return {
        "time_percent": round(statistics.median(share), 2),
        "time_percent_all": [round(value, 2) for value in share],
        "memory_percent": round(100 * (memory[dense] / memory[endpoint] - 1), 2),
    }


def report(setup: Setup, took: dict[str, list[float]], memory: dict[str, int], reached: float) -> dict[str, Any]:
    """Everything, JSON-able."""
    on_gpu = setup.device.startswith("cuda")
    cpu = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread"
    variants = {}
    for name, times in took.items():
        speed = setup.images / statistics.median(times)
        variants[name] = {
            "images_per_s": float(f"{speed:.3g}"),
            "ratio": ratios(took[PLAIN], times),
            "peak_memory_mb": round(memory[name] / 1e6),
            "model_gflops_per_s": round(speed * model_flops(setup, name) / 1e9, 1),
            "share_of_matmul": round(speed * model_flops(setup, name) / reached, 3),
        }
    return {
        "device": torch.cuda.get_device_name() if on_gpu else cpu,
        "torch": torch.__version__,
        "network": setup.network,
        "parameters": sum(p.numel() for p in build(setup.config).parameters()),
        "precision": setup.precision,
        "batch": setup.batch,
        "images_per_measurement": setup.images,
        "compiled": setup.compiled,
        "matmul_gflops_per_s": round(reached / 1e9, 1),
        "variants": variants,
        "branches_cost": {kind: costs(took, memory, kind) for kind in ("cache", "no cache")},
    }


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--network", type=click.Choice(list(SIZES)), default="small", show_default=True)
@click.option("--precision", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--iterations", type=int, help="In one measurement; with batch they decide the size of a cache's shard.")
@click.option("--pairs", default=5, show_default=True)
@click.option("--batch", type=int)
@click.option("--compile", "compiled", is_flag=True, help="Ours alone.")
@click.option("--memory-of", type=click.Choice([PLAIN, *OURS]), hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(
    device: str,
    network: str,
    precision: str,
    iterations: int | None,
    pairs: int,
    batch: int | None,
    compiled: bool,
    memory_of: str | None,
    folder: Path | None,
) -> None:
    """Measure and print."""
    size = SIZES[network]
    setup = Setup(
        network=network, device=device, precision=precision, batch=batch or size.batch,
        iterations=iterations or size.iterations, pairs=pairs, compiled=compiled,
    )  # fmt: skip
    if not device.startswith("cuda"):
        torch.set_num_threads(1)
    # The teacher walks whole shards: a measurement must hold whole ones.
    sfd_targets.SHARD_ROWS = min(sfd_targets.SHARD_ROWS, setup.images)
    if setup.images % sfd_targets.SHARD_ROWS:
        raise click.BadParameter(f"batch times iterations is {setup.images}; give a multiple of 256, or less than it")
    if memory_of is not None:
        assert folder is not None
        click.echo(memory_here(setup, memory_of, folder))
        return
    with tempfile.TemporaryDirectory(prefix="bdense-") as name:
        took = rounds(setup, make_teacher(setup.config, Path(name)), Path(name))
        memory = {variant: peak_memory(setup, variant, Path(name)) for variant in took}
    click.echo(json.dumps(report(setup, took, memory, matmul_flops(device, precision)), indent=2))


if __name__ == "__main__":
    main()
