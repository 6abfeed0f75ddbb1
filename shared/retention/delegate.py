"""Work on a daemon's files: the daemon does it, or where none runs, this process does it under the
daemon's lock.

Knows locks and commands, nothing of the work.
"""

from collections.abc import Callable
from typing import Any

from specl.shared.errors import AlreadyRunning, ConfigError
from specl.shared.messaging.client import Client
from specl.shared.messaging.endpoints import is_elsewhere
from specl.shared.messaging.messages import Reply
from specl.shared.runtime.locks import Lock, is_locked, wait_for_command


def through_daemon(client: Client, role: str, message: Any, locally: Callable[[], Reply], command: str) -> Reply:
    """The reply of the daemon `role` to `message`; where it does not run, that of `locally`, called
    under its lock.

    `command` is this process's own name in the lock file.
    """
    run = client.paths.run
    wait_for_command(run, role)
    if not is_locked(run, role):
        try:
            lock = Lock(client.paths.create().run, role, command)
        except AlreadyRunning:  # the daemon has just started
            pass
        else:
            try:
                return locally()
            finally:
                lock.release()
    return client.command(role, message)


def require_local_files(client: Client, command: str) -> None:
    """Raises ConfigError where the daemons, and so the store, are on another machine than this one."""
    if is_elsewhere(client.addresses.keys) or _reached_through_tunnel(client):
        raise ConfigError(
            f"the daemons run on another machine, and nothing of theirs is in {client.paths.root}",
            f"run `specl-ctl store {command}` there: it works on their files",
        )


def _reached_through_tunnel(client: Client) -> bool:
    """Whether a daemon answers over TCP that holds no lock on this machine."""
    if client.settings.bus.transport != "tcp":
        return False
    return any(not is_locked(client.paths.run, role) for role in client.status().answering())
