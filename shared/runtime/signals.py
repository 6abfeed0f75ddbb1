"""When a process must stop, which process it stops with, and its priority.

Knows signals, pids and nice values, nothing of what the process does.
"""

import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

SESSION_NICE = "12"


class StopFlag:
    """True once the process must stop: after SIGTERM or SIGINT, or once its supervisor is gone.

    `parent`: the flag is also set when the process has another parent than this pid. `ancestor`:
    the flag is also set when no process has this pid. Without them an orphan would keep its sockets
    and locks. `on_stop` is called by the signal.
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
        if self._ancestor is not None and not _is_alive(self._ancestor):
            self._stopped = True
        return self._stopped


def supervisor_pid() -> int | None:
    """The pid of the process that this one must stop with, from `SPECL_DIE_WITH_PARENT`; None
    without one.

    The pid is passed explicitly: getppid() may already return 1 when first asked.
    """
    value = os.environ.get("SPECL_DIE_WITH_PARENT", "")
    return int(value) if value.isdigit() else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def honcho_pid() -> int | None:
    """The pid of the honcho that started this process, or None.

    Honcho runs each Procfile line in a child of its own, which outlives it. So honcho is the
    parent's parent, and the parent alone does not tell whether honcho lives.
    """
    if "HONCHO_PROCESS_NAME" not in os.environ:
        return None
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/stat") as file:
            pid = int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        ps = subprocess.run(["ps", "-o", "ppid=", "-p", str(parent)], capture_output=True, text=True)
        pid = int(ps.stdout.strip() or 0)
    return pid if pid > 1 else None


def lower_priority() -> None:
    """Give this process nice 19, and its whole session a low priority if this process leads one.

    Linux can share the processor by session first (autogroup, on by default on many systems). Nice
    then counts within a session only, and honcho gives every daemon a session of its own: of two
    busy loops on one core, nice 19 took as much as nice 0. SESSION_NICE gives the session a
    fifteenth of another session's share. At the lowest priority (a sixty-eighth) a trainer beside
    one busy program took five minutes to start.
    """
    os.nice(19)
    if os.getsid(0) == os.getpid():
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(SESSION_NICE)
