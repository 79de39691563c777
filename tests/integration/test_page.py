"""The report of real studies in a real PostgreSQL: what it says, what it refuses, and that it needs nothing else."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, mean

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from scipy import stats

from bdense_core.distill import distill
from bdense_core.methods.base import with_settings
from bdense_core.task import Score
from search import derived, figures, marks
from search.cli import commands
from search.comparison import compare
from search.database import Database
from search.records import Row
from search.storage import Studies, StudyStore
from tests.studies import opened, run_one, synthetic

FAST = ("method.seconds=0", "budget.trials=5", "pruner.kind=none")
EVIL = "<script>alert(1)</script> | *b* `x"


def play(store: StudyStore, samples: str | None = None) -> StudyStore:
    """Run whatever is due, as a launcher and its workers do, without Ray."""
    while (claim := store.trials.claim()) is not None:
        study = store.study
        task = study.task(claim.weights, claim.seeds[0], cache_root=Path("unused"), is_search=claim.is_search)
        method = with_settings(study.spec.method, claim.settings)
        scores = [event for event in distill(method, task, claim.seeds[1:]) if isinstance(event, Score)]
        for score in scores:
            store.trials.report(claim.number, score.value, score.kimg, may_prune=False)
        last = scores[-1]
        about = {"repeats": [list(repeat) for repeat in last.repeats], "metrics": last.metrics}
        about |= {"samples": samples} if samples else {}
        store.trials.complete(claim.number, last.value, **about)
    return store


def searched(url: str, *overrides: str, name: str = "t", samples: str | None = None) -> StudyStore:
    return play(opened(url, synthetic("seeds.control_repeats=3", *FAST, *overrides, name=name)), samples)


def confirmed(url: str, *overrides: str) -> tuple[StudyStore, StudyStore]:
    """A search and its confirmation: two candidates and two controls on three seeds."""
    store, studies = searched(url, *overrides), Studies(Database(url))
    return store, play(studies.create_or_resume(derived.confirmation(studies, store.name, top=2, seeds=3)))


def transferred(url: str, confirmation: StudyStore, *, target: str, curvature: float) -> StudyStore:
    section = confirmation.study.spec.comparison
    assert section is not None
    name = f"{target}.{curvature}"
    study = synthetic(*FAST[:1], "budget.trials=0", f"method.curvature={curvature}", name=name)
    moved = section.model_copy(update={"kind": "transfer", "target": target}).model_dump(mode="json")
    return play(opened(url, study.edited({"comparison": moved})))


def report(url: str, output: Path, *, name: str = "t") -> Result:
    return CliRunner().invoke(commands, ["report", "--study", name, "--output", str(output), "--storage", url])


class Page(HTMLParser):
    """Every tag with its attributes, and the text of each section."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._section = ""
        self.feed((folder / "index.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "section":
            self._section = dict(attributes)["id"] or ""

    def handle_data(self, data: str) -> None:
        self.text[self._section] = self.text.get(self._section, "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def final(rows: list[Row], arm: str) -> dict[int, float]:
    return {row.seeds[0]: row.value for row in rows if row.arm == arm and row.value is not None}


@pytest.mark.parametrize(("noise", "is_confirmed"), [(0.0001, True), (1.0, False)])
def test_a_report_says_what_the_confirmation_found_with_its_numbers(
    database_url: str, tmp_path: Path, noise: float, is_confirmed: bool
) -> None:
    _, confirmation = confirmed(database_url, f"method.noise={noise}", "method.best_share=0.9")
    assert report(database_url, tmp_path / "r").exit_code == 0
    page, rows = Page(tmp_path / "r"), confirmation.rows()
    section = confirmation.study.spec.comparison
    assert section is not None
    for arm in (arm for arm in section.arms if not arm.is_control):
        mine, theirs = final(rows, arm.name), final(rows, "uniform")
        assert len(mine) == 3
        assert f"{mean(theirs[seed] - mine[seed] for seed in mine):+.2g} (" in page.text["confirmation"]
        assert f"trial {arm.trial}" in page.text["confirmation"]
    winner = compare(confirmation.study, rows).winner
    assert (winner is not None) == is_confirmed
    headline = "Not confirmed: no candidate is shown to be better than every control."
    if winner is not None:
        headline = f"Confirmed: {winner.replace('-', ' ')} is better than every control."
    assert headline in page.text["verdict"]


def test_a_report_shows_searched_settings_further_figures_and_what_violates_a_constraint(
    database_url: str, tmp_path: Path
) -> None:
    store, confirmation = confirmed(
        database_url, "tune={shift: [0, 1], flavour: [plain, bitter]}", "constraints={balance: {max: 0.2}}",
        "budget.trials=8", "space={family: slope, a: [0.5, 3.5]}", "sampler.kind=random",
    )  # fmt: skip
    rows = store.rows()
    refused = [row for row in rows if row.is_search and row.violated]
    kept = [row for row in rows if row.is_search and not row.violated]
    assert refused and kept, "the search has both"
    report(database_url, tmp_path / "r")
    page = Page(tmp_path / "r")
    assert "shift in [0, 1]" in page.text["settings"] and "flavour in {plain, bitter}" in page.text["settings"]
    assert "balance ≤ 0.2" in page.text["settings"]
    assert "a parabola's argument" in page.text["tuned"]
    assert {path.name for path in (tmp_path / "r" / "figures").glob("tuned*")} == {
        "tuned-shift.png",
        "tuned-flavour.png",
    }
    best = min(kept, key=lambda row: row.value)
    assert f"{best.metrics['balance']:.4g}" in page.text["metrics"]
    assert "uniform0.75balance" in page.text["metrics"].replace("\n", ""), "a control tells what it violates, too"
    assert f"flavour={best.settings['flavour']}" in page.text["weights"]
    for row in refused:
        assert f"trial {row.number}" in page.text["weights"]
    section = confirmation.study.spec.comparison
    assert section is not None
    candidate = next(arm for arm in section.arms if not arm.is_control)
    assert candidate.trial in {row.number for row in kept}
    figures_of = {
        name: {row.seeds[0]: row.metrics["balance"] for row in confirmation.rows() if row.arm == name}
        for name in (candidate.name, "endpoint_only")
    }
    less = mean(figures_of[candidate.name][seed] - figures_of["endpoint_only"][seed] for seed in section.seeds)
    assert f"{less:+.2g} (" in page.text["confirmation"]
    assert "less that of endpoint only" in page.text["confirmation"]


def test_a_study_that_searches_choices_alone_has_a_report_and_figures_for_the_dashboard(
    database_url: str, tmp_path: Path
) -> None:
    store = searched(
        database_url, "space={family: free}", "method.num_branches=1", "tune={flavour: [plain, bitter]}",
        "sampler.kind=random", "budget.trials=4",
    )  # fmt: skip
    assert report(database_url, tmp_path / "r").exit_code == 0
    assert "over flavour" in Page(tmp_path / "r").text["map"]
    figures.save_to_dashboard(store)
    figures.save_png(store, tmp_path / "t.png")
    axis = stored_figures(store)["bdense-map"]["layout"]["xaxis"]
    assert axis["ticktext"] == ["plain", "bitter"]


def test_the_page_loads_and_runs_nothing(database_url: str, tmp_path: Path) -> None:
    confirmed(database_url)
    report(database_url, tmp_path / "r")
    page = Page(tmp_path / "r")
    loading = [value for _, found in page.tags for key, value in found.items() if key in ("src", "href", "xlink:href")]
    assert loading and all(str(value).startswith(("#", "data:image/png;base64,")) for value in loading)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert any("default-src 'none'" in str(found.get("content")) for found in page.all("meta"))
    inside = {found["id"] for found in page.all("section")}
    assert {f"#{identity}" for identity in inside} == {found["href"] for found in page.all("a")}
    assert len(page.all("svg")) >= 5
    assert all(found["aria-label"] for found in page.all("svg"))


def test_text_of_the_study_is_text_and_no_markup(database_url: str, tmp_path: Path) -> None:
    store = opened(database_url, synthetic(*FAST, f"description={json.dumps(EVIL)}"))
    claim = store.trials.claim()
    assert claim is not None
    store.trials.fail(claim.number, EVIL, retry=False)
    play(store)
    assert report(database_url, tmp_path / "r").exit_code == 0
    page = Page(tmp_path / "r")
    assert not page.all("script")
    assert EVIL in page.text[""], "the description"
    assert EVIL in page.text["warnings"], "the reason"
    text = (tmp_path / "r" / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in text.replace("    description: " + EVIL, "")
    assert r"&lt;script\>alert(1)&lt;/script\> \| \*b\* \`x" in text


def test_the_markdown_has_whole_tables_and_its_figures_beside_it(database_url: str, tmp_path: Path) -> None:
    confirmed(database_url)
    report(database_url, tmp_path / "r")
    text = (tmp_path / "r" / "report.md").read_text(encoding="utf-8")
    named = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert {"figures/weights.png", "figures/map.png", "figures/confirmation.png"} <= set(named)
    assert {path.name for path in (tmp_path / "r" / "figures").iterdir()} == {name.split("/")[1] for name in named}
    tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 6
    for table in tables:
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
        assert re.fullmatch(r"\|( ---:? \|)+", table.splitlines()[1])


def test_what_is_missing_is_said_with_the_command_that_fills_it(database_url: str, tmp_path: Path) -> None:
    searched(database_url)
    report(database_url, tmp_path / "r")
    page = Page(tmp_path / "r")
    assert "Not confirmed yet." in page.text["verdict"]
    assert "bdense-weights confirm --study t" in page.text["verdict"]
    assert "bdense-weights transfer" in page.text["transfer"]
    assert "experimental: [gate, meta]" in page.text["learned"]


def test_a_study_in_which_nothing_has_run_has_a_report_too(database_url: str, tmp_path: Path) -> None:
    opened(database_url, synthetic(*FAST))
    assert report(database_url, tmp_path / "r").exit_code == 0
    page = Page(tmp_path / "r")
    assert not page.all("svg")
    assert "bdense-weights launch --study t" in page.text["weights"]


def test_a_transfer_has_gains_over_endpoint_only_and_each_target_a_figure(database_url: str, tmp_path: Path) -> None:
    _, confirmation = confirmed(database_url)
    store = transferred(database_url, confirmation, target="target", curvature=2.0)
    transferred(database_url, confirmation, target="target", curvature=3.0)
    transferred(database_url, confirmation, target="another", curvature=2.0)
    report(database_url, tmp_path / "r")
    text, rows = Page(tmp_path / "r").text["transfer"], store.rows()
    mine, theirs = final(rows, "uniform"), final(rows, "endpoint_only")
    assert f"{mean(theirs[seed] - mine[seed] for seed in mine):+.2g} (" in text, "controls are compared too"
    assert "(target.2.0)" in text
    assert {path.name for path in (tmp_path / "r" / "figures").glob("transfer*")} == {
        "transfer-1.png", "transfer-2.png",
    }  # fmt: skip
    assert re.search(r"rank correlation -?[01]\.\d\d \(95 % interval", text), "four weightings have a value in both"


def test_images_are_shown_as_they_are_kept_and_what_is_no_image_is_left_out(database_url: str, tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("L", (64, 8), 77).save(content, format="PNG")
    kept = base64.b64encode(content.getvalue()).decode()
    searched(database_url, samples=kept)
    searched(database_url, name="broken", samples=base64.b64encode(b"GIF89a").decode())
    report(database_url, tmp_path / "r")
    report(database_url, tmp_path / "b", name="broken")
    assert {found["src"] for found in Page(tmp_path / "r").all("img")} == {f"data:image/png;base64,{kept}"}
    assert Page(tmp_path / "b").all("img") == []
    written = [path for path in (tmp_path / "r" / "figures").iterdir() if path.name.startswith("t-")]
    assert written and all(path.read_bytes() == content.getvalue() for path in written)


def test_an_earlier_report_is_replaced_and_anything_else_is_left_alone(database_url: str, tmp_path: Path) -> None:
    searched(database_url)
    output = tmp_path / "r"
    assert report(database_url, output).exit_code == 0
    (output / "figures" / "old.png").touch()
    assert report(database_url, output).exit_code == 0
    assert not (output / "figures" / "old.png").exists()
    (output / "mine.txt").write_text("mine")
    refused = report(database_url, output)
    assert "holds other things, such as mine.txt" in str(refused.exception)
    assert (output / "mine.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["r"], "nothing is left beside it"


def test_a_file_or_a_folder_in_no_folder_is_refused_before_the_database_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, words in ((tmp_path / "file", "is a file"), (tmp_path / "no" / "r", "there is no folder")):
        assert words in str(report("postgresql://nobody@127.0.0.1:1/none", output).exception)


def test_a_comparison_has_its_place_in_the_report_of_its_study(database_url: str, tmp_path: Path) -> None:
    confirmed(database_url)
    refused = report(database_url, tmp_path / "r", name="t.confirm")
    assert "its results stand in the report of --study t" in str(refused.exception)


def test_the_dashboard_gets_the_figures_of_a_search_and_of_its_confirmation(database_url: str) -> None:
    store, confirmation = confirmed(database_url)
    for each in (store, confirmation):
        figures.save_to_dashboard(each)
    shown = {each.name: stored_figures(each) for each in (store, confirmation)}
    own = {"bdense-weight-curves", "bdense-map", "bdense-training", "bdense-noise", "bdense-early-scores"}
    assert set(shown["t"]) == own | {"bdense-confirmation"}
    assert set(shown["t.confirm"]) == {"bdense-confirmation"}
    spread = {
        trace["name"]: {(name, round(x, 9)) for name, x in zip(trace["y"], trace["x"], strict=True)}
        for trace in shown["t"]["bdense-noise"]["data"]
    }
    by_seed = {marks.name_of(row): list(row.by_seed.values()) for row in store.rows() if row.is_control}
    assert spread["training seeds"] == {
        (name, round(value - fmean(values), 9)) for name, values in by_seed.items() for value in values
    }
    early = {trace["name"]: trace for trace in shown["t"]["bdense-early-scores"]["data"]}
    ended = [row for row in store.rows() if row.state == "COMPLETE"]
    for step, rho in zip(*(early[store.study.metric][axis] for axis in "xy"), strict=True):
        pairs = np.array([(row.intermediate[step], row.value) for row in ended])
        assert rho == pytest.approx(stats.spearmanr(pairs).statistic)
    traces = {trace["name"]: trace for trace in shown["t"]["bdense-training"]["data"]}
    uniform = next(row for row in store.rows() if row.role == "control:uniform")
    assert dict(zip(traces["uniform"]["x"], traces["uniform"]["y"], strict=True)) == uniform.intermediate


def test_a_study_made_anew_has_no_part_in_what_was_compared_before(database_url: str, tmp_path: Path) -> None:
    _, confirmation = confirmed(database_url)
    Studies(Database(database_url)).delete("t")
    store = searched(database_url)
    report(database_url, tmp_path / "r")
    assert "Not confirmed yet." in Page(tmp_path / "r").text["verdict"]
    figures.save_to_dashboard(confirmation)
    assert set(stored_figures(confirmation)) == {"bdense-confirmation"}
    assert stored_figures(store) == {}


def test_the_dashboard_gets_figures_when_nothing_but_the_first_control_has_ended(database_url: str) -> None:
    store = opened(database_url, synthetic(*FAST))
    assert run_one(store) == 0
    figures.save_to_dashboard(store)
    (drawn,) = stored_figures(store)["bdense-weight-curves"]["data"]
    assert drawn["name"].startswith("endpoint only")


def stored_figures(store: StudyStore) -> dict[str, dict]:
    """As the dashboard reads them: in pieces, in the study's attributes."""
    from optuna_dashboard._custom_plot_data import get_plotly_graph_objects

    attributes = store.database.storage.get_study_system_attrs(store.optuna_study._study_id)
    return {identity: json.loads(content) for identity, content in get_plotly_graph_objects(attributes).items()}


@pytest.mark.parametrize("family", ["log_linear", "slope"])
def test_show_still_draws_one_png(database_url: str, tmp_path: Path, family: str) -> None:
    store = searched(database_url, f"space={{family: {family}}}")
    figures.save_png(store, tmp_path / "t.png")
    with Image.open(tmp_path / "t.png") as picture:
        assert picture.format == "PNG"
