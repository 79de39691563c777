"""The weights file "bdense-weights/1": sealed with its own hash, and read without trusting it. docs/weights-file.md."""

import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from bdense_core.errors import BDenseError
from bdense_core.files import canonical_json, sha256_of

SCHEMA = "bdense-weights/1"
MAX_BYTES = 16 * 2**20
"""A larger file is not read."""

MAX_INTEGER = 2**53
"""Larger integers do not survive in other languages, whose numbers are floats of 64 bits (RFC 8259, section 6)."""

_DEEPEST = 100
"""Levels of values within values."""
_SHOWN = 5
"""Complaints of the schema that are told: one mistake makes many."""
_LONGEST = 160
"""Characters of a complaint, which may quote the file."""


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content as plain JSON values, with the hash of all of it as `sha256`.

    Raises:
        ValueError: a number in it is not finite.
    """
    plain = json.loads(json.dumps(content, allow_nan=False))
    return {**plain, "sha256": seal_of(plain)}


def seal_of(content: dict[str, Any]) -> str:
    """What `sha256` must be: the hash of the canonical JSON (sorted keys, no spaces) of all other keys."""
    return sha256_of({key: value for key, value in content.items() if key != "sha256"})


def complaints(content: dict[str, Any]) -> list[str]:
    """What in the content is not as the format says, one line each; empty if all is.

    The JSON Schema's complaints, or, where it has none, those about what a schema cannot say.
    """
    found = sorted(_validator().iter_errors(content), key=lambda error: list(map(str, error.absolute_path)))
    lines = [_shortened(f"{error.json_path}: {error.message}") for error in found] or list(_misfits(content))
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return lines[:_SHOWN] + more


def read(path: Path) -> dict[str, Any]:
    """The content of a weights file that is as its schema says and as its export wrote it.

    Raises:
        BDenseError: it is not; one line says why.
    """
    content = load(path)
    if wrong := complaints(content):
        raise BDenseError(f"{path} is no weights file: {'; '.join(wrong)}; make one with: bdense-weights export")
    if content["sha256"] != seal_of(content):
        raise BDenseError(
            f"{path} was altered after its export: its sha256 is not that of its content; export it again "
            f"(bdense-weights verify {path} says what does not fit)"
        )
    return content


def load(path: Path) -> dict[str, Any]:
    """What a file from anywhere holds, JSON or (.yaml, .yml) YAML: bounded in size, plain values, nothing checked.

    Raises:
        BDenseError: it cannot be read, is too large, or holds no object of finite numbers, integers up to 2**53.
    """
    try:
        if path.exists() and not path.is_file():
            raise BDenseError(f"{path} is no file; name a weights file that bdense-weights export has written")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BDenseError(f"cannot read {path}: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise BDenseError(f"{path} is larger than {MAX_BYTES // 2**20} MB, which no weights file is; it was not read")
    kind = "YAML" if path.suffix.lower() in (".yaml", ".yml") else "JSON"
    try:
        text = raw.decode("utf-8")
        content = _plain_yaml(text) if kind == "YAML" else json.loads(text)
        content = json.loads(canonical_json(content), parse_int=_whole)  # no dates, no numbers that are not finite
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = _shortened(" ".join(str(error).split()))
        raise BDenseError(f"{path} is no weights file: no {kind} of finite numbers ({reason})") from error
    if not isinstance(content, dict):
        raise BDenseError(f"{path} is no weights file: it holds no object; name one that bdense-weights export wrote")
    return content


def _whole(digits: str) -> int:
    """An integer that every reader of JSON takes for the same.

    Raises:
        ValueError: it is beyond.
    """
    number = int(digits)
    if abs(number) > MAX_INTEGER:
        raise ValueError(f"an integer beyond 2**53: {digits[:20]}{'...' if len(digits) > 20 else ''}")
    return number


def _plain_yaml(text: str) -> Any:
    """YAML as plain data, without aliases, by which a few lines stand for any number of values.

    Raises:
        yaml.YAMLError: it is none, has aliases, or goes too deep.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the fast one, where PyYAML was built with it
    depth = 0
    for event in yaml.parse(text, loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST:
            raise yaml.YAMLError("it has aliases" if depth <= _DEEPEST else "it goes too deep")
    return yaml.load(text, loader)


def _misfits(content: dict[str, Any]) -> Iterator[str]:
    """What a JSON Schema cannot say of content that is as ours says: one number a trial, sizes that agree."""
    for trial, count in Counter(candidate["trial"] for candidate in content["candidates"]).items():
        if count > 1:
            yield f"$.candidates: trial {trial} stands there {count} times"
    for where, entry, num_intervals in _weightings(content):
        rows = [row for time in entry.get("schedule") or () for row in time]
        for row in (entry["weights"], *rows):
            if len(row) != content["num_branches"]:
                yield f"{where}: {len(row)} weights for {content['num_branches']} terms"
        for time in entry.get("schedule") or ():
            if len(time) not in (1, num_intervals):
                yield f"{where}: a schedule with weights for {len(time)} intervals, of which there are {num_intervals}"
    if len(terms := content.get("terms", ())) not in (0, content["num_branches"]):
        yield f"$.terms: {len(terms)} names for {content['num_branches']} terms"


def _weightings(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Whatever has weights and a schedule: where it stands, itself, and the trained intervals of its students."""
    yield "$", content, _num_intervals(content)
    for key in ("candidates", "controls"):
        for index, entry in enumerate(content[key]):
            yield f"$.{key}[{index}]", entry, _num_intervals(content)
    tables = {f"$.transfer[{index}]": table for index, table in enumerate(content["transfer"])}
    if content["confirmation"] is not None:
        tables["$.confirmation"] = content["confirmation"]
    for where, table in tables.items():
        for index, arm in enumerate(table["arms"]):
            yield f"{where}.arms[{index}]", arm, _num_intervals(table)


def _num_intervals(about: dict[str, Any]) -> int:
    """Files of before it stood in them are of a method that has as many as network calls."""
    return int(about.get("num_intervals", max(1, about["nfe"])))


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the format."""
    name = f"{SCHEMA.replace('/', '-')}.schema.json"
    content: dict[str, Any] = json.loads((resources.files("search") / "schemas" / name).read_text(encoding="utf-8"))
    return content


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(schema())


def _shortened(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
