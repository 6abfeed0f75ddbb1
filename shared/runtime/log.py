"""Structured logs: readable lines on the terminal, JSON lines in var/logs. Set up once in each
process; knows no event.

structlog is imported with the first event, because it brings asyncio and rich, and most commands
log nothing. Events are named `noun.verb_past` and have fields. A fact that users need is also in
`specl-ctl status`, never in a log alone.
"""

import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    import structlog

LOG_BYTES = 10 * 1024 * 1024
LOG_FILES = 5


class _QuietStream(logging.StreamHandler[TextIO]):
    """Writes to a terminal and ignores one that is gone: when honcho dies its pipe breaks, and the
    daemon must go on.
    """

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _QuietFile(RotatingFileHandler):
    """Writes to a rotated file and ignores a full disk: it costs log lines, nothing else."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Logger:
    """A logger that imports structlog when something is logged."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._inner: Any = None

    def __getattr__(self, name: str) -> Any:
        import structlog

        if self._inner is None:
            self._inner = structlog.get_logger(self._name)
        return getattr(self._inner, name)


def _formatter(renderer: Any) -> "structlog.stdlib.ProcessorFormatter":
    import structlog

    return structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True)],
    )


def set_up(role: str, folder: Path | None, level: str = "info") -> None:
    """Send every event of this process to stderr, and to `folder/role.log` as JSON lines (0600,
    rotated).
    """
    import structlog

    terminal = _QuietStream(sys.stderr)
    renderer = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(),
        pad_event_to=24,
        # the default formatter shows local variables, and those hold what users wrote
        exception_formatter=structlog.dev.plain_traceback,
    )
    terminal.setFormatter(_formatter(renderer))
    handlers: list[logging.Handler] = [terminal]
    if folder is not None:
        # opened with the first event, so that a daemon starts on a full disk; 0600 by its umask
        file = _QuietFile(folder / f"{role}.log", maxBytes=LOG_BYTES, backupCount=LOG_FILES, delay=True)
        file.setFormatter(_formatter(structlog.processors.JSONRenderer()))
        handlers.append(file)
    root = logging.getLogger()
    root.handlers[:] = handlers
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "huggingface_hub", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(role=role, pid=os.getpid())


def get(name: str) -> "structlog.stdlib.BoundLogger":
    """The logger of this name."""
    return cast("structlog.stdlib.BoundLogger", _Logger(name))
