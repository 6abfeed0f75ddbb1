"""How every daemon starts and ends: settings, folders, logs, lock, signals, then its own loop; and which exit code that is."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress

from specl.shared.errors import AlreadyRunning, ConfigError, SpecLoraError
from specl.shared.messaging.bus import Server
from specl.shared.messaging.endpoints import Addresses
from specl.shared.paths import Paths, find_paths
from specl.shared.runtime import log
from specl.shared.runtime.locks import Lock
from specl.shared.runtime.signals import StopFlag, supervisor_pid
from specl.shared.runtime.supervisor import EX_CONFIG, EX_TEMPFAIL
from specl.shared.settings.load import load_settings, settings_file
from specl.shared.settings.schema import Settings

Main = Callable[[Paths, Settings, Server, StopFlag], None]
Serve = Callable[[Paths, Settings], None]


def leave(code: int) -> None:
    """End the process at once. A model that is still loading on a thread of its own would hold up an ordinary exit, and
    Ctrl-C promises four seconds; what must last is on disk by now.
    """
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def run_daemon(role: str, main: Main) -> int:
    """Run `main` as the only `role` on this run directory, with its sockets on the bus; the exit code of `run_alone`."""

    def serve(paths: Paths, settings: Settings) -> None:
        addresses = Addresses(paths, settings.bus)
        server = Server(addresses.answer(role), addresses.publish(role))
        try:
            main(paths, settings, server, StopFlag(server.wake, supervisor_pid()))
        finally:
            server.close()

    return run_alone(role, serve)


def run_alone(role: str, serve: Serve) -> int:
    """Run `serve` as the only `role` on this run directory. A user's mistake is one line on stderr and exit code 78;
    75 where another process has the role.
    """
    os.umask(0o077)  # whatever is made from here on, by whichever library, is this user's alone
    lock: Lock | None = None
    try:
        settings = load_settings()
        paths = find_paths().create()
        log.set_up(role, paths.logs, settings.logging.level)
        lock = Lock(paths.run, role)  # before the bind: an ipc path can be stolen by a second one
        log.get(role).info("daemon.started", var=str(paths.root), settings=str(settings_file()))
        serve(paths, settings)
        log.get(role).info("daemon.stopped")
        return 0
    except SpecLoraError as error:
        with suppress(OSError):  # the terminal may be gone
            print(f"{role}: {error}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr, flush=True)
        if isinstance(error, AlreadyRunning):
            return EX_TEMPFAIL
        return EX_CONFIG if isinstance(error, ConfigError) else 1
    finally:
        if lock is not None:
            lock.release()
