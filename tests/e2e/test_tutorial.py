"""The commands of docs/tutorial.md, in their order, by a newcomer; with a smaller budget, and fewer seeds."""

import json
import re
import shlex

import pytest
import yaml

from tests.e2e.conftest import ROOT, User

pytestmark = [pytest.mark.e2e, pytest.mark.long]

SMALL = (
    "--no-dashboard", "--set", "method.budget_kimg=1", "--set", "evaluation.n_samples=100",
    "--set", "seeds.control_repeats=1", "--set", "sampler.startup_trials=1",
)  # fmt: skip
FEWER = {"--trials 20": "--trials 3", "--trials 21": "--trials 4", "--top 3 --seeds 5": "--top 1 --seeds 2"}
ELSEWHERE = {"dashboard": "test_dashboard.py", "transfer": "test_comparisons.py"}
"""What runs on until it is ended, or for minutes; each has a test of its own."""


def commands() -> list[list[str]]:
    """The words of each command, made shorter where it would take minutes."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ")
    for whole, part in FEWER.items():
        assert whole in lines, f"the tutorial has no {whole} any more"
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


def test_the_tutorials_commands_end_well_and_leave_what_it_says(newcomer: User) -> None:
    folder = newcomer.home.parent
    said = {shlex.join(words): run(newcomer, words) for words in commands() if words[1] not in ELSEWHERE}
    assert len(said) >= 12
    for picture in ("digits.png", "images.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG"), picture
    weights = json.loads((folder / "weights.json").read_text())
    assert weights["schema"] == "bdense-weights/1"
    assert "<html" in (folder / "report" / "index.html").read_text()

    enqueued = [trial for trial in newcomer.show("digits")["trials"] if (trial["a"], trial["b"]) == (2.5, -1)]
    assert [trial["state"] for trial in enqueued] == ["COMPLETE"]
    distance = yaml.safe_load(next(output for command, output in said.items() if " fid " in command))
    result = json.loads((folder / "run" / "result.json").read_text())
    assert distance["value"] == pytest.approx(result["value"], rel=1e-6), "it draws the same noise"
