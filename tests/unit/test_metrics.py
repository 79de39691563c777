"""What Prometheus reads, over a real connection."""

import math
import re
import socket
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from bdense_core.errors import BadValue
from search.metrics import Metrics
from tests.patience import PATIENCE_S
from tests.rows import claim, row

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


def scraped(metrics: Metrics) -> dict[str, float]:
    """By name, and by `STATE ROLE` for trials."""
    with metrics.served(0) as address:
        text = requests.get(address, timeout=PATIENCE_S).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert {sample.labels["study"] for sample in samples} == {"digits"}
    return {
        " ".join(value for label, value in sample.labels.items() if label != "study") or sample.name: sample.value
        for sample in samples
        if sample.name.startswith("bdense_") and (sample.name != "bdense_trials" or len(sample.labels) == 3)
    }


def event(kind: str, kimg: float, **more: object) -> dict[str, object]:
    return {"event": kind, "kimg": kimg, "fraction": kimg / 4, **more}


def test_trials_are_counted_by_role_and_state_and_what_is_gone_is_shown_as_zero() -> None:
    metrics = Metrics("digits")
    metrics.refresh(
        [row(0, "RUNNING"), row(1, value=3.0), row(2, role="control:paper", value=2.5), row(3, "PRUNED", value=1)]
    )
    first = scraped(metrics)
    assert (first["search RUNNING"], first["search COMPLETE"], first["control:paper COMPLETE"]) == (1, 1, 1)
    assert first["bdense_best_value"] == 2.5, "a pruned trial's value is of a shorter run"
    metrics.refresh([row(0, value=2.0), row(1, value=3.0)])
    later = scraped(metrics)
    assert (later["search RUNNING"], later["search COMPLETE"], later["control:paper COMPLETE"]) == (0, 2, 0)
    assert later["bdense_best_value"] == 2.0


def test_kimg_count_what_was_trained_here_not_what_a_resumed_trial_brings_along() -> None:
    metrics = Metrics("digits")
    fresh, resumed = claim(0, "control:paper", seeds=(0, 1)), claim(1)
    for number in (fresh, resumed):
        metrics.started(number)
    metrics.progressed(fresh, event("progress", 1.5))
    metrics.progressed(fresh, event("score", 4, value=2.0))
    metrics.progressed(fresh, event("progress", 0.5, phase="seed 1"))
    metrics.progressed(resumed, event("progress", 2.0, resumed=2.0))
    metrics.progressed(resumed, event("progress", 2.25))
    seen = scraped(metrics)
    assert seen["bdense_kimg_total"] == 4 + 0.5 + 0.25
    assert seen["bdense_reports_total"] == 1
    assert seen["bdense_running_trials"] == 2


def test_each_way_a_trial_leaves_is_counted_once() -> None:
    metrics = Metrics("digits")
    for number in range(5):
        metrics.started(claim(number))
    metrics.ended(claim(0), "COMPLETE", 1.0)
    metrics.failed(claim(1), "its worker was lost", retry=True)
    metrics.failed(claim(2), "the metric is nan", retry=False)
    metrics.lost(claim(3), "its lease expired")
    seen = scraped(metrics)
    names = ("running_trials", "failures_total", "retries_total", "lost_leases_total")
    assert [seen[f"bdense_{name}"] for name in names] == [1, 2, 1, 1]


def test_an_outage_is_shown_while_it_lasts_and_its_length_afterwards() -> None:
    metrics = Metrics("digits")
    metrics.outage(None)
    during = scraped(metrics)
    metrics.outage(12.5)
    after = scraped(metrics)
    names = ("bdense_database_away", "bdense_database_outages_total", "bdense_database_outage_seconds_total")
    assert [during[name] for name in names] == [1, 1, 0]
    assert [after[name] for name in names] == [0, 1, 12.5]


def test_before_the_first_result_there_is_no_best_value_and_time_since_progress_runs() -> None:
    seen = scraped(Metrics("digits"))
    assert "bdense_best_value" not in seen
    assert seen["bdense_seconds_since_progress"] > 0 and math.isfinite(seen["bdense_seconds_since_progress"])


def test_a_port_in_use_is_one_line_that_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = re.escape(f"--metrics-port {port}: cannot listen on 127.0.0.1:{port} (Address already in use); choose")
        with pytest.raises(BadValue, match=line), Metrics("digits").served(port):
            pass


def test_the_port_is_free_again_afterwards_and_only_loopback_was_served() -> None:
    metrics = Metrics("digits")
    with metrics.served(0) as address:
        assert address.startswith("http://127.0.0.1:")
    port = int(address.split(":")[2].split("/")[0])
    with metrics.served(port) as again:
        assert again == address


def test_the_documented_metrics_are_those_that_are_served() -> None:
    metrics = Metrics("digits")
    metrics.refresh([row(0, value=1.0)])
    with metrics.served(0) as address:
        served = re.findall(r"^(bdense_\w+)\{", requests.get(address, timeout=PATIENCE_S).text, re.MULTILINE)
    documented = re.findall(r"^\| `(bdense_\w+)` \|", OPERATIONS.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(documented) == sorted(set(served)) != []
