"""The Python face of the running daemons: `from specl import Client`. Knows messages and deadlines, nothing of models.

with Client() as client:
    for event in client.stream("Why is the sky blue?"):
        print(event, end="")
    print(client.last.stats["acceptance_rate"])
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from specl.shared.access import Addresses
from specl.shared.bus import Connection, gather
from specl.shared.chat import Messages, to_messages
from specl.shared.config import Settings, load
from specl.shared.errors import DaemonUnreachable, RequestRejected, SpecLoraError
from specl.shared.paths import Paths, find_paths
from specl.shared.process import holder_of, is_locked
from specl.shared.wire import (
    Alive,
    Ask,
    Cancel,
    Delta,
    Done,
    Failed,
    GetStatus,
    Queued,
    Reply,
    Sampling,
    SetAdapter,
    Status,
    Train,
)

FIRST_ANSWER_S = 1.5  # a living daemon answers at once, whatever it is doing
HEARTBEAT_S = 1.0
SILENCE_S = 20.0  # a daemon that is there answers a heartbeat at once; one that died is back well before
COMMAND_S = 60.0


class Client:
    """Talks to the daemons of one run directory. Raises DaemonUnreachable, RequestRejected and their kin."""

    def __init__(self, paths: Paths | None = None, settings: Settings | None = None) -> None:
        self.paths = paths or find_paths()
        self.settings = settings or load()
        self.addresses = Addresses(self.paths, self.settings.bus)
        self.last: Done | None = None
        self._connections: dict[str, Connection] = {}

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _to(self, role: str) -> Connection:
        if role not in self._connections:
            self._connections[role] = Connection(self.addresses.answer(role), role)
        return self._connections[role]

    def _may_live(self, role: str) -> bool:
        """False where the role's lock says that no process holds it; elsewhere than here only silence can tell."""
        return not (self.paths.run / f"{role}.lock").exists() or is_locked(self.paths.run, role)

    # ------------------------------------------------------------------------------------------------ asking
    def request(self, prompt: str | Messages, **wish: Any) -> Ask:
        """The request that `stream` and `ask` send: settings' defaults, changed by `wish` (system, max_tokens,
        temperature, top_p, top_k, min_p, seed, mode, stop, conversation_id, record, num_draft_tokens, ngram, deadline_s, client).
        """
        defaults = self.settings.speculative
        sampling = {
            name: wish.pop(name) if wish.get(name) is not None else getattr(defaults, name)
            for name in ("temperature", "top_p", "top_k", "min_p")
        }
        for name in sampling:
            wish.pop(name, None)
        sampling["temperature"], sampling["top_p"] = float(sampling["temperature"]), float(sampling["top_p"])
        sampling["min_p"] = float(sampling["min_p"])
        seed = wish.pop("seed", None)
        messages = to_messages(prompt, wish.pop("system", None))
        wish = {name: value for name, value in wish.items() if value is not None}
        return Ask(
            request_id=uuid.uuid4().hex,
            messages=messages,
            prompt="",
            max_tokens=int(wish.pop("max_tokens", defaults.max_tokens)),
            sampling=Sampling(**sampling, seed=seed),
            mode=wish.pop("mode", defaults.mode),
            client=wish.pop("client", f"user {os.getuid()}"),
            **wish,
        )

    def stream(
        self, prompt: str | Messages, on_place: Callable[[int], None] = lambda place: None, **wish: Any
    ) -> Iterator[str]:
        """Text as it is generated; afterwards `last` holds the statistics. Leaving early cancels on the server."""
        for delta in self.deltas(self.request(prompt, **wish), on_place):
            if delta.text:
                yield delta.text

    def ask(self, prompt: str | Messages, **wish: Any) -> Done:
        """The whole answer at once."""
        for _ in self.stream(prompt, **wish):
            pass
        assert self.last is not None
        return self.last

    def deltas(self, ask: Ask, on_place: Callable[[int], None] = lambda place: None) -> Iterator[Delta]:
        """Pieces of one answer, until it is done. `on_place` hears the place in the queue whenever it changes."""
        self.last = None
        connection = self._to("inference")
        connection.send(ask)
        # a daemon that lives answers a status request at once, even while the models load: one deadline for "is it there"
        connection.send(GetStatus())
        waiting_since, alive_at, first = time.monotonic(), time.monotonic(), True
        finished = False
        try:
            while True:
                try:
                    message = connection.receive(FIRST_ANSWER_S if first else HEARTBEAT_S)
                except DaemonUnreachable:
                    if first or time.monotonic() - waiting_since > SILENCE_S or not self._may_live("inference"):
                        raise
                    connection.send(GetStatus())
                    message = None
                first = False
                if time.monotonic() - alive_at >= HEARTBEAT_S:
                    connection.send(Alive(ask.request_id))
                    alive_at = time.monotonic()
                if message is None:
                    continue
                waiting_since = time.monotonic()
                if getattr(message, "request_id", "") != ask.request_id:
                    continue
                if isinstance(message, Queued):
                    on_place(message.place)
                elif isinstance(message, Delta):
                    yield message
                elif isinstance(message, Failed):
                    finished = True
                    raise _error_of(message)
                elif isinstance(message, Done):
                    finished, self.last = True, message
                    return
        finally:
            if not finished:
                connection.send(Cancel(ask.request_id))

    # ------------------------------------------------------------------------------------------------ commands
    def status(self, timeout_s: float = 0.4) -> dict[str, Any]:
        """Each daemon's own view by role; roles that do not answer are left out."""
        # nobody waits for those whose lock says that they are gone
        roles = [role for role in ("inference", "collector", "trainer") if self._may_live(role)]
        answers = gather({role: (self.addresses.answer(role), GetStatus()) for role in roles}, timeout_s)
        found = {}
        for role, answer in answers.items():
            if isinstance(answer, Status):
                found[role] = answer.body | {"pid": holder_of(self.paths.run, role)}
        return found

    def train(self, now: bool = True) -> Reply:
        """Ask the trainer for a run."""
        return self.command("trainer", Train(now))

    def set_adapter(self, adapter: str) -> Reply:
        """Draft with this adapter: an id, `best`, `latest`, `previous`, or empty for none."""
        return self.command("inference", SetAdapter(adapter))

    def command(self, role: str, message: Any) -> Reply:
        """Send a command and wait for its outcome. Raises DaemonUnreachable within 1.5 s where nobody is there."""
        connection = self._to(role)
        connection.request(GetStatus(), FIRST_ANSWER_S)
        reply = connection.request(message, COMMAND_S)
        if not isinstance(reply, Reply):
            raise SpecLoraError(f"the {role} daemon answered something else")
        return reply


def _error_of(failed: Failed) -> SpecLoraError:
    kind = RequestRejected if failed.code in ("rejected", "busy") else SpecLoraError
    error = kind(failed.message, failed.hint)
    if failed.code == "busy":
        error.exit_code = 1
    return error
