"""What a command says when something is wrong."""

import subprocess


def complains(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One error line with these words, and no traceback."""
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.lower().startswith("error:")]
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word in errors[0]
    assert "Traceback" not in done.stderr + done.stdout
