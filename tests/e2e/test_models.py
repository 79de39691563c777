"""Commands about one network at a time, and a study on real CIFAR-10 images, as a user types them."""

import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from bdense_core import assets
from bdense_core.files import sha256_of_file
from bdense_core.integrity import read_metadata
from tests import cifar10
from tests.complaints import complains

WEIGHTS = Path(sys.executable).parent / "bdense-weights"

pytestmark = pytest.mark.e2e

QUICK = ("--set", "method.budget_kimg=2", "--set", "evaluation.n_samples=200", "--format", "json")
TEACHER = str(assets.path("digits/teacher.safetensors"))


@pytest.fixture(scope="module")
def someone(new_user_of_module):
    """A home that these tests share: they only read what is in it, or write under names of their own."""
    return new_user_of_module


@pytest.fixture(scope="module")
def distilled(someone) -> dict:
    done = someone.weights("distill", "digits", "--a", "1.386", "--b", "-4.274", "--output", "run", *QUICK)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((someone.home.parent / "run" / "result.json").read_text())
    return result


# --- distil, sample, score ------------------------------------------------------------------------------


def test_one_distillation_leaves_a_student_its_samples_and_its_scores(someone, distilled) -> None:
    folder = someone.home.parent / "run"
    assert sorted(path.name for path in folder.iterdir()) == ["result.json", "samples.png", "student.safetensors"]
    assert [score["kimg"] for score in distilled["scores"]] == [1, 2]
    assert distilled["shares"][-1] == pytest.approx(0.753, abs=1e-3)
    assert (distilled["metric"], distilled["protocol"]["n_samples"]) == ("fd-digits", 200)
    with Image.open(folder / "samples.png") as image:
        assert image.size == (8 * 32, 8 * 32), "an image of 8 pixels is shown four times as large"
        assert np.asarray(image).std() > 20, "digits are neither black nor grey"


def test_it_is_told_again_and_other_weights_want_another_folder(someone, distilled) -> None:
    again = someone.weights("distill", "digits", "--a", "1.386", "--b", "-4.274", "--output", "run", *QUICK)
    assert json.loads(again.stdout) == distilled
    other = someone.weights("distill", "digits", "--control", "uniform", "--output", "run", *QUICK)
    complains(other, 1, "run holds the result of another run", "--output")


def test_the_written_student_scores_what_its_run_said(someone, distilled) -> None:
    """The extra branches are gone, and nothing else has changed: the same noise gives the same value to the bit."""
    done = someone.weights(
        "fid", "run/student.safetensors", "--features", "digits", "-n", "200", "--seed", "1000", "--format", "json"
    )
    found = json.loads(done.stdout)
    assert found["value"] == distilled["value"]
    assert (found["nfe"], found["protocol"]) == (2, distilled["protocol"])


