"""The supervisor that stands on each Procfile line: it starts a daemon and starts it again when it dies."""

import os
import subprocess
import sys
import time
from pathlib import Path

from specl.shared.runtime import log
from specl.shared.runtime.locks import command_of, is_locked
from specl.shared.runtime.signals import StopFlag, honcho_pid, supervisor_pid

EX_CONFIG = 78  # sysexits.h: a settings error; retrying cannot help
EX_TEMPFAIL = 75  # sysexits.h: somebody else has the role; it may be free in a moment
OCCUPIED_S = 1.0  # between two tries then: a command has it for about so long
STOP_GRACE_S = 3.5  # honcho kills after 5 s; all must be gone before
BACKOFF_S = (1, 2, 4, 8, 16, 32)
HEALTHY_AFTER_S = 60.0


def supervise(role: str, run: Path) -> int:
    """Run `python -m specl.daemons.ROLE` and run it again when it dies; the exit code is for honcho.

    A settings error ends the keeper too, so that honcho stops all with that one clear message. So does a daemon of the same
    role that was there first. One that was refused later, or because a command is at work in its place (a purge, an import),
    waits for its turn: it must not take all others with it.
    """
    # honcho, killed with -9, tells nobody: its keepers must notice
    flag = StopFlag(parent=supervisor_pid() or os.getppid(), ancestor=honcho_pid())
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
