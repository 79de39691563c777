"""The dashboard as people see it, in a real browser."""

import json
import re
import shutil
import subprocess
import tempfile
import urllib.request

import pytest

from search.study_file import studies_folder
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.e2e, pytest.mark.browser]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1400,2600",
)  # fmt: skip


def page(address: str) -> str:
    """The page's document once its scripts have run."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=60000", "--dump-dom", address],
            capture_output=True, text=True, timeout=PATIENCE_S, check=True,
        )  # fmt: skip
    return done.stdout


def get(address: str) -> dict[str, object]:
    with urllib.request.urlopen(address, timeout=PATIENCE_S) as answer:
        content: dict[str, object] = json.load(answer)
        return content


def test_the_dashboard_of_a_running_study_shows_its_metric_attributes_and_figures(user) -> None:
    run = user.start_launch(
        str(studies_folder() / "synthetic.yaml"), "--study", "watched", "--trials", "40", "--dashboard-port", "0",
        "--set", "method.seconds=2", "--set", "seeds.control_repeats=2",
    )  # fmt: skip
    run.wait_for(lambda lines: any(" COMPLETE " in line for line in lines))
    address = next(m[1] for line in run.lines if (m := re.match(r"dashboard: (\S+)", line)))
    assert address.startswith("http://127.0.0.1:")
    run.wait_for(lambda lines: sum(" search COMPLETE " in line for line in lines) >= 2)
    studies = get(address + "api/studies")["study_summaries"]
    assert isinstance(studies, list)
    identity = next(study["study_id"] for study in studies if study["study_name"] == "watched")

    def detail(_lines: list[str]) -> bool:
        return len(get(f"{address}api/studies/{identity}").get("plotly_graph_objects", [])) == 3  # type: ignore[arg-type]

    run.wait_for(detail)
    study = get(f"{address}api/studies/{identity}")
    assert study["objective_names"] == ["synthetic-score"]
    trials = study["trials"]
    assert isinstance(trials, list)
    attributes = {item["key"] for item in trials[0]["user_attrs"]}
    assert {"role", "seeds", "shares", "protocol"} <= attributes
    if CHROMIUM is None:
        pytest.skip("no Chromium here; the dashboard's data was checked, its page was not opened")
    document = page(f"{address}dashboard/studies/{identity}")
    assert "Weight curves" in document
    assert "Map of a and b" in document
    run.interrupt()
    assert run.wait() == 130
    with pytest.raises(OSError):
        get(address + "api/studies")
