"""Forgetting, wherever a room keeps a user's text: each room's purge hook, through its daemon or, where that is down, directly."""

from collections.abc import Iterator
from typing import Any

from specl.shared.client import Client
from specl.shared.errors import DaemonUnreachable, SpecLoraError
from specl.shared.hidden import HiddenSpool
from specl.shared.outbox import Outbox
from specl.shared.paths import Paths
from specl.shared.process import Lock
from specl.shared.store import Store
from specl.shared.wire import Purge


def forget(ids: list[str], before: float | None, pattern: str) -> Iterator[str]:
    """Purge everywhere; a line for each room. Raises SpecLoraError where a room could not."""
    with Client() as client:
        removed, message = _from_store(client, Purge(ids, before, pattern))
        yield message
        wish = Purge(removed, None, "")
        for role in ("inference", "trainer"):
            try:
                reply = client.command(role, wish)
                if not reply.ok:
                    raise SpecLoraError(f"{role}: {reply.message}")
                yield f"{role}: {reply.message}"
            except DaemonUnreachable:
                _from_files(client.paths, role, removed)
                yield f"{role} does not run; its outbox and files forgot them"


def _from_store(client: Client, wish: Purge) -> tuple[list[str], str]:
    """Through the collector; where it is down, with its lock and the same code."""
    try:
        reply = client.command("collector", wish)
    except DaemonUnreachable:
        lock = Lock(client.paths.create().run, "collector")
        try:
            store = Store(client.paths.store)
            ids = store.matching(wish.ids, wish.before, wish.pattern)
            return ids, f"{store.purge(ids)} generations removed from the store"
        finally:
            lock.release()
    if not reply.ok:
        raise SpecLoraError(reply.message)
    return list(reply.details.get("ids", [])), reply.message


def _from_files(paths: Paths, role: str, ids: list[str]) -> Any:
    outbox = Outbox(paths.outbox(role))
    outbox.purge(ids)
    outbox.close()
    if role == "inference":
        HiddenSpool(paths.hidden, 0).purge(ids)
