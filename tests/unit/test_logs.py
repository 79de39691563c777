"""What goes to standard error: lines for people, or JSON for programs, never a mix."""

import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime

import pytest

from search import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("search")
    before = (list(root.handlers), ours.level, sys.excepthook)
    yield
    root.handlers[:], level, sys.excepthook = before
    ours.setLevel(level)
    logs.configure()
    root.handlers[:] = before[0]


def json_lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_what_is_said_stands_as_it_is_and_a_warning_names_its_module(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    logs.say("dashboard: http://127.0.0.1:8080/")
    logging.getLogger("bdense_core.cache").warning("shard %d is damaged", 3)
    logging.getLogger("urllib3").info("nobody wants to know")
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "dashboard: http://127.0.0.1:8080/",
        "WARNING bdense_core.cache: shard 3 is damaged",
    ]
    assert shown.out == ""


def test_every_json_line_has_the_same_fields_whoever_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", study="digits")
    logs.say("")
    logs.say("stopping:\nrunning trials go back")
    logging.getLogger("bdense_core.cache").warning("shard %d is damaged", 3)
    said, warned = json_lines(capsys.readouterr().err)
    shared = {"study": "digits", "trial": None, "role": None, "node": logs.NODE}
    assert said.items() >= (shared | {"level": "INFO", "event": "said"}).items()
    assert said["message"] == "stopping:\nrunning trials go back"
    assert warned.items() >= (shared | {"level": "WARNING", "event": "log", "logger": "bdense_core.cache"}).items()
    assert datetime.fromisoformat(str(said["time"])).utcoffset() is not None
    assert list(said)[:2] == ["time", "level"]


def test_configuring_again_changes_the_form_and_doubles_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    logs.configure("json")
    logs.configure("json", study="digits")
    logs.say("once")
    assert [line["study"] for line in json_lines(capsys.readouterr().err)] == ["digits"]


def test_handlers_of_other_packages_give_way_to_ours(capsys: pytest.CaptureFixture[str]) -> None:
    other = logging.getLogger("a_package_with_a_handler")
    other.addHandler(logging.StreamHandler())
    other.propagate = False
    logs.configure("json")
    logs.gather()
    other.warning("mine")
    assert [line["message"] for line in json_lines(capsys.readouterr().err)] == ["mine"]


@pytest.mark.parametrize(
    "raise_it", ["1 / 0", "import threading; t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()"]
)
def test_python_warnings_and_unexpected_errors_are_json_lines_too(raise_it: str) -> None:
    program = f"import warnings; from search import logs; logs.configure('json'); warnings.warn('old'); {raise_it}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    warned, crashed = json_lines(done.stderr)
    assert "old" in str(warned["message"]) and warned["level"] == "WARNING"
    assert crashed["level"] == "CRITICAL" and crashed["message"] == "unexpected ZeroDivisionError: division by zero"
    assert "Traceback" in str(crashed["exc_info"])


def test_what_ray_prints_of_a_dead_node_is_a_warning_and_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    from ray._private.worker import print_to_stdstream

    logs.configure("json")
    with contextlib.redirect_stdout(logs.Printed()):
        print_to_stdstream({"lines": ["Raylet is terminated."], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    shown = capsys.readouterr()
    (line,) = json_lines(shown.err)
    assert (line["level"], line["event"], line["message"]) == ("WARNING", "printed", "(raylet) Raylet is terminated.")
    assert shown.out == ""
