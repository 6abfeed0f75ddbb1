"""How every daemon starts and ends: settings, folders, logs, lock, signals, then its loop; and with
which exit code.
"""

import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress

from specl.shared.errors import AlreadyRunning, ConfigError, ModelUnavailable, SpecLoraError
from specl.shared.messaging.bus import Server
from specl.shared.messaging.endpoints import Addresses, is_loopback
from specl.shared.messaging.sockets import make_missing_keys
from specl.shared.paths import Paths, find_paths
from specl.shared.runtime import log
from specl.shared.runtime.locks import Lock
from specl.shared.runtime.signals import StopFlag, supervisor_pid
from specl.shared.runtime.supervisor import EX_CONFIG, EX_TEMPFAIL
from specl.shared.runtime.terminal import visible
from specl.shared.settings.load import load_settings, settings_file
from specl.shared.settings.schema import Settings

Main = Callable[[Paths, Settings, Server, StopFlag], None]
Serve = Callable[[Paths, Settings], None]


def exit_now(code: int) -> None:
    """End the process without waiting for threads: a model that is still loading would delay an
    ordinary exit, and Ctrl-C promises four seconds. Everything that must last is on disk by now.
    """
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def run_daemon(role: str, main: Main) -> int:
    """Run `main` as the only `role` on this run directory, with its sockets on the bus; the exit
    code of `run_exclusively`.
    """

    def serve(paths: Paths, settings: Settings) -> None:
        addresses = Addresses(paths, settings.bus)
        server = Server(addresses.answer(role), addresses.publish(role))
        try:
            main(paths, settings, server, StopFlag(server.wake, supervisor_pid()))
        finally:
            server.close()

    return run_exclusively(role, serve)


def run_exclusively(role: str, serve: Serve) -> int:
    """Run `serve` as the only `role` on this run directory; the exit code.

    An error is one line on stderr and code 1, or 78 where the settings are wrong and 75 where
    another process has the role.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold prompts and keys
    os.umask(0o077)  # only this user may read files from now on, whichever library writes them
    lock: Lock | None = None
    try:
        settings = load_settings()
        paths = find_paths().create()
        log.set_up(role, paths.logs, settings.logging.level)
        lock = Lock(paths.run, role)  # before the bind: a second process would take over an ipc path
        if settings.bus.transport == "tcp" and is_loopback(settings.bus.host):
            make_missing_keys(paths.keys)
        log.get(role).info("daemon.started", var=str(paths.root), settings=str(settings_file()))
        serve(paths, settings)
        log.get(role).info("daemon.stopped")
        return 0
    except SpecLoraError as error:
        with suppress(OSError):  # the terminal may be gone
            text = visible(f"{role}: {error}" + (f"\n  {error.hint}" if error.hint else ""))
            print(text, file=sys.stderr, flush=True)
        if isinstance(error, AlreadyRunning):
            return EX_TEMPFAIL
        may_pass = isinstance(error, ModelUnavailable)
        return EX_CONFIG if isinstance(error, ConfigError) and not may_pass else 1
    finally:
        if lock is not None:
            lock.release()
