"""How every daemon starts and ends: settings, folders, logs, lock, signals, then its own loop; and which exit code that is."""

import sys
from collections.abc import Callable

from specl.shared import config, log
from specl.shared.bus import Server
from specl.shared.errors import ConfigError, SpecLoraError
from specl.shared.paths import Paths, find_paths
from specl.shared.process import EX_CONFIG, Lock, StopFlag

Main = Callable[[Paths, config.Settings, Server, StopFlag], None]


def run_daemon(role: str, main: Main) -> int:
    """Run `main` as the only `role` on this run directory. A user's mistake is one line on stderr and exit code 78."""
    lock: Lock | None = None
    server: Server | None = None
    try:
        settings = config.load()
        paths = find_paths().create()
        log.set_up(role, paths.logs, settings.logging.level)
        lock = Lock(paths.run, role)  # before the bind: an ipc path can be stolen by a second one
        server = Server(paths.socket(role), paths.socket(f"{role}-pub"))
        stop = StopFlag(server.wake)
        log.get(role).info("daemon.started", var=str(paths.root), settings=str(config.settings_file()))
        main(paths, settings, server, stop)
        log.get(role).info("daemon.stopped")
        return 0
    except SpecLoraError as error:
        print(f"{role}: {error}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr, flush=True)
        return EX_CONFIG if isinstance(error, ConfigError) else 1
    finally:
        if server is not None:
            server.close()
        if lock is not None:
            lock.release()
