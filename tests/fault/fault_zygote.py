"""Starts daemons quickly: a process that has imported everything and forks one real daemon for each line on stdin.

A line is JSON: {"start": role, "environment": {...}, "output": path} answers with a pid; {"poll": pid} with the exit code or
null. Imports cost 1 to 3 seconds of CPU a daemon; a test that kills a hundred of them should not pay that each time. Tests
of the process tree itself (F15) start `python -m` as users do.
"""

import importlib
import json
import os
import sys
import traceback


def _become(role: str, environment: dict[str, str], output: str) -> int:
    os.setsid()
    os.environ.update(environment)
    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(handle, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import fault_fake

    from specl.daemons.run import run_daemon

    fault_fake.install()
    return run_daemon(role, importlib.import_module(f"specl.daemons.{role}.__main__").main)


def main() -> None:
    import fault_fake  # noqa: F401
    import mlx_lm.models.llama  # noqa: F401
    import zmq  # noqa: F401

    for role in ("inference", "collector", "trainer"):
        importlib.import_module(f"specl.daemons.{role}.__main__")
    codes: dict[int, int] = {}
    for line in sys.stdin:
        wish = json.loads(line)
        if "poll" in wish:
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if not pid:
                    break
                codes[pid] = os.waitstatus_to_exitcode(status)
            answer: int | None = codes.get(wish["poll"])
        else:
            answer = os.fork()
            if answer == 0:
                code = 1
                try:
                    code = _become(wish["start"], wish["environment"], wish["output"])
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
