"""The documentation against the program: commands parse, links hold, keys and figures are what the code has.

Commands are parsed here, not run: tests/e2e runs them, and the last test below says which file runs which.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import yaml

from bdense_core import assets
from bdense_core.weights import log_linear, shares
from search import paper
from search.cli import commands
from search.spec import known_keys, validate
from tools import study_reference

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

SHELLS = ("", "bash", "sh", "console")
OURS = ("bdense-weights", "python", "python3", "ray", "pytest", "pip")
OTHERS = (
    "cd", "export", "git", ".", "ruff", "mypy", "lint-imports", "mkdocs", "docker", "kubectl", "curl", "openssl", "ssh",
)  # fmt: skip
"""What a block of commands may run beside; there is nothing of ours in it to check."""
PLACEHOLDERS = {"A": "1", "B": "-1", "N": "3", "N,...": "2,3", "PORT": "8080", "cifar10|imagenet64": "cifar10"}
"""What stands for a value of another kind than text; NAME, FILE, DIR and the like are read as they are."""

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
NESTED = re.compile(r"\$\(([^()]+)\)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?)$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """One command as a page shows it."""

    page: str
    text: str
    is_whole: bool
    """Whether it could be typed like this; within a sentence its options may be left out."""

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"

    def words(self) -> Iterator[list[str]]:
        """The words of each of its parts, without comments, brackets of what may be left out, and environment."""
        text = re.sub(r"(?<=\s)\[([^\]]*)\]", r"\1", re.sub(r"(^|\s)#.*", "", self.text))
        for part in re.split(r"\s(?:&&|\|)\s|;\s", text):
            words = [_filled(word) for word in shlex.split(part)]
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def _filled(word: str) -> str:
    """A word with a value where a placeholder stands for one."""
    option, equals, value = word.rpartition("=")
    return option + equals + PLACEHOLDERS.get(value, value)


def commands_of(page: str, text: str) -> Iterator[Command]:
    for language, block in BLOCK.findall(text):
        if language in SHELLS:
            for line in (raw.strip().removeprefix("$ ") for raw in block.replace("\\\n", " ").splitlines()):
                if language == "bash" or f"{line} ".startswith(tuple(f"{program} " for program in OURS + OTHERS)):
                    yield from _with_nested(page, line, is_whole=True)
                else:  # what a program printed, or a drawing
                    yield from _nested(page, line)
    for line in (" ".join(code.split()) for code in INLINE.findall(BLOCK.sub("", text))):
        if line.startswith(tuple(f"{program} " for program in OURS)):
            yield from _with_nested(page, line, is_whole=False)


def _with_nested(page: str, line: str, *, is_whole: bool) -> Iterator[Command]:
    yield Command(page, NESTED.sub("nested", line), is_whole)
    yield from _nested(page, line)


def _nested(page: str, line: str) -> Iterator[Command]:
    yield from (Command(page, text, is_whole=True) for text in NESTED.findall(line))


FOUND = [command for page, text in TEXTS.items() for command in commands_of(page, text) if command.text]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """`--threads` goes to the environment while options are read."""
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))


# --- commands -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", FOUND, ids=str)
def test_a_command_is_one_that_the_program_takes(command):
    for words in command.words():
        check(words, is_whole=command.is_whole)


def check(words: list[str], *, is_whole: bool) -> None:
    """Fails where a program, a command, an option, a value or a file is not there."""
    program, *arguments = words
    if program == "bdense-weights":
        parse(commands, arguments, is_whole=is_whole)
    elif program in ("python", "python3"):
        check_python(arguments, is_whole=is_whole)
    elif program == "ray":
        from ray.scripts.scripts import cli

        parse(cli, arguments, is_whole=is_whole)
    elif program == "pip":
        check_pip(arguments)
    elif program == "pytest":
        check_pytest(arguments)
    else:
        assert program in OTHERS or program.endswith(("/pg_dump", "/pg_restore")), f"unknown program {program}"


def parse(group: click.Group, arguments: list[str], *, is_whole: bool) -> None:
    """What click says to a command of a group; in a sentence what it misses is not asked for."""
    if not arguments or arguments[0].startswith("-"):
        with pytest.raises(click.exceptions.Exit):  # --version and --help end at once
            group.make_context(None, list(arguments))
        return
    name, *rest = arguments
    assert name in group.commands, f"there is no command {name}"
    try:
        group.commands[name].make_context(name, rest)
    except click.exceptions.MissingParameter:
        assert not is_whole, f"{name} wants more"


def check_python(arguments: list[str], *, is_whole: bool) -> None:
    if arguments[0] == "search/launch_study.py":
        parse(commands, ["launch", *arguments[1:]], is_whole=is_whole)
        return
    name, rest = (arguments[1], arguments[2:]) if arguments[0] == "-m" else (arguments[0], arguments[1:])
    if arguments[0] == "-m" and not (ROOT / name.split(".")[0]).is_dir():
        assert find_spec(name), f"there is no module {name}"
        return
    file = ROOT / (name.replace(".", "/") + ".py" if arguments[0] == "-m" else name)
    assert file.is_file(), f"there is no {file}"
    for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
        assert f'"{option}"' in file.read_text(encoding="utf-8"), f"{name} has no {option}"


def check_pip(arguments: list[str]) -> None:
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(arguments)):
        assert extra in PROJECT["project"]["optional-dependencies"], f"there is no extra {extra}"


def check_pytest(arguments: list[str]) -> None:
    markers = [marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    for previous, word in zip(["", *arguments], arguments, strict=False):
        assert previous != "-m" or word in markers, f"there is no marker {word}"
        assert not word.startswith("tests/") or (ROOT / word).exists(), f"there is no {word}"


@pytest.mark.parametrize(
    "wrong",
    [
        "bdense-weights serve --study NAME",
        "bdense-weights confirm --study NAME --best 3",
        "bdense-weights confirm --study NAME --seeds many",
        "bdense-weights confirm --top 3",
        "bdense-weights server restart",
        "python search/launch_study.py --trails 3",
        "python tools/no_such_tool.py",
        "python -m benchmarks.decisions --study 500",
        "ray start --heads",
        "pip install -e '.[tests]'",
        "pytest -m goldens",
        "optuna studies",
    ],
)
def test_a_command_that_is_wrong_is_noticed(wrong):
    (command,) = commands_of("page.md", f"```bash\n{wrong}\n```\n")
    with pytest.raises((click.ClickException, AssertionError)):
        for words in command.words():
            check(words, is_whole=True)


PAGE = """Type `bdense-weights list`, not `list`; and `bdense-weights status
--study s`.

