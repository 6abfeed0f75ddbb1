"""The Python face of the running daemons: `from specl import Client`. Knows messages and deadlines, nothing of models.

with Client() as client:
    for event in client.stream("Why is the sky blue?"):
        print(event, end="")
    print(client.last.stats.acceptance_rate)

Each request has a connection of its own: what is still on its way to one that was left half-way, a late heartbeat, the end of a
cancelled answer, can never be taken for the answer to the next. So threads may share a Client.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from specl.shared.conversations import Messages, to_messages
from specl.shared.errors import DaemonUnreachable, RequestRejected, ServerBusy, SpecLoraError, WireError
from specl.shared.messaging.bus import Connection, gather
from specl.shared.messaging.codes import FailureCode
from specl.shared.messaging.daemon_status import CollectorStatus, DaemonStatus, InferenceStatus, TrainerStatus
from specl.shared.messaging.endpoints import Addresses
from specl.shared.messaging.messages import (
    Ask,
    Cancel,
    Delta,
    Done,
    EvaluateAdapter,
    Failed,
    GetStatus,
    Heartbeat,
    Queued,
    Reply,
    SetAdapter,
    Train,
)
from specl.shared.paths import ROLES, Paths, find_paths
from specl.shared.runtime.locks import is_locked
from specl.shared.sampling_params import SamplingParams
from specl.shared.settings.load import load_settings

if TYPE_CHECKING:
    from specl.shared.messaging.bus import AsyncConnection
    from specl.shared.settings.schema import Settings

START = "start it with `honcho start`"
FIRST_ANSWER_S = 1.5  # a living daemon answers at once, whatever it is doing
HEARTBEAT_S = 1.0
SILENCE_S = 20.0  # a daemon that is there answers a heartbeat at once; one that died is back well before
COMMAND_S = 60.0


@dataclass(frozen=True, slots=True)
class DaemonStatuses:
    """What the daemons said of themselves; None for those that did not answer."""

    inference: InferenceStatus | None
    collector: CollectorStatus | None
    trainer: TrainerStatus | None

    def answering(self) -> list[str]:
        """The roles that answered."""
        return [role for role in ROLES if self.get(role) is not None]

    def get(self, role: str) -> DaemonStatus | None:
        """The status of one role."""
        return {"inference": self.inference, "collector": self.collector, "trainer": self.trainer}[role]


class Client:
    """Talks to the daemons of one run directory. Raises DaemonUnreachable, RequestRejected and their kin.

    `last` is the answer that ended last, of whichever thread; `ask` returns its own.
    """

    def __init__(self, paths: Paths | None = None, settings: "Settings | None" = None) -> None:
        self.paths = paths or find_paths()
        self.settings = settings or load_settings()
        self.addresses = Addresses(self.paths, self.settings.bus)
        self.last: Done | None = None
        self._open: set[Connection] = set()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what streams that were left half-way still hold; the daemon gives them up."""
        while self._open:
            self._open.pop().close()

    @contextmanager
    def _connected(self, role: str) -> Iterator[Connection]:
        connection = Connection(self.addresses.answer(role), role)
        self._open.add(connection)
        try:
            yield connection
        finally:
            self._open.discard(connection)
            connection.close()

    def _may_live(self, role: str) -> bool:
        """False where the role's lock says that no process holds it; elsewhere than here only silence can tell."""
        return not (self.paths.run / f"{role}.lock").exists() or is_locked(self.paths.run, role)

    # ------------------------------------------------------------------------------------------------ asking
    def request(self, prompt: str | Messages, **wish: Any) -> Ask:
        """The request that `stream` and `ask` send: settings' defaults, changed by `wish` (system, max_tokens,
        temperature, top_p, top_k, min_p, seed, mode, stop, conversation_id, record, num_draft_tokens, ngram, deadline_s, client_id).
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
        if isinstance(wish.get("stop"), str):
            wish["stop"] = [wish["stop"]]
        return Ask(
            request_id=uuid.uuid4().hex,
            messages=messages,
            prompt="",
            max_tokens=int(wish.pop("max_tokens", defaults.max_tokens)),
            sampling=SamplingParams(**sampling, seed=seed),
            mode=wish.pop("mode", defaults.mode),
            client_id=wish.pop("client_id", f"user {os.getuid()}"),
            **wish,
        )

    def stream(
        self, prompt: str | Messages, on_position: Callable[[int], None] = lambda place: None, **wish: Any
    ) -> Iterator[str]:
        """Text as it is generated; afterwards `last` holds the statistics. Leaving early cancels on the server."""
        for delta in self.deltas(self.request(prompt, **wish), on_position):
            if delta.text:
                yield delta.text

    def ask(self, prompt: str | Messages, **wish: Any) -> Done:
        """The whole answer at once."""
        *_, done = self._messages(self.request(prompt, **wish))
        self.last = done
        return done

    def deltas(self, ask: Ask, on_position: Callable[[int], None] = lambda place: None) -> Iterator[Delta]:
        """Pieces of one answer, until it is done. `on_position` hears the place in the queue whenever it changes."""
        self.last = None
        for message in self._messages(ask, on_position):
            if isinstance(message, Done):
                self.last = message
            else:
                yield message

    def _messages(self, ask: Ask, on_position: Callable[[int], None] = lambda place: None) -> Iterator[Delta | Done]:
        """Pieces, then the end. Closed early it cancels."""
        with self._connected("inference") as connection:
            finished = False
            try:
                for message in self._heard(connection, ask):
                    if isinstance(message, Queued):
                        on_position(message.position)
                    elif isinstance(message, Failed):
                        finished = True
                        raise error_of(message)
                    else:
                        finished = isinstance(message, Done)
                        yield message
            finally:
                if not finished:
                    connection.send(Cancel(ask.request_id))

    def _heard(self, connection: Connection, ask: Ask) -> Iterator[Queued | Delta | Done | Failed]:
        """What is said about one request, until its end, with a heartbeat from our side."""
        send_request(connection, ask)
        # a daemon that lives answers a status request at once, even while the models load: one deadline for "is it there"
        connection.send(GetStatus())
        waiting_since, alive_at, first = time.monotonic(), time.monotonic(), True
        while True:
            try:
                message = connection.receive(FIRST_ANSWER_S if first else HEARTBEAT_S)
                waiting_since = time.monotonic()
            except DaemonUnreachable:
                if first or time.monotonic() - waiting_since > SILENCE_S or not self._may_live("inference"):
                    raise
                connection.send(GetStatus())
                message = None
            first = False
            if time.monotonic() - alive_at >= HEARTBEAT_S:
                connection.send(Heartbeat(ask.request_id))
                alive_at = time.monotonic()
            if isinstance(message, (Queued, Delta, Done, Failed)) and message.request_id == ask.request_id:
                yield message
                if isinstance(message, (Done, Failed)):
                    return

    # ------------------------------------------------------------------------------------------------ commands
    def status(self, timeout_s: float = 0.4, roles: tuple[str, ...] = ROLES) -> DaemonStatuses:
        """Each daemon's own view; None for a daemon that does not answer."""
        # nobody waits for those whose lock says that they are gone
        asked = [role for role in roles if self._may_live(role)]
        answers = gather({role: (self.addresses.answer(role), GetStatus()) for role in asked}, timeout_s)
        return DaemonStatuses(
            inference=_of_type(InferenceStatus, answers.get("inference")),
            collector=_of_type(CollectorStatus, answers.get("collector")),
            trainer=_of_type(TrainerStatus, answers.get("trainer")),
        )

    def train(self, now: bool = True) -> Reply:
        """Ask the trainer for a run."""
        return self.command("trainer", Train(now))

    def evaluate_adapter(self, folder: str, name: str) -> Reply:
        """Ask the trainer to judge a staged adapter; `run_id` of the reply names the run."""
        return self.command("trainer", EvaluateAdapter(folder, name))

    def set_adapter(self, adapter: str) -> Reply:
        """Draft with this adapter: an id, `best`, `latest`, `previous`, or empty for none."""
        return self.command("inference", SetAdapter(adapter))

    def command(self, role: str, message: Any) -> Reply:
        """Send a command and wait for its outcome. Raises DaemonUnreachable within 1.5 s where nobody is there."""
        with self._connected(role) as connection:
            connection.request(GetStatus(), FIRST_ANSWER_S)
            send_request(connection, message)
            reply = connection.receive(COMMAND_S)
        if not isinstance(reply, Reply):
            raise SpecLoraError(f"the {role} daemon answered something else")
        return reply


S = TypeVar("S")


def _of_type(cls: type[S], answer: Any) -> S | None:
    return answer if isinstance(answer, cls) else None


def send_request(connection: "Connection | AsyncConnection", message: Any) -> None:
    """Send what somebody wrote. Raises RequestRejected for what cannot travel: half a surrogate pair, a number beyond 64 bits."""
    try:
        connection.send(message)
    except WireError as error:
        if isinstance(error.__cause__, UnicodeError):
            raise RequestRejected(
                "the text is not Unicode: it holds bytes or characters that UTF-8 does not have"
            ) from error
        raise RequestRejected(str(error)) from error


def error_of(failed: Failed) -> SpecLoraError:
    """What a failed answer means to whoever asked: the daemon is (for the moment) gone, it says no, or something broke."""
    match failed.code:
        case FailureCode.LOST | FailureCode.STOPPED:
            return DaemonUnreachable(failed.message, failed.hint or START)
        case FailureCode.BUSY:
            return ServerBusy(failed.message, failed.hint)
        case FailureCode.REJECTED:
            return RequestRejected(failed.message, failed.hint)
        case _:
            return SpecLoraError(failed.message, failed.hint)
