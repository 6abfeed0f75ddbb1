"""Structured logs, set up once a process: readable on a terminal, JSON lines in var/logs. Knows no event.

structlog is loaded with the first event: a command that logs nothing should not wait for it (it brings asyncio and rich).
A log line is never the only record of a fact that users need: `specl-ctl status` has those.
"""

import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import structlog

LOG_BYTES = 10 * 1024 * 1024
LOG_FILES = 5


class _QuietStream(logging.StreamHandler):
    """A terminal that is gone must not take the daemon with it: honcho's death breaks the pipe."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _QuietFile(RotatingFileHandler):
    """A disk that is full costs log lines, nothing else."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Logger:
    """A logger that loads structlog when something is logged."""

    def __init__(self, name: str) -> None:
        self._name, self._inner = name, None

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
    """Send every event of this process to stderr, and to `folder/role.log` as JSON lines (0600, rotated)."""
    import structlog

    terminal = _QuietStream(sys.stderr)
    renderer = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(),
        pad_event_to=24,
        # the default one shows the locals of every frame, and those hold what users wrote
        exception_formatter=structlog.dev.plain_traceback,
    )
    terminal.setFormatter(_formatter(renderer))
    handlers: list[logging.Handler] = [terminal]
    if folder is not None:
        # opened with the first event, so that a full disk stops nobody from starting; 0600 by the daemons' umask
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
    """A logger; events are dotted lower-case names with fields."""
    return _Logger(name)  # type: ignore[return-value] - it is one, once something is logged
