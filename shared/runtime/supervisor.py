"""What every daemon process does the same way: one instance by a lock, clean signals, a parent to die with, and the small
respawner that stands on each Procfile line. Knows nothing of sockets and records.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from specl.shared.errors import AlreadyRunning
from specl.shared.runtime import log

EX_CONFIG = 78  # sysexits.h: a settings error; retrying cannot help
EX_TEMPFAIL = 75  # sysexits.h: somebody else has the role; it may be free in a moment
OCCUPIED_S = 1.0  # between two tries then: a command has it for about so long
STOP_GRACE_S = 3.5  # honcho kills after 5 s; all must be gone before
BACKOFF_S = (1, 2, 4, 8, 16, 32)
HEALTHY_AFTER_S = 60.0
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


def keeper() -> int | None:
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


def honcho() -> int | None:
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


def step_back() -> None:
    """A low priority: nice 19. Where Linux shares the processor out by session first (autogroup, on by default on many
    systems), nice counts within a session only, and honcho gives every daemon one of its own: seen with two busy loops on one
    core, nice 19 took as much as nice 0. So a session's own leader steps back with its whole session, to a fifteenth of
    another's share: at the lowest, a sixty-eighth, a trainer beside one busy program took five minutes to start.
    """
    os.nice(19)
    if os.getsid(0) == os.getpid():
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(SESSION_NICE)


def keep(role: str, run: Path) -> int:
    """Run `python -m specl.daemons.ROLE` and run it again when it dies; the exit code is for honcho.

    A settings error ends the keeper too, so that honcho stops all with that one clear message. So does a daemon of the same
    role that was there first. One that was refused later, or because a command is at work in its place (a purge, an import),
    waits for its turn: it must not take all others with it.
    """
    # honcho, killed with -9, tells nobody: its keepers must notice
    flag = StopFlag(parent=keeper() or os.getppid(), ancestor=honcho())
    failures, served = 0, False
    logger = log.get("keeper")
    environment = os.environ | {"SPECL_DIE_WITH_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    while not flag:
        started = time.monotonic()
        child = subprocess.Popen([sys.executable, "-m", f"specl.daemons.{role}"], env=environment)
        code = _wait(child, flag)
        if flag or code == EX_CONFIG:
            return EX_CONFIG if code == EX_CONFIG else 0
        if code == EX_TEMPFAIL:
            if not served and is_locked(run, role) and not command_of(run, role):
                return EX_CONFIG
            _rest(OCCUPIED_S, flag)
            continue
        served = True
        failures = 0 if time.monotonic() - started > HEALTHY_AFTER_S else failures
        pause = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
        failures += 1
        logger.error("daemon.died", daemon=role, code=code, again_in_s=pause)
        _rest(pause, flag)
    return 0


def _rest(seconds: float, flag: StopFlag) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not flag:
        time.sleep(0.1)


def _wait(child: subprocess.Popen[bytes], flag: StopFlag) -> int:
    """The child's exit code; once the flag is set it is told to stop, and killed after the grace time."""
    while not flag:
        try:
            return child.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
    child.terminate()
    try:
        return child.wait(timeout=STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()
