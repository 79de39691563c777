"""The one door to standard error: lines for people, or JSON lines for programs, never a mix.

A record with an `event` is the service's own; everything else is some module's warning.
"""

import io
import logging
import socket
import sys
import threading
import traceback
from types import TracebackType

__all__ = ["FORMATS", "NODE", "SAID", "Printed", "as_json", "configure", "gather", "say"]

FORMATS = ("text", "json")
NODE = socket.gethostname()
"""The machine of this process."""
SAID = "said"
"""The event of a line that is only meant to be read: `say`."""

_QUIET = (logging.NullHandler, logging.FileHandler)
"""Handlers that keep off standard error."""

_log = logging.getLogger(__name__)


class _StandardError(logging.Handler):
    """Standard error as it is when a line comes: rich puts a proxy there while its display is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # noqa: BLE001 - as every handler of the standard library does
            self.handleError(record)


_HANDLER = _StandardError()


def configure(form: str = "text", *, study: str | None = None) -> None:
    """Write everything that is logged to standard error, as `text` or as `json`; again, and it is changed.

    Args:
        study: named in each JSON line, once it is known.
    """
    _HANDLER.setFormatter(_json(study) if form == "json" else _Text("%(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    if _HANDLER not in root.handlers:
        root.addHandler(_HANDLER)
    logging.getLogger("search").setLevel(logging.INFO)
    logging.captureWarnings(form == "json")
    if form == "json":
        sys.excepthook = _unexpected
        threading.excepthook = lambda args: _unexpected(
            args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback
        )


def as_json() -> bool:
    """Whether programs read what we say."""
    return _HANDLER.formatter is not None and not isinstance(_HANDLER.formatter, _Text)


def gather() -> None:
    """Take the handlers of other packages (Ray, Optuna) away, so that their records come through ours.

    Call it once these are imported: that is when they make their handlers.
    """
    for logger in logging.getLogger().manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and not all(isinstance(handler, _QUIET) for handler in logger.handlers):
            logger.handlers.clear()
            logger.propagate = True


def say(text: str, *, level: int = logging.INFO) -> None:
    """Say something to the person, as it stands; results alone go to standard output."""
    if text or not as_json():  # an empty line is there for people only
        _log.log(level, "%s", text, extra={"event": SAID})


class Printed(io.TextIOBase):
    """Stands in for standard output while libraries print to it: each line becomes a warning."""

    def write(self, text: str) -> int:
        from rich.text import Text

        for line in Text.from_ansi(text).plain.splitlines():
            if line.strip():
                _log.warning("%s", line.strip(), extra={"event": "printed"})
        return len(text)


class _Text(logging.Formatter):
    """What is said as it stands; events with time, study and node; others' warnings with level and module."""

    def format(self, record: logging.LogRecord) -> str:
        event = getattr(record, "event", None)
        if event is None:
            return super().format(record)
        if event == SAID:
            return record.getMessage()
        mark = "warning: " if record.levelno == logging.WARNING else ""
        fields = {"study": "", "node": None} | vars(record)
        node = f" [{fields['node']}]" if fields["node"] else ""
        return f"{self.formatTime(record, '%H:%M:%S')} {fields['study']} {mark}{record.getMessage()}{node}"


def _json(study: str | None) -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter(
        ("levelname", "name", "message"),
        rename_fields={"levelname": "level", "name": "logger"},
        # also the order of the keys
        defaults={
            "time": None,
            "level": None,
            "event": "log",
            "study": study,
            "trial": None,
            "role": None,
            "node": NODE,
        },
        timestamp="time",
    )


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception_only(kind, error)).strip()
    _log.critical("unexpected %s", text, exc_info=(kind, error, trace))
