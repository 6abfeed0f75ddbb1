"""Locks on files: at most one process has a role (a daemon, a purge, an import) in a run directory.

Knows roles by name only. The kernel frees a lock when its process ends, even after `kill -9`.
"""

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from specl.shared.errors import AlreadyRunning

ACQUIRE_TIMEOUT_S = 0.3
COMMAND_TIMEOUT_S = 10.0


class Lock:
    """An exclusive lock on `run/ROLE.lock`, held until `release` or the end of the process.

    Raises AlreadyRunning, which names the holder, if another process has it.
    """

    def __init__(self, run: Path, role: str, command: str = "") -> None:
        """`command` is the command line of a command that takes a daemon's role; empty for a
        daemon.
        """
        path = run / f"{role}.lock"
        self._file: IO[str] = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - stays open on purpose
        if not self._acquire():
            self._file.close()
            raise _already_running(run, role)
        # the pid is a hint for messages: on a full disk the lock holds without it
        with suppress(OSError):
            self._file.truncate(0)
            self._file.write(json.dumps({"pid": os.getpid(), "started": time.time(), "command": command}))
            self._file.flush()

    def _acquire(self) -> bool:
        """Try for ACQUIRE_TIMEOUT_S, because `is_locked` in another process holds the lock for a
        moment.
        """
        end = time.monotonic() + ACQUIRE_TIMEOUT_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError:
                if time.monotonic() > end:
                    return False
            time.sleep(0.02)

    def release(self) -> None:
        """Give the lock up before the process ends."""
        with suppress(OSError):
            self._file.close()


def _already_running(run: Path, role: str) -> AlreadyRunning:
    pid, command = holder_of(run, role) or "unknown", command_of(run, role)
    if command:
        return AlreadyRunning(f"`{command}` (pid {pid}) is at work on {run.parent}", "it takes a moment")
    return AlreadyRunning(
        f"another {role} daemon (pid {pid}) already serves {run.parent}",
        "stop it, or give this one its own folder with SPECL_VAR",
    )


def holder_of(run: Path, role: str) -> int | None:
    """The pid in the lock file, or None. A hint for messages; only the lock itself says whether it
    is held.
    """
    pid = _content(run, role).get("pid")
    return pid if isinstance(pid, int) else None


def command_of(run: Path, role: str) -> str:
    """The command line in the lock file; empty for a daemon. A hint, as `holder_of` is."""
    return str(_content(run, role).get("command") or "")


def wait_for_command(run: Path, role: str, seconds: float = COMMAND_TIMEOUT_S) -> None:
    """Wait until a command that has taken a daemon's role ends, because it answers no requests."""
    end = time.monotonic() + seconds
    while is_locked(run, role) and command_of(run, role) and time.monotonic() < end:
        time.sleep(0.05)


def _content(run: Path, role: str) -> dict[str, Any]:
    try:
        content = json.loads((run / f"{role}.lock").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_locked(run: Path, role: str) -> bool:
    """Whether a process holds the role. Creates no file; the lock it tries is shared, so callers do
    not see each other.
    """
    try:
        with open(run / f"{role}.lock", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
