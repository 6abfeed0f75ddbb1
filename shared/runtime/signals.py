"""When a process must stop, whom it dies with, and its priority."""

import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType


class StopFlag:
    """Set by SIGTERM and SIGINT, or when `parent` is no longer the parent or `ancestor` is gone: an orphan would keep the
    sockets.
    """

    def __init__(
        self, on_stop: Callable[[], None] = lambda: None, parent: int | None = None, ancestor: int | None = None
    ) -> None:
        self._stopped = False
        self._parent, self._ancestor = parent, ancestor
        self._on_stop = on_stop
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        self._on_stop()

    def __bool__(self) -> bool:
        if self._parent is not None and os.getppid() != self._parent:
            self._stopped = True
        if self._ancestor is not None and not _lives(self._ancestor):
            self._stopped = True
        return self._stopped


def supervisor_pid() -> int | None:
    """The process that this one was started to die with (`SPECL_DIE_WITH_PARENT` has its pid), or None.

    It says who that was, because a parent may be gone before its child looks for the first time.
    """
    named = os.environ.get("SPECL_DIE_WITH_PARENT", "")
    return int(named) if named.isdigit() else None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def honcho_pid() -> int | None:
    """The pid of the honcho that started this process, or None. Between the two stands one of honcho's own children, which
    outlives it, so the parent alone does not tell.
    """
    if "HONCHO_PROCESS_NAME" not in os.environ:
        return None
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/stat") as file:
            pid = int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        found = subprocess.run(["ps", "-o", "ppid=", "-p", str(parent)], capture_output=True, text=True)
        pid = int(found.stdout.strip() or 0)
    return pid if pid > 1 else None


SESSION_NICE = "12"


def lower_priority() -> None:
    """A low priority: nice 19. Where Linux shares the processor out by session first (autogroup, on by default on many
    systems), nice counts within a session only, and honcho gives every daemon one of its own: seen with two busy loops on one
    core, nice 19 took as much as nice 0. So a session's own leader steps back with its whole session, to a fifteenth of
    another's share: at the lowest, a sixty-eighth, a trainer beside one busy program took five minutes to start.
    """
    os.nice(19)
    if os.getsid(0) == os.getpid():
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(SESSION_NICE)
