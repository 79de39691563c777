"""docker/compose.yaml as compose reads it, for tests without compose."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
TEXT = (DOCKER / "compose.yaml").read_text()
VARIABLE = re.compile(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}")


def example() -> dict[str, str]:
    """What .env.example sets."""
    lines = (DOCKER / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def load(**values: str) -> dict[str, Any]:
    """The file with the example's values, and these instead; only the two forms of variables that it uses."""
    environment = example() | values

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        assert kind, f"${{{name}}} has neither a default nor a message"
        return environment.get(name) or (rest if kind == ":-" else "")

    content: dict[str, Any] = yaml.safe_load(VARIABLE.sub(value, TEXT))
    return content