```
$ bdense-weights pause \\
    --study s
s: paused
```
```bash
"$(bdense-weights server bin)/pg_dump" x
```
"""


def test_commands_are_found_in_blocks_and_in_sentences():
    found = [" ".join(command.text.split()) for command in commands_of("page.md", PAGE)]
    assert found == [
        "bdense-weights pause --study s",
        '"nested/pg_dump" x',
        "bdense-weights server bin",
        "bdense-weights list",
        "bdense-weights status --study s",
    ]


@pytest.mark.parametrize("page", TEXTS)
def test_the_studies_that_a_page_names_are_there(page):
    for name in re.findall(r"studies/[\w*.-]+\.yaml", TEXTS[page]):
        assert list(ROOT.glob(name)), f"{page}: there is no {name}"


def test_every_command_is_told_of():
    told = " ".join(TEXTS.values())
    missing = [name for name in commands.commands if not re.search(rf"bdense-weights {name}\b", told)]
    assert missing == []


# --- links, keys, figures -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TEXTS)
def test_links_to_other_pages_hold(page):
    for target in LINK.findall(BLOCK.sub("", TEXTS[page])):
        if target.startswith(("https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links."""
    text = text.replace(study_reference.MARKER, study_reference.reference())
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in HEADING.findall(BLOCK.sub("", text)))
    return {re.sub(r"[\s]+", "-", heading.strip()) for heading in plain}


def test_the_reference_of_study_files_has_every_key():
    named = set(re.findall(r"^\| `(\w+)` \|", study_reference.reference(), flags=re.MULTILINE))
    # A comparison is written by the program, and the figures of `constraints` are explained in a sentence.
    keys = {key.rpartition(".")[2] for key in known_keys() if not key.startswith(("comparison.", "constraints."))}
    assert keys - named == {"evaluation", "family"}, "these are headings"
    assert named - keys == {"method", "space"}, "sections, whose keys have tables of their own"


def test_the_reference_gives_types_limits_and_defaults():
    keys = {
        key.name: key for key in study_reference.keys_of(study_reference.StudySpec.model_fields["seeds"].annotation)
    }
    repeats = keys["control_repeats"]
    assert (repeats.type, repeats.default) == ("whole number, at least 1 and at most 100", "`2`")
    assert repeats.meaning.startswith("Seeds that each control runs on")


