"""Whatever is given wrongly ends in one clear line, exit code 1 or 2, and leaves everything as it was."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bdense_core import assets
from search.study_file import studies_folder
from tests.complaints import complains

pytestmark = pytest.mark.e2e

SYNTHETIC = studies_folder() / "synthetic.yaml"
QUICK = ("--no-dashboard", "--set", "method.seconds=0", "--set", "seeds.control_repeats=1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "method.second=1"), ("unknown key method.second", "did you mean method.seconds?")),
        (("--set", "space.b=[-9, 0]"), ("must not go below -5",)),
        (("--set", "space.a=[3, 1]"), ("must rise",)),
        (("--set", "method.num_branches=0"), ("num_branches",)),
        (("--set", "resources.cpus=none"), ("resources.cpus",)),
        (("--set", "nonsense"), ("KEY=VALUE",)),
        (("--study", "a b"), ("name",)),
        (("--set", "method.num_branches=1"), ("at least 2",)),
        (("--set", "method.budget_kimg=2.5"), ("must be whole", "2.5")),
        (("--storage", "sqlite:///x.db"), ("PostgreSQL",)),
    ],
)
def test_wrong_settings_touch_nothing(newcomer, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    complains(newcomer.launch(str(SYNTHETIC), *QUICK, *arguments), 2, *words)
    assert not newcomer.home.exists()


def test_a_teacher_of_another_dataset_is_refused(newcomer) -> None:
    complains(newcomer.launch("--set", "dataset=cifar10"), 2, "dataset is 'cifar10'", "'digits'")


def test_branches_that_do_not_divide_the_grid_are_refused(newcomer) -> None:
    done = newcomer.launch("--set", "method.num_branches=3", "--set", "method.teacher_steps=4", "--dry-run")
    complains(done, 2, "method.num_branches (3) does not divide", "4 steps per interval")


def test_a_missing_study_file_is_named_with_those_there_are(newcomer) -> None:
    complains(newcomer.launch("nowhere.yaml"), 2, "no study file nowhere.yaml", "digits.yaml")


def test_an_unknown_option_is_wrong_usage(newcomer) -> None:
    assert newcomer.launch("--frobnicate").returncode == 2
    assert newcomer.weights("export").returncode == 2


def test_a_dry_run_prints_the_plan_and_touches_nothing(newcomer) -> None:
    done = newcomer.launch("--dry-run", "--format", "json", "--trials", "5")
    plan = json.loads(done.stdout)["plan"]
    # 12 teacher steps and 2 x 3 student evaluations for each trajectory (spec/methods.md 1.5)
    images = json.loads(done.stdout)["study"]["method"]["budget_kimg"] * 1000
    repeats = plan["control_repeats"]
    assert plan["runs"] == 5 + 3 * repeats
    assert plan["network_evaluations"]["teacher_cache"] == 12 * images * repeats
    assert plan["network_evaluations"]["student_training"] == 6 * images * plan["runs"]
    assert not newcomer.home.exists()


def test_a_taken_name_with_other_settings_lists_the_keys_and_changes_nothing(user, finished) -> None:
    before = user.show("finished")
    done = user.launch(str(SYNTHETIC), "--study", "finished", *QUICK, "--set", "method.noise=0.7")
    complains(done, 1, "'finished' exists with other settings", "method.noise: stored 0.05, now 0.7")
    assert user.show("finished") == before


def test_export_of_an_unknown_study_lists_the_known_ones(user, finished) -> None:
    complains(user.weights("export", "--study", "unknown"), 1, "no study 'unknown'", "finished")


def test_export_of_a_study_with_nothing_finished_says_so(user) -> None:
    user.launch(str(SYNTHETIC), "--study", "empty", "--trials", "0", *QUICK)
    complains(user.weights("export", "--study", "empty"), 1, "no searched trial that ran to its end")


def test_looking_before_any_launch_says_what_to_do(newcomer) -> None:
    complains(newcomer.weights("list"), 1, "launch a study first")
    assert not newcomer.home.exists()


def test_an_unreachable_database_is_named_without_its_password(newcomer) -> None:
    url = "postgresql://me:hunter2@127.0.0.1:1/none"
    for done in (
        newcomer.launch(str(SYNTHETIC), *QUICK, "--storage", url),
        newcomer.weights("list", OPTUNA_STORAGE=url),
    ):
        complains(done, 1, "127.0.0.1:1", "cannot be used")
        assert "hunter2" not in done.stderr + done.stdout


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_drawn(newcomer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = newcomer.weights("sample", "digits", "--output", "grid.png", "--png", str(tmp_path / "file" / "folder"))
    complains(done, 1, "cannot make the folder", "file/folder")


def test_an_unreachable_ray_cluster_ends_the_launch_before_anything_is_made(newcomer) -> None:
    done = newcomer.launch(str(SYNTHETIC), *QUICK, "--ray-address", "127.0.0.1:1")
    complains(done, 1, "no Ray cluster answers at 127.0.0.1:1")
    assert not newcomer.home.exists()


def test_a_ray_cluster_that_wants_another_token_says_so_at_once(newcomer, ray_environment) -> None:
    address = ("--ray-address", ray_environment["RAY_ADDRESS"])
    for access in ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, {}):
        done = newcomer.launch(str(SYNTHETIC), *QUICK, *address, **access)
        complains(done, 1, "does not take this token", "RAY_AUTH_TOKEN")


def test_a_trial_that_asks_for_more_than_the_cluster_has_is_refused(user) -> None:
    done = user.launch(str(SYNTHETIC), "--study", "greedy", *QUICK, "--set", "resources.cpus=4096")
    complains(done, 1, "4096 CPU", "lower resources.cpus")


def test_a_damaged_teacher_is_found_before_anything_starts(newcomer, tmp_path: Path) -> None:
    teacher = tmp_path / "mine.safetensors"
    content = assets.path("digits/teacher.safetensors").read_bytes()
    study = yaml.safe_load((studies_folder() / "digits.yaml").read_text()) | {"teacher": str(teacher)}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(study))
    for damaged in (content[: len(content) // 2], b"no network at all", b""):
        teacher.write_bytes(damaged)
        complains(newcomer.launch(str(tmp_path / "mine.yaml"), "--no-dashboard"), 1, "mine.safetensors")
        assert not (newcomer.home / "postgres").exists()


@pytest.mark.long
def test_a_damaged_teacher_cache_is_named_and_heals_when_the_file_is_deleted(newcomer) -> None:
    arguments = (
        "--study", "cached", "--trials", "0", "--no-dashboard", "--set", "method.budget_kimg=1",
        "--set", "seeds.control_repeats=1", "--set", "evaluation.n_samples=100",
    )  # fmt: skip
    assert newcomer.launch(*arguments).returncode == 0
    shard = next((newcomer.home / "cache").glob("*/shard-*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = (*arguments[:3], "1", *arguments[4:])
    complains(newcomer.launch(*again), 1, str(shard), "damaged")
    assert {trial["state"] for trial in newcomer.show("cached")["trials"]} == {"COMPLETE"}
    shard.unlink()
    assert newcomer.launch(*again).returncode == 0
    assert shard.read_bytes() == whole


def test_a_home_that_cannot_be_made_is_named(newcomer) -> None:
    newcomer.home.write_text("a file is in the way")
    done = newcomer.launch(str(SYNTHETIC), *QUICK)
    complains(done, done.returncode, str(newcomer.home))
    assert done.returncode in (1, 2)
    newcomer.home.unlink()


def test_doctor_tells_what_the_machine_has(user, finished) -> None:
    done = user.weights("doctor", "--format", "json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["problems"] == []
    assert {"storage_url", "storage_ok", "ray", "gpus", "versions"} <= found.keys()
    assert found["storage_ok"] is True


def test_doctor_fails_on_a_database_that_does_not_answer(newcomer) -> None:
    done = newcomer.weights("doctor", "--format", "json", OPTUNA_STORAGE="postgresql://me:hunter2@127.0.0.1:1/none")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["storage_ok"] is False and found["problems"]
    assert "hunter2" not in done.stdout + done.stderr


def test_help_loads_neither_torch_nor_ray_nor_optuna() -> None:
    code = (
        "import sys\nfrom search import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'ray', 'optuna', 'pydantic', 'sqlalchemy'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_every_command_has_help_and_stands_in_the_readme() -> None:
    from search.cli import commands

    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    for name, command in commands.commands.items():
        assert command.help, name
        assert f"`bdense-weights {name}`" in readme or f"bdense-weights {name} " in readme, name


def test_the_door_is_safe_to_import() -> None:
    root = Path(__file__).resolve().parents[2]
    code = "import sys; before = list(sys.path); import search.launch_study; assert sys.path == before"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
    assert shutil.which("bdense-weights", path=str(Path(sys.executable).parent))
