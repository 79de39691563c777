"""The commands of pages in docs/, in their order, by a newcomer; with a smaller budget, and fewer seeds."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import ROOT, User

pytestmark = [pytest.mark.e2e, pytest.mark.long]

SMALL = (
    "--no-dashboard", "--set", "method.budget_kimg=1", "--set", "evaluation.n_samples=100",
    "--set", "seeds.control_repeats=1", "--set", "sampler.startup_trials=1",
)  # fmt: skip
FEWER = {
    "tutorial": {"--trials 20": "--trials 3", "--trials 21": "--trials 4", "--top 3 --seeds 5": "--top 1 --seeds 2"},
    "own-teacher": {"--kimg 20": "--kimg 1"},
    "inert-b": {},
}
ELSEWHERE = {
    "dashboard": "test_dashboard.py", "transfer": "test_comparisons.py", "import-teacher": "test_models.py"
}  # fmt: skip
"""What runs on until it is ended, or for minutes, or on a file from elsewhere; each has a test of its own."""


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of each command, made shorter where it would take minutes."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ")
    for whole, part in FEWER[page].items():
        assert whole in lines, f"{page} has no {whole} any more"
        lines = lines.replace(whole, part)
    return [shlex.split(line.rpartition("&& ")[2], comments=True) for line in lines.splitlines() if line.strip()]


def run(someone: User, words: list[str]) -> str:
    program, *arguments = words
    if program == "python":
        assert arguments[0] == "search/launch_study.py"
        trials = () if "--trials" in arguments else ("--trials", "2")
        done = someone.launch(*arguments[1:], *trials, *SMALL)
    else:
        assert program == "bdense-weights", words
        small = ("--set", "method.budget_kimg=1") if arguments[0] == "distill" else ()
        done = someone.weights(
            *[str(ROOT / word) if word.startswith("studies/") else word for word in arguments], *small
        )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_all(someone: User, page: str) -> dict[str, str]:
    """What each command of the page printed."""
    return {shlex.join(words): run(someone, words) for words in commands(page) if words[1] not in ELSEWHERE}


def test_the_tutorial_leaves_what_it_says(newcomer: User) -> None:
    folder = newcomer.home.parent
    said = run_all(newcomer, "tutorial")
    assert len(said) >= 12
    for picture in ("digits.png", "images.png"):
        assert is_picture(folder / picture)
    weights = json.loads((folder / "weights.json").read_text())
    assert weights["schema"] == "bdense-weights/1"
    assert "<html" in (folder / "report" / "index.html").read_text()

    enqueued = [trial for trial in newcomer.show("digits")["trials"] if (trial["a"], trial["b"]) == (2.5, -1)]
    assert [trial["state"] for trial in enqueued] == ["COMPLETE"]
    distance = yaml.safe_load(next(output for command, output in said.items() if " fid " in command))
    result = json.loads((folder / "run" / "result.json").read_text())
    assert distance["value"] == pytest.approx(result["value"], rel=1e-6), "it draws the same noise"


def test_a_teacher_of_ones_own_is_trained_looked_at_and_searched_with(newcomer: User) -> None:
    folder = newcomer.home.parent
    (study,) = blocks("own-teacher", "yaml")
    (folder / "my-digits.yaml").write_text(study)
    shutil.copy(ROOT / "studies" / "digits.yaml", folder)
    said = run_all(newcomer, "own-teacher")
    assert len(said) == 5
    assert is_picture(folder / "teacher.png")
    searched = [trial["state"] for trial in newcomer.show("my-digits")["trials"] if trial["role"] == "search"]
    assert len(searched) == 2 and set(searched) <= {"COMPLETE", "PRUNED"}


def test_three_values_of_b_give_nearly_one_score(newcomer: User) -> None:
    assert len(run_all(newcomer, "inert-b")) == 3
    results = [json.loads((newcomer.home.parent / f"run-{index}" / "result.json").read_text()) for index in (1, 2, 3)]
    first, *others = (result["value"] for result in results)
    assert others == pytest.approx([first, first], rel=0.005)


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")
