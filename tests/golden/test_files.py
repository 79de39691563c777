"""That no file of the vectors is passed over by these tests."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.golden

SAY_NOTHING = (".md", ".txt")
"""Text for readers."""


def test_every_file_of_the_vectors_is_read_by_a_test(vectors_root):
    sources = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    marks = [mark for text in sources for mark in re.findall(r"^@pytest\.mark\.files\((.*)\)$", text, re.MULTILINE)]
    patterns = {pattern for mark in marks for pattern in re.findall(r'"([^"]+)"', mark)}
    read = {path for pattern in patterns for path in vectors_root.glob(pattern)}
    read |= {path.with_suffix(".meta.json") for path in read if path.suffix == ".safetensors"}
    names = {name for text in sources for name in re.findall(r'\bread\(\w+, "(\w+)"\)', text)}
    read |= {vectors_root / "dash" / f"{name}.safetensors" for name in names}
    read |= {path.parent / "index.json" for path in read}  # which holds the settings and tolerances of pd and dash
    found = {path for path in vectors_root.rglob("*") if path.is_file() and path.suffix not in SAY_NOTHING}
    assert found
    assert not sorted(str(path.relative_to(vectors_root)) for path in found - read)
