"""The supervisor: the process on each Procfile line. It starts a daemon and starts it again
when it dies.

Knows exit codes and pauses, nothing of what a daemon does. Honcho stops every line when one ends,
so the supervisor ends only where starting again cannot help.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from specl.shared.runtime import log
from specl.shared.runtime.locks import command_of, is_locked
from specl.shared.runtime.signals import StopFlag, honcho_pid, supervisor_pid

EX_CONFIG = 78  # sysexits.h: a settings error; starting again cannot help
EX_TEMPFAIL = 75  # sysexits.h: another process has the role; it may be free in a moment
OCCUPIED_S = 1.0  # pause while another process has the role; a command has it for about so long
STOP_GRACE_S = 3.5  # between SIGTERM and SIGKILL; honcho kills after 5 s, and all must be gone before
BACKOFF_S = (1, 2, 4, 8, 16, 32)  # pauses after one crash, two crashes, ...
HEALTHY_AFTER_S = 60.0  # a daemon that ran for so long starts again with the shortest pause


def supervise(role: str, run: Path) -> int:
    """Run `python -P -m specl.daemons.ROLE`, and run it again when it dies, until stopped; the exit
    code is for honcho. Without -P a user's own random.py in the current folder would be imported.

    EX_CONFIG, which makes honcho stop every daemon, is returned after a settings error, and where
    another daemon of this role ran before this one was first started. A daemon that is refused
    later, or because a command (a purge, an import) has its role, is started again until it is its
    turn: it must not stop all the others.
    """
    # honcho tells nobody when it is killed with -9: the supervisor must notice by itself
    flag = StopFlag(parent=supervisor_pid() or os.getppid(), ancestor=honcho_pid())
    crashes, has_served = 0, False
    logger = log.get("supervisor")
    environment = os.environ | {"SPECL_DIE_WITH_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    while not flag:
        started = time.monotonic()
        child = subprocess.Popen([sys.executable, "-P", "-m", f"specl.daemons.{role}"], env=environment)
        code = _wait(child, flag)
        if flag or code == EX_CONFIG:
            return EX_CONFIG if code == EX_CONFIG else 0
        if code == EX_TEMPFAIL:
            if not has_served and is_locked(run, role) and not command_of(run, role):
                return EX_CONFIG
            _sleep(OCCUPIED_S, flag)
            continue
        has_served = True
        crashes = 0 if time.monotonic() - started > HEALTHY_AFTER_S else crashes
        pause = BACKOFF_S[min(crashes, len(BACKOFF_S) - 1)]
        crashes += 1
        logger.error("daemon.died", daemon=role, exit_code=code, restart_in_s=pause)
        _sleep(pause, flag)
    return 0


def _sleep(seconds: float, flag: StopFlag) -> None:
    """Sleep, but no longer than until the flag is set."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not flag:
        time.sleep(0.1)


def _wait(child: subprocess.Popen[bytes], flag: StopFlag) -> int:
    """The child's exit code. Once the flag is set, the child is stopped, and killed after
    STOP_GRACE_S.
    """
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
