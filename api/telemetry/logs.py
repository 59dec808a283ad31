"""Logging in the format of TGI's router: JSON with `--json-output`, else text.

All loggers of the process are configured here, also those of libraries. Contents of requests
(prompt, stop sequences, headers, query string) are never passed to a logger, so they cannot be
logged.

A record may have a `span`, the fields of the request it belongs to, `name` last:
`logger.info("Success", extra={"span": {"total_time": "1.2s", "name": "generate"}})`.
"""

import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import orjson

SERVER = "text_generation_router.server"
"""Logger of the lines from TGI's server module. Other tools wait for some of these lines."""
INFER = "text_generation_router.infer"
"""Logger of failed requests, named after TGI's infer module."""

SpanFields = Mapping[str, str | int]

_ROOT = Path(__file__).parents[2]
_OURS = ("api", "engine", "kernels")
_LIBRARIES_WITH_HANDLERS = ("transformers", "huggingface_hub")
_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}
_LEVEL_NAMES = {"WARNING": "WARN", "CRITICAL": "ERROR"}
_COLOURS = {"DEBUG": 34, "INFO": 32, "WARN": 33, "ERROR": 31}
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(9), *range(10, 32), 127)} | {10: "\\n"}


def configure_logging(
    json_output: bool, level: str, colorize: bool, log_file: Path | None = None
) -> None:
    """Send log lines to standard output and, as JSON, to the end of `log_file`. `level` is the
    value of LOG_LEVEL: warn, info, debug or a filter of Rust's tracing crate. May be called again,
    which replaces the earlier configuration.
    """
    handlers = [_Handler(sys.stdout)]
    handlers[0].setFormatter(_JsonFormatter() if json_output else _TextFormatter(colorize))
    if log_file is not None:
        # Append, because the reader of the file may truncate it at any time.
        handlers.append(_Handler(log_file.open("a", buffering=1)))
        handlers[1].setFormatter(_JsonFormatter())
    root, own_level = logging.getLogger(), plain_level(level)
    for earlier in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(earlier)
    for handler in handlers:
        root.addHandler(handler)
    # Below this level libraries log URLs and headers.
    root.setLevel(max(own_level, logging.WARNING))
    for name in (*_OURS, "text_generation_router"):
        logging.getLogger(name).setLevel(own_level)
    for name in _LIBRARIES_WITH_HANDLERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.__class__ = _PropagatingLogger
    logging.captureWarnings(True)


def connected() -> None:
    """Log the line from which Vast's stock worker learns that the server is ready."""
    logging.getLogger(SERVER).info("Connected")


def stopping() -> None:
    """Log that the server is shutting down and waits for running requests."""
    logging.getLogger(SERVER).info("signal received, starting graceful shutdown")


def plain_level(filter_text: str) -> int:
    """Return the level that a tracing filter sets for all targets, or info: `hyper=off,debug` is
    debug.
    """
    for directive in filter_text.lower().split(","):
        level = _LEVELS.get(directive.strip())
        if level is not None:
            return level
    return logging.INFO


def duration(seconds: float) -> str:
    """Format like Rust's Duration: `1.23456s`, `12.3ms`, `409.834µs`, `53ns`."""
    nanoseconds = max(0, round(seconds * 1e9))
    for unit, digits in (("s", 9), ("ms", 6), ("µs", 3)):
        whole, part = divmod(nanoseconds, 10**digits)
        if whole:
            return f"{whole}.{part:0{digits}d}".rstrip("0").rstrip(".") + unit
    return f"{nanoseconds}ns"


class _Handler(logging.StreamHandler):
    """A handler made by `configure_logging`, which replaces it when called again."""


class _PropagatingLogger(logging.Logger):
    """A logger without handlers of its own, which passes every record to the root logger. It is
    the logger of libraries that add a handler when they are imported.
    """

    def addHandler(self, hdlr: logging.Handler) -> None:  # noqa: ARG002, N802
        return

    @property
    def propagate(self) -> bool:
        return True

    @propagate.setter
    def propagate(self, _value: bool) -> None:
        return


class _JsonFormatter(logging.Formatter):
    """One JSON object per line. `target` follows `message` directly and without a space, because
    Vast's stock worker searches for exactly these bytes.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "timestamp": _timestamp(record),
            "level": _level(record),
            "message": _encodable(record.getMessage()),
        }
        if record.exc_info:
            line["exception"] = _encodable(self.formatException(record.exc_info))
        line |= {
            "target": _target(record),
            "filename": _filename(record),
            "line_number": record.lineno,
        }
        if span := _span(record):
            line |= {"span": span, "spans": [span]}
        return orjson.dumps(line).decode()


class _TextFormatter(logging.Formatter):
    """Lines like those of Rust's tracing crate, with control characters escaped."""

    def __init__(self, colorize: bool) -> None:
        super().__init__()
        self._colorize = colorize

    def format(self, record: logging.LogRecord) -> str:
        level = _level(record)
        stamp = self._paint(_timestamp(record), 2)
        shown_level = self._paint(f"{level:>5}", _COLOURS.get(level, 0))
        target = self._paint(f"{_target(record)}: {_filename(record)}:{record.lineno}:", 2)
        message = record.getMessage().translate(_CONTROL)
        line = f"{stamp} {shown_level} {_span_text(_span(record))}{target} {message}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line

    def _paint(self, text: str, code: int) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colorize else text


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _level(record: logging.LogRecord) -> str:
    return _LEVEL_NAMES.get(record.levelname, record.levelname)


def _target(record: logging.LogRecord) -> str:
    target = record.name.replace(".", "::")
    return f"skiff::{target}" if record.name.partition(".")[0] in _OURS else target


def _filename(record: logging.LogRecord) -> str:
    path = Path(record.pathname)
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else record.filename


def _span(record: logging.LogRecord) -> SpanFields | None:
    return record.__dict__.get("span")


def _span_text(span: SpanFields | None) -> str:
    if span is None:
        return ""
    fields = " ".join(f"{key}={_shown(key, span[key])}" for key in span if key != "name")
    return f"{span['name']}{{{fields}}}: "


def _shown(key: str, value: str | int) -> str:
    quoted = isinstance(value, str) and key != "parameters"
    return f'"{value}"' if quoted else str(value)


def _encodable(text: str) -> str:
    """Escape lone surrogates, which orjson rejects. File names that are not UTF-8 contain them."""
    return text.encode("utf-8", "backslashreplace").decode()
