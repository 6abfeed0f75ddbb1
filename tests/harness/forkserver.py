"""Starts daemons quickly: a process that has imported everything and forks one real daemon for each line on stdin.

A line is JSON: {"start": role, "environment": {...}, "output": path} is answered with a pid, {"poll": pid} with the exit code or
null. Imports cost 1 to 3 seconds of CPU a daemon; a test that kills a hundred of them does not pay that each time. Tests of the
process tree itself (F15) start `python -m` as users do.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Forkserver:
    """The forking process, as its parent sees it."""

    def __init__(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.forkserver"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        self._lock = threading.Lock()

    def call(self, **command: Any) -> Any:
        """Its answer to one line."""
        with self._lock:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Ends it; daemons that it forked go on."""
        self._process.stdin.close()
        self._process.wait(timeout=60)  # a machine that does much else lets it wait for its last second of work


def _become(role: str, environment: dict[str, str], output: str) -> int:
    os.setsid()
    os.environ.update(environment)
    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(handle, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from specl.daemons.run import run_daemon
    from tests.harness import fake_models

    fake_models.install()
    return run_daemon(role, importlib.import_module(f"specl.daemons.{role}.__main__").main)


def main() -> None:
    import mlx_lm.models.llama  # noqa: F401
    import zmq  # noqa: F401

    from tests.harness import fake_models  # noqa: F401

    for role in ("inference", "collector", "trainer"):
        importlib.import_module(f"specl.daemons.{role}.__main__")
    codes: dict[int, int] = {}
    for line in sys.stdin:
        command = json.loads(line)
        if "poll" in command:
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if not pid:
                    break
                codes[pid] = os.waitstatus_to_exitcode(status)
            answer: int | None = codes.get(command["poll"])
        else:
            answer = os.fork()
            if answer == 0:
                code = 1
                try:
                    code = _become(command["start"], command["environment"], command["output"])
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
