"""The Python API of the running daemons: `from specl import Client`. Knows messages and deadlines, nothing of models.

with Client() as client:
    for event in client.stream("Why is the sky blue?"):
        print(event, end="")
    print(client.last.stats.acceptance_rate)

Every request has a separate connection, so that a late message for an earlier one is never taken for the answer to the
next. Threads may share a Client.
"""

import os
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from specl.shared.conversations import Messages, to_messages
from specl.shared.errors import RequestRejected, SpecLoraError, WireError
from specl.shared.messaging.answer_stream import FIRST_ANSWER_S, AnswerStream
from specl.shared.messaging.connections import Connection, gather
from specl.shared.messaging.daemon_status import CollectorStatus, DaemonStatus, InferenceStatus, TrainerStatus
from specl.shared.messaging.endpoints import Addresses
from specl.shared.messaging.messages import (
    Ask,
    Delta,
    Done,
    EvaluateAdapter,
    GetStatus,
    PrefillProgress,
    Queued,
    Reply,
    SetAdapter,
    Train,
)
from specl.shared.paths import ROLES, Paths, find_paths
from specl.shared.runtime.locks import is_locked
from specl.shared.sampling_params import merge_sampling
from specl.shared.settings.load import load_settings

if TYPE_CHECKING:
    from specl.shared.messaging.connections import AsyncConnection
    from specl.shared.settings.schema import Settings

COMMAND_S = 60.0
OnPosition = Callable[[int], None]


def _ignore(position: int) -> None:
    """What a caller without `on_position` does with a position in the queue."""


@dataclass(frozen=True, slots=True)
class DaemonStatuses:
    """The status of every daemon; None for those that did not answer."""

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

    `last` is the answer that ended last, in any thread; `ask` returns the answer to its request.
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
        """Close the connections of streams that were left half-way; the daemon cancels their requests."""
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
        """False where the role's lock exists and no process holds it. Without a lock file the daemon may run on another machine."""
        return not (self.paths.run / f"{role}.lock").exists() or is_locked(self.paths.run, role)

    # ------------------------------------------------------------------------------------------------ asking
    def request(
        self,
        prompt: str | Messages,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        mode: str | None = None,
        stop: str | list[str] | None = None,
        client_id: str | None = None,
        record: bool | None = None,
        conversation_id: str | None = None,
        num_draft_tokens: int | None = None,
        ngram: bool | None = None,
        deadline_s: float | None = None,
        logprobs: int | None = None,
        **sampling: Any,
    ) -> Ask:
        """The request that `stream` and `ask` send. What is None, or not named, has the settings' value.

        `sampling`: temperature, top_p, top_k, min_p, seed. Raises RequestRejected for another name.
        """
        defaults = self.settings.speculative
        return Ask(
            request_id=uuid.uuid4().hex,
            messages=to_messages(prompt, system),
            prompt="",
            max_tokens=defaults.max_tokens if max_tokens is None else int(max_tokens),
            sampling=merge_sampling(defaults, sampling),
            mode=mode or defaults.mode,
            stop=[stop] if isinstance(stop, str) else stop or [],
            conversation_id=conversation_id or "",
            record=record is not False,
            num_draft_tokens=num_draft_tokens,
            ngram=ngram,
            deadline_s=deadline_s,
            client_id=f"user {os.getuid()}" if client_id is None else client_id,
            logprobs=logprobs,
        )

    def stream(self, prompt: str | Messages, on_position: OnPosition = _ignore, **options: Any) -> Iterator[str]:
        """Text as it is generated; afterwards `last` holds the statistics. Leaving early cancels on the server."""
        for delta in self.deltas(self.request(prompt, **options), on_position):
            if delta.text:
                yield delta.text

    def ask(self, prompt: str | Messages, **options: Any) -> Done:
        """The whole answer at once."""
        for piece in self._pieces(self.request(prompt, **options), _ignore):
            if isinstance(piece, Done):
                self.last = piece
                return piece
        raise SpecLoraError("the inference daemon ended the request without an answer")

    def deltas(self, ask: Ask, on_position: OnPosition = _ignore) -> Generator[Delta, None, None]:
        """Pieces of one answer, until it is done. `on_position` hears the position in the queue whenever it changes."""
        self.last = None
        for piece in self._pieces(ask, on_position):
            if isinstance(piece, Done):
                self.last = piece
            else:
                yield piece

    def _pieces(self, ask: Ask, on_position: OnPosition) -> Iterator[Delta | Done]:
        """Deltas, then Done. Closed early it cancels."""
        with self._connected("inference") as connection:
            stream = AnswerStream(ask, time.monotonic(), lambda: self._may_live("inference"))
            try:
                while not stream.ended:
                    for message in stream.outgoing():
                        send_request(connection, message)
                    for piece in stream.feed(connection.receive_all(stream.wait_s), time.monotonic()):
                        if isinstance(piece, Queued):
                            on_position(piece.position)
                        elif not isinstance(piece, PrefillProgress):
                            yield piece
            finally:
                for message in stream.leave():
                    connection.send(message)
            if stream.error is not None:
                raise stream.error

    # ------------------------------------------------------------------------------------------------ commands
    def status(self, timeout_s: float = 0.4, roles: tuple[str, ...] = ROLES) -> DaemonStatuses:
        """The status of the daemons in `roles`; None for one that does not answer in time."""
        # a daemon whose lock is free is not asked, or everybody would wait for the timeout
        running = [role for role in roles if self._may_live(role)]
        answers = gather({role: (self.addresses.answer(role), GetStatus()) for role in running}, timeout_s)
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
        """Send a command and wait for its outcome. Raises DaemonUnreachable after FIRST_ANSWER_S without an answer."""
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
    """Send a user's message. Raises RequestRejected for what cannot be encoded: half a surrogate pair, a number beyond 64 bits."""
    try:
        connection.send(message)
    except WireError as error:
        if isinstance(error.__cause__, UnicodeError):
            raise RequestRejected(
                "the text is not Unicode: it holds bytes or characters that UTF-8 does not have"
            ) from error
        raise RequestRejected(str(error)) from error