def test_samples_are_a_grid_single_images_and_an_array_of_the_same_pixels(someone, distilled) -> None:
    folder = someone.home.parent
    done = someone.weights(
        "sample", "run/student.safetensors", "--output", "grid.png", "-n", "6", "--columns", "3", "--scale", "1",
        "--png", "single", "--npz", "all.npz", "--seed", "1000",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "NFE 2" in done.stderr
    pixels = np.load(folder / "all.npz", allow_pickle=False)["images"]
    assert (pixels.shape, pixels.dtype) == ((6, 8, 8, 1), np.uint8)
    grid = np.asarray(Image.open(folder / "grid.png"))
    for index in range(6):
        row, column = divmod(index, 3)
        assert np.array_equal(grid[8 * row : 8 * row + 8, 8 * column : 8 * column + 8], pixels[index, :, :, 0])
        assert np.array_equal(np.asarray(Image.open(folder / "single" / f"{index:06d}.png")), pixels[index, :, :, 0])
    scored = someone.weights("fid", "single", "--features", "digits", "-n", "6", "--format", "json")
    assert json.loads(scored.stdout)["metric"] == "fd-digits"


def test_a_teacher_is_sampled_with_a_solver_of_choice(someone) -> None:
    done = someone.weights("sample", TEACHER, "--output", "heun.png", "-n", "4", "--solver", "heun", "--steps", "5")
    assert "NFE 10" in done.stderr


@pytest.mark.long
def test_ctrl_c_keeps_the_state_and_says_so(someone) -> None:
    """Long before the first snapshot by the clock."""
    command = ("train-teacher", "--dataset", "digits", "--name", "kept", "--channels", "8", "--kimg", "12")
    running = someone.start(str(WEIGHTS), *command, "--batch", "32")
    running.wait_for(lambda lines: any("images/s" in line for line in lines))
    running.interrupt()
    assert running.wait() == 130
    assert any("the same command goes on from there" in line for line in running.lines), running.lines
    again = someone.weights(*command, "--batch", "32")
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stderr
    folder = someone.home / "models" / "kept"
    assert sorted(path.name for path in folder.iterdir()) == ["teacher.png", "teacher.safetensors"]
    shown = someone.weights("sample", "kept", "--output", "kept.png", "-n", "4")
    assert shown.returncode == 0, shown.stderr


@pytest.mark.long
def test_a_teacher_for_guidance_is_trained_and_brings_its_curriculum_and_sampler(someone) -> None:
    command = ("train-teacher", "--guided", "--dataset", "digits", "--name", "guided", "--channels", "8", "--kimg", "1")
    made = someone.weights(*command, "--batch", "32")
    assert made.returncode == 0, made.stderr
    about = read_metadata(str(someone.home / "models" / "guided" / "teacher.safetensors"))["about"]
    assert len(about["tirt"]) == 1000 and about["sampler"]["kind"] == "guided"
    shown = someone.weights("sample", "guided", "--output", "guided.png", "-n", "4")
    assert shown.returncode == 0 and "NFE 100" in shown.stderr, shown.stderr


def test_a_killed_distillation_goes_on_and_ends_as_an_undisturbed_one(someone, distilled) -> None:
    command = ("distill", "digits", "--a", "1.386", "--b", "-4.274", "--output", "killed", *QUICK)
    running = someone.start(str(WEIGHTS), *command)
    running.wait_for(lambda lines: any("at 1 kimg" in line for line in lines))
    running.process.send_signal(signal.SIGKILL)
    running.wait()
    folder = someone.home.parent / "killed"
    assert not (folder / "result.json").exists()
    assert list((folder / "snapshots").glob("snapshot-*.safetensors"))
    done = someone.weights(*command)
    assert json.loads(done.stdout)["scores"] == distilled["scores"]
    assert sha256_of_file(folder / "student.safetensors") == distilled["student"]["sha256"]
    assert not (folder / "snapshots").exists()


def test_a_part_of_the_images_is_drawn_not_cut_off(someone, tmp_path) -> None:
    """A folder is sorted by class: its first images would be of one class."""
    images, labels = load_digits(return_X_y=True)
    order = np.argsort(labels, kind="stable")
    np.savez(tmp_path / "sorted.npz", images=np.round(images[order] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1))
    command = ("fid", str(tmp_path / "sorted.npz"), "--features", "digits", "--format", "json")
    some, other, all_of_them = (
        json.loads(someone.weights(*command, *more).stdout)
        for more in (("-n", "180", "--seed", "1"), ("-n", "180", "--seed", "2"), ())
    )
    assert (some["seed"], all_of_them["protocol"]["n_samples"]) == (1, 1797)
    assert some["value"] != other["value"]
    assert some["value"] < 5, "one class alone is farther than 10"


def test_published_statistics_become_a_reference(someone, distilled) -> None:
    """Those of the digits themselves, in the form in which EDM and clean-fid publish theirs: the same distance."""
    from bdense_core.frechet import load_statistics

    shipped = load_statistics(assets.path("digits/reference.safetensors"))
    np.savez(someone.home.parent / "published.npz", mu=shipped.mean.numpy(), sigma=shipped.covariance.numpy())
    made = someone.weights(
        "reference", "--statistics", "published.npz", "--images", "1797", "--features", "digits", "--name", "published",
        "--format", "json",
    )  # fmt: skip
    assert json.loads(made.stdout)["n_samples"] == 1797, made.stderr
    done = someone.weights(
        "fid", "run/student.safetensors", "--features", "digits", "--reference", "published", "-n", "200", "--seed",
        "1000", "--format", "json",
    )  # fmt: skip
    assert json.loads(done.stdout)["value"] == distilled["value"]


# --- plans ----------------------------------------------------------------------------------------------


def test_a_dry_run_of_the_papers_study_says_what_it_costs_and_what_is_missing(newcomer) -> None:
    done = newcomer.launch("cifar10-nfe2.yaml", "--dry-run", "--format", "json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)["plan"]
    assert plan["compute"]["gflop_per_forward"] == pytest.approx(42.4, abs=0.05)  # spec/methods.md 1.5
    # 200,000 trajectories, 2 intervals of 4 states of 3 x 32 x 32 numbers of 2 bytes, for each of three seeds.
    assert plan["disk"]["teacher_cache_gb"] == pytest.approx(3 * 9.83, abs=0.01)
    assert plan["time"]["device_hours"] > 10 and "not measured here" in plan["time"]["source"]
    missing = "\n".join(plan["missing"])
    assert missing.count("bdense-weights fetch-teacher cifar10") == 3
    shown = newcomer.launch("cifar10-nfe2.yaml", "--dry-run").stdout
    assert "  - there is no teacher 'cifar10': get it with: bdense-weights fetch-teacher cifar10\n" in shown
    assert "no teacher 'cifar10'" in missing
    assert "GPU" in missing
    assert not newcomer.home.exists()


@pytest.mark.parametrize("nfe", [3, 4, 5])
def test_the_studies_of_other_nfe_build_on_the_first(newcomer, nfe: int) -> None:
    shown = json.loads(newcomer.launch(f"cifar10-nfe{nfe}.yaml", "--dry-run", "--format", "json").stdout)
    assert (shown["study"]["name"], shown["study"]["method"]["nfe"]) == (f"cifar10-nfe{nfe}", nfe)
    assert shown["study"]["method"]["budget_kimg"] == 200


def test_launching_without_the_teacher_says_how_to_get_it(newcomer) -> None:
    complains(newcomer.launch("cifar10-nfe2.yaml"), 1, "no teacher 'cifar10'", "bdense-weights fetch-teacher cifar10")
    assert not newcomer.home.exists()


# --- bad input ------------------------------------------------------------------------------------------


def truncated(folder: Path) -> str:
    path = folder / "truncated.safetensors"
    path.write_bytes(Path(TEACHER).read_bytes()[:-100])
    return str(path)


def renamed(folder: Path) -> str:
    path = folder / "renamed.safetensors"
    path.write_bytes(assets.path("digits/features.safetensors").read_bytes())
    return str(path)


def another_architecture(folder: Path) -> str:
    """The teacher's weights under a description with a wider network."""
    content = Path(TEACHER).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["bdense_network"])
    about["config"]["model_channels"] = 32
    header["__metadata__"]["bdense_network"] = json.dumps(about)
    text = json.dumps(header).encode()
    path = folder / "wider.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return str(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (truncated, ("truncated.safetensors",)),
        (renamed, ("renamed.safetensors", "no network of this project")),
        (another_architecture, ("wider.safetensors", "model.")),
    ],
)
def test_a_teacher_that_is_not_what_it_says_is_refused_with_the_place(someone, tmp_path, make, words) -> None:
    done = someone.weights(
        "distill", "digits", "--control", "uniform", "--output", str(tmp_path / "out"), "--set",
        f"teacher={make(tmp_path)}", *QUICK,
    )  # fmt: skip
    complains(done, 1, *words)
    assert not (tmp_path / "out" / "student.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("sample", TEACHER, "--output", "x.png", "--label", "3"), 2, ("label 3 is unknown", "no labels")),
        (("sample", "nothing.safetensors", "--output", "x.png"), 1, ("cannot be read", "nothing.safetensors")),
        (("sample", "nothing", "--output", "x.png"), 1, ("no teacher 'nothing'", "train-teacher", "digits")),
        (("sample", "digits", "--output", "x.jpg"), 2, ("x.jpg", "x.png")),
        (("sample", "edm.pkl", "--output", "x.png"), 1, ("edm.pkl", "import-teacher")),
        (("sample", TEACHER, "--output", "x.png", "--solver", "hoin"), 2, ("hoin", "heun")),
        (("sample", TEACHER, "--output", "no/folder/x.png"), 1, ("no folder",)),
        (("sample", TEACHER, "--output", "x.png", "--device", "cuda:7"), 2, ("cuda:7", "GPU")),
        (("fid", TEACHER, "-n", "10"), 1, ("no feature network 'inception'", "fetch-teacher")),
        (("fid", "nowhere", "--features", "digits", "-n", "10"), 2, ("nowhere",)),
        (("distill", "digits", "--output", "o"), 2, ("one way",)),
        (("distill", "digits", "--a", "1", "--b", "-7", "--output", "o"), 2, ("-7", "-5")),
        (("distill", "digits", "--weights", "1,2", "--output", "o"), 2, ("2 numbers", "4 loss terms")),
        (("distill", "digits", "--control", "best", "--output", "o"), 2, ("best", "endpoint_only")),
        (("distill", "synthetic", "--control", "uniform", "--output", "o"), 2, ("trains no network",)),
        (("distill", "digits", "--a", "nan", "--b", "0", "--output", "o"), 2, ("finite",)),
        (("distill", "digits", "--control", "uniform", "--output", TEACHER), 2, ("is a file",)),
        (("import-teacher", TEACHER, "--name", "mine"), 1, ("no pickle",)),
        (("import-teacher", "nothing.pkl", "--name", "digits"), 2, ("'digits'", "choose another --name")),
        (("train-teacher", "--dataset", "digits", "--name", "mine", "--channels", "6"), 2, ("--channels is 6",)),
        (("import-teacher", "nothing.pkl"), 1, ("nothing.pkl",)),
        (("import-features", TEACHER, "--name", "mine"), 1, ("teacher.safetensors",)),
        (("train-teacher", "--dataset", "digit", "--name", "mine"), 2, ("digit",)),
        (("train-teacher", "--guided", "--flip", "--dataset", "digits", "--name", "mine"), 2, ("--guided", "--flip")),
        (("train-teacher", "--dataset", "digits", "--name", "../mine"), 2, ("plain name",)),
        (("fetch-teacher", "cifar11"), 2, ("cifar11", "cifar10")),
        (("fetch-teacher", "cifar10", "--sha256", "abc"), 2, ("ROLE=HASH",)),
    ],
)
def test_what_is_given_wrongly_is_one_line(tmp_path, monkeypatch, capsys, arguments, code, words) -> None:
    """In this process: starting one for each would take longer than all else here."""
    from search.cli import main

    monkeypatch.setenv("BDENSE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    said = capsys.readouterr()
    complains(subprocess.CompletedProcess(arguments, int(ended.value.code), said.out, said.err), code, *words)


def test_a_cache_that_cannot_fit_ends_a_launch_before_it_begins(newcomer) -> None:
    done = newcomer.launch("--set", "cache.budget_gb=0.001", "--no-dashboard")
    complains(done, 1, "teacher cache takes 0.0123 GB", "cache.budget_gb allows 0.001")
    assert not newcomer.home.exists()


def test_no_gpu_where_a_study_asks_for_one_is_said(someone) -> None:
    done = someone.weights("distill", "digits", "--control", "uniform", "--output", "o", "--set", "resources.gpus=1")
    complains(done, 2, "device cuda is asked for", "resources.gpus: 0")


def test_a_reference_of_other_features_is_refused_before_anything_starts(newcomer, tmp_path) -> None:
    import torch

    from bdense_core.frechet import Statistics, save_statistics

    path = tmp_path / "other.safetensors"
    save_statistics(Statistics(torch.zeros(64).double(), torch.eye(64).double(), 100, "digits@0123456789abcdef"), path)
    done = newcomer.launch("--set", f"evaluation.reference={path}", "--no-dashboard")
    complains(done, 1, "made with features digits@0123456789abcdef", "bdense-weights reference")
    assert not newcomer.home.exists()


# --- real images ----------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.skipif(cifar10.folder() is None, reason=cifar10.MISSING)
def test_a_study_on_real_cifar10_images_reports_its_own_metric(user, tmp_path) -> None:
    """Features, reference, teacher and study, each by its command, at a size for two cores."""
    images, labels = cifar10.read("train-1")
    np.savez(tmp_path / "cifar10.npz", images=images[:500], labels=labels[:500])
    classifier = cifar10.folder() / "cifar10-resnet56.safetensors"
    data = ("--dataset", str(tmp_path / "cifar10.npz"), "--name", "cifar10-small", "--format", "json")
    features = user.weights("import-features", str(classifier), "--name", "resnet56", "--format", "json")
    assert features.returncode == 0, features.stderr
    reference = user.weights("reference", "--features", "resnet56", *data)
    assert json.loads(reference.stdout)["n_samples"] == 500, reference.stderr
    teacher = user.weights("train-teacher", "--channels", "4", "--kimg", "0.3", "--batch", "50", "--flip", *data)
    assert teacher.returncode == 0, teacher.stderr
    assert json.loads(teacher.stdout)["dataset"]["images"] == 500
    assert (user.home / "models" / "cifar10-small" / "teacher.png").exists()
    launched = user.launch(
        "cifar10-small", "--no-dashboard", "--trials", "1", "--format", "json",
        "--set", "method.budget_kimg=1", "--set", "budget.every_kimg=1", "--set", "method.batch=50",
        "--set", "method.num_branches=2", "--set", "method.nfe=1", "--set", "evaluation.n_samples=100",
        "--set", "evaluation.batch=100",
        "--set", "seeds.control_repeats=1", "--set", "pruner.kind=none",
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    shown = json.loads(launched.stdout)
    assert shown["metric"] == "fd-resnet56"
    values = [trial["value"] for trial in shown["trials"] if trial["state"] == "COMPLETE"]
    assert len(values) == 4
    assert all(0 < value < 1000 for value in values)
    exported = yaml.safe_load(user.weights("export", "--study", "cifar10-small").stdout)
    assert (exported["dataset"], exported["score"]["metric"]) == ("cifar10", "fd-resnet56")
