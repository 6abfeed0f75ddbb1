"""One process a role, by a lock on a file. The kernel frees it when the process ends, even after kill -9."""

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from specl.shared.errors import AlreadyRunning

PATIENCE_S = 0.3


class Lock:
    """An exclusive lock on `run/ROLE.lock` for the life of the process; freed by the kernel even after kill -9.

    Raises AlreadyRunning, naming the holder, where another process has it.
    """

    def __init__(self, run: Path, role: str, command: str = "") -> None:
        """`command` names who takes the role where it is not a daemon but a command in its place."""
        path = run / f"{role}.lock"
        self._file: IO[str] = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held open on purpose
        if not self._acquire():
            holder, other = holder_of(run, role) or "unknown", command_of(run, role)
            self._file.close()
            if other:
                raise AlreadyRunning(
                    f"`{other}` (pid {holder}) is at work on {run.parent}", "it takes a moment"
                ) from None
            raise AlreadyRunning(
                f"another {role} daemon (pid {holder}) already serves {run.parent}",
                "stop it, or give this one its own folder with SPECL_VAR",
            ) from None
        # the pid is a hint: on a full disk the lock holds without it
        with suppress(OSError):
            self._file.truncate(0)
            self._file.write(json.dumps({"pid": os.getpid(), "started": time.time(), "command": command}))
            self._file.flush()

    def _acquire(self) -> bool:
        """Try for a moment: whoever asks whether the lock is held (`is_locked`) shares it while it asks."""
        end = time.monotonic() + PATIENCE_S
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


def holder_of(run: Path, role: str) -> int | None:
    """The pid that wrote the lock file last, or None. A hint for messages: only the lock itself is the truth."""
    pid = _written(run, role).get("pid")
    return pid if isinstance(pid, int) else None


def command_of(run: Path, role: str) -> str:
    """The command that wrote the lock file last; empty for a daemon. A hint as well."""
    return str(_written(run, role).get("command") or "")


def wait_for_command(run: Path, role: str, seconds: float = 10.0) -> None:
    """Let a command that is at work in a daemon's place finish: nobody would answer in its name."""
    end = time.monotonic() + seconds
    while is_locked(run, role) and command_of(run, role) and time.monotonic() < end:
        time.sleep(0.05)


def _written(run: Path, role: str) -> dict[str, Any]:
    try:
        found = json.loads((run / f"{role}.lock").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_locked(run: Path, role: str) -> bool:
    """Whether some process holds the role. Makes nothing, and two that ask at once do not see each other."""
    try:
        with open(run / f"{role}.lock", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