def test_the_reference_needs_neither_torch_nor_ray():
    code = "import sys, tools.study_reference as r; r.reference(); print({'torch', 'ray'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True) == "set()\n"


def yaml_blocks() -> Iterator[tuple[str, dict]]:
    for page, text in TEXTS.items():
        for language, block in BLOCK.findall(text):
            if language == "yaml" and page != "docs/adding-a-method.md" and "name" in (study := yaml.safe_load(block)):
                yield page, study


@pytest.mark.parametrize("folder", sorted({name.partition("/")[0] for name in assets.names()}))
def test_the_card_of_a_shipped_folder_says_whose_data_it_is_and_what_it_is_for(folder):
    card = (Path(assets.__file__).parent / folder / "CARD.md").read_text(encoding="utf-8")
    for part in ("Intended use: ", "Licence: Apache-2.0", "CC BY 4.0", "10.24432/C50P49"):
        assert part in card
    assert f"(../bdense_core/assets/{folder}/CARD.md)" in TEXTS["docs/cards.md"]


@pytest.mark.parametrize(("page", "study"), list(yaml_blocks()))
def test_a_study_that_a_page_shows_is_accepted(page, study):
    base = study.pop("base", None)
    if base is not None:
        study = yaml.safe_load((ROOT / "studies" / base).read_text(encoding="utf-8")) | study
    assert validate(study, page).name == study["name"]


def test_python_that_a_page_shows_runs(capsys):
    (block,) = (block for language, block in BLOCK.findall(TEXTS["docs/python-api.md"]) if language == "python")
    exec(block, {})
    assert capsys.readouterr().out.startswith("(0.0117")


def test_the_papers_figures_stand_beside_ours_as_they_were_published():
    text = TEXTS["docs/science.md"]
    names = {paper.CIFAR10: "CIFAR-10", paper.IMAGENET64: "ImageNet-64"}
    for column in paper.SHEETS["sfd"].columns:
        assert f"| {names[column.dataset]} | {column.nfe} | {column.plain:.2f} | {column.dense:.2f} |" in text
    for column in paper.SHEETS["pd"].columns:
        assert f"| {column.nfe} | {column.plain:.2f} | {column.dense:.2f} |" in text
    for pair in paper.TABLE_4:
        line = f"| endpoint only | | 1.00 | {pair.imagenet64:.2f} | {pair.cifar10:.2f} |"
        if pair.a is not None:
            line = (
                f"| {pair.a:.3f} | {pair.b:.3f} | {pair.shares[-1]:.2f} | {pair.imagenet64:.2f} | {pair.cifar10:.2f} |"
            )
        assert line in text
    for model in paper.SHEETS["dash"].models:
        if model.name in ("teacher", "DASH", "composite", "conditional only", "scratch"):
            rho = f"{model.rho[paper.CIFAR10]:.2f} " if model.rho else ""
            assert f"| {model.fid[paper.CIFAR10]:.2f} | {model.fid[paper.CIFAR100]:.2f} | {rho}|" in text


def test_the_shares_in_the_concepts_are_those_of_their_slopes():
    rows = re.findall(r"^\| (-?[\d.]+)[^|]*\| ([\d. ]+) \|", TEXTS["docs/branch-weights.md"], flags=re.MULTILINE)
    assert len(rows) >= 5
    for slope, told in rows:
        assert told.strip() == " ".join(f"{share:.2f}" for share in shares(log_linear(float(slope), 0, 4)))


# --- which commands are really run ----------------------------------------------------------------------

RUN_ELSEWHERE = {"launch": "tests/e2e/conftest.py", "fetch-dataset": "tests/unit/test_datasets.py"}
"""Commands that a test runs by other words than `run("NAME", ...)`."""


@pytest.mark.parametrize("name", sorted(commands.commands))
def test_every_command_is_run_by_a_test(name):
    files = [*(ROOT / "tests" / "e2e").glob("*.py"), *(ROOT / "tests" / "integration").glob("*.py")]
    if name in RUN_ELSEWHERE:
        files, wanted = [ROOT / RUN_ELSEWHERE[name]], {"launch": "launch_study.py", "fetch-dataset": "fetch"}[name]
    else:
        wanted = f'"{name}"'
    assert any(wanted in file.read_text(encoding="utf-8") for file in files), f"no test runs {name}"
