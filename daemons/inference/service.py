"""The loop thread of inference: the only owner of its sockets. Takes requests in and sends tokens
and records out.

Knows clients, queue limits and the outbox; nothing of models. A client that vanishes has its
request cancelled; one that is only silent, because it pauses, has not.
"""

import time
from collections import deque
from dataclasses import dataclass
from functools import partial

from specl.daemons.inference.decode_thread import DecodeThread
from specl.daemons.inference.outgoing import Outgoing
from specl.daemons.inference.recorder import Recorder
from specl.shared.conversations import strings
from specl.shared.messaging.bus import Server
from specl.shared.messaging.codes import DaemonState, FailureCode
from specl.shared.messaging.daemon_status import (
    AdapterStatus,
    BlasStatus,
    InferenceStatus,
    ModelsStatus,
    OutboxStatus,
    QueueStatus,
)
from specl.shared.messaging.endpoints import Addresses
from specl.shared.messaging.messages import (
    Activity,
    AdapterReady,
    Ask,
    Cancel,
    Delta,
    Done,
    Failed,
    Fetch,
    GetStatus,
    Heartbeat,
    PrefillProgress,
    Purge,
    Queued,
    Reply,
    SetAdapter,
)
from specl.shared.messaging.outbox import Outbox
from specl.shared.models import blas
from specl.shared.paths import Paths
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.retention.purge_matching import purge_matches
from specl.shared.retention.redaction import Redactor
from specl.shared.runtime import log
from specl.shared.runtime.signals import StopFlag
from specl.shared.runtime.thread_failure import raise_failure
from specl.shared.settings.schema import Settings

TICK_S = 0.5
ACTIVITY_S = 2.0  # how often Activity is published without a change
UNKNOWN_REQUEST = "the inference daemon does not know this request: it was restarted, or has given the request up"
_log = log.get("inference")


@dataclass(slots=True)
class PendingRequest:
    """A request whose client waits. `client_id` is the client's name for itself; its requests may
    have a connection each.
    """

    peer: bytes
    heard_at: float
    client_id: str = ""

    def is_of(self, peer: bytes, client_id: str) -> bool:
        """Whether the request comes from this client."""
        return self.peer == peer or (bool(client_id) and self.client_id == client_id)


class Inference:
    """The daemon's loop; `run` returns when stopped, and raises what killed one of its threads."""

    def __init__(self, paths: Paths, settings: Settings, server: Server) -> None:
        self.paths, self.settings, self.server = paths, settings, server
        self.outbox = Outbox(paths.outbox("inference"), settings.records.outbox_limit_mb << 20)
        self.spool = HiddenSpool(paths.hidden, settings.records.hidden_spool_mb << 20)
        self.pending: dict[str, PendingRequest] = {}  # by request id
        self.started = time.monotonic()
        self._outgoing: deque[tuple[bytes | None, Outgoing]] = deque()
        self._published_busy, self._next_activity = False, 0.0
        self.recorder = Recorder(self.outbox, self.spool, Redactor(settings.records), self._emit)
        self.decoding = DecodeThread(paths, settings, self.recorder, self._emit, server.wake)
        server.subscribe(Addresses(paths, settings.bus).publish("trainer"), self._published)

    def _emit(self, peer: bytes | None, message: Outgoing) -> None:
        self._outgoing.append((peer, message))
        self.server.wake()

    def run(self, stop: StopFlag) -> None:
        """Serve until stopped."""
        self.recorder.start()
        self.decoding.start()
        next_check = 0.0
        while not stop:
            self.server.poll(TICK_S, self._request)
            self._flush()
            self._publish_activity()
            if failure := self.decoding.failure or self.recorder.failure:
                raise_failure(failure)
            if time.monotonic() >= next_check:
                next_check = time.monotonic() + TICK_S
                self._drop_silent_clients()
        self.decoding.stop()
        self.recorder.stop()
        self._flush()
        self.outbox.close()

    def _flush(self) -> None:
        while self._outgoing:
            peer, message = self._outgoing.popleft()
            if peer is None:
                self.server.publish(message)
            elif peer:
                self._send(peer, message)

    def _send(self, peer: bytes, message: Outgoing) -> None:
        sent = self.server.send(peer, message)
        if isinstance(message, (Done, Failed)):
            self.pending.pop(message.request_id, None)
        elif not sent and isinstance(message, (Queued, PrefillProgress, Delta)) and message.request_id in self.pending:
            self._give_up(message.request_id, "the client is gone, or has not read for too long")

    def _publish_activity(self) -> None:
        """On every change, and again every ACTIVITY_S: a subscriber that has just started, or
        missed one, gets the next.
        """
        busy, now = self.decoding.busy, time.monotonic()
        if busy != self._published_busy or now >= self._next_activity:
            self._published_busy, self._next_activity = busy, now + ACTIVITY_S
            self.server.publish(Activity(busy))

    def _drop_silent_clients(self) -> None:
        oldest = time.monotonic() - self.settings.serving.client_timeout_s
        for request_id, request in [item for item in self.pending.items() if item[1].heard_at < oldest]:
            if self.server.is_connected(request.peer, Heartbeat(request_id)):
                request.heard_at = time.monotonic()  # a reader that pauses; asked again after the same time
            else:
                self._give_up(request_id, "the client is silent, and its connection is gone")

    def _give_up(self, request_id: str, reason: str) -> None:
        _log.info("client.lost", request=request_id, reason=reason)
        self.pending.pop(request_id, None)
        self.decoding.cancel(request_id, reason)

    # ------------------------------------------------------------------------------------------------ messages
    def _published(self, message: object) -> None:
        if isinstance(message, AdapterReady) and self.decoding.engine is not None:
            self.decoding.adapter_announced(message)

    def _request(self, peer: bytes, message: object) -> None:
        match message:
            case Ask():
                self._ask(peer, message)
            case Heartbeat():
                self._heartbeat(peer, message)
            case Cancel():
                self.decoding.cancel(message.request_id, "cancelled by the client", peer)
            case Fetch():
                self.recorder.fetch(peer, message)
            case GetStatus():
                self.server.send(peer, self._status())
            case SetAdapter() if self.decoding.starting:
                self.server.send(peer, Reply(False, "the models are still loading"))
            case SetAdapter():
                self.decoding.set_adapter(peer, message)
            case Purge():
                self.decoding.purge(peer, message, partial(purge_matches, message))
            case _:
                self.server.send(peer, Reply(False, "inference does not know this request"))

    def _heartbeat(self, peer: bytes, heartbeat: Heartbeat) -> None:
        request = self.pending.get(heartbeat.request_id)
        if request is None:  # the client waits for a process that is gone
            failed = Failed(heartbeat.request_id, FailureCode.LOST, UNKNOWN_REQUEST, "ask again")
            self.server.send(peer, failed)
        elif request.peer == peer:
            request.heard_at = time.monotonic()

    def _ask(self, peer: bytes, ask: Ask) -> None:
        """Take a request, or refuse it for what needs no model: its size, its id, the queue's
        limits.
        """
        serving = self.settings.serving
        client_requests = sum(request.is_of(peer, ask.client_id) for request in self.pending.values())
        if ask.request_id in self.pending:
            self._refuse(peer, ask, FailureCode.REJECTED, "a request with this id is running")
        elif (size := text_size(ask)) > serving.max_prompt_kb << 10:
            sentence = f"the prompt has {size >> 10} KB; serving.max_prompt_kb is {serving.max_prompt_kb}"
            self._refuse(peer, ask, FailureCode.CONTEXT_LENGTH, sentence)
        elif client_requests >= serving.client_queue_limit:
            self._refuse(peer, ask, FailureCode.BUSY, f"{client_requests} requests of this client wait already")
        elif len(self.pending) >= serving.queue_limit:
            self._refuse(peer, ask, FailureCode.BUSY, f"{len(self.pending)} requests wait already")
        else:
            self.pending[ask.request_id] = PendingRequest(peer, time.monotonic(), ask.client_id)
            if self.decoding.engine is None:
                self.server.send(peer, Queued(ask.request_id, len(self.pending) - 1))
            self.decoding.submit(peer, ask)

    def _refuse(self, peer: bytes, ask: Ask, code: FailureCode, sentence: str) -> None:
        hint = "try again in a moment" if code is FailureCode.BUSY else ""
        self.server.send(peer, Failed(ask.request_id, code, sentence, hint))

    # ------------------------------------------------------------------------------------------------ status
    def _status(self) -> InferenceStatus:
        decoding, scheduler, recorder = self.decoding, self.decoding.scheduler, self.recorder
        recent = list(decoding.recent)
        drafted = sum(answer.drafted for answer in recent)
        accepted = sum(answer.accepted for answer in recent)
        speeds = [answer.tokens_per_second for answer in recent]
        return InferenceStatus(
            state=self._state(),
            uptime_s=round(time.monotonic() - self.started, 1),
            queue=QueueStatus(len(scheduler.waiting), len(scheduler.running)) if scheduler else QueueStatus(),
            outbox=OutboxStatus(self.outbox.pending, 0, recorder.refused, recorder.problem or self.outbox.problem),
            served=decoding.served,
            rolling_acceptance=round(accepted / drafted, 4) if drafted else None,
            rolling_tokens_per_second=round(sum(speeds) / len(speeds), 2) if speeds else None,
            adapter=self._adapter_status(),
            models=self._models_status(),
            blas=BlasStatus(blas.BOUND.name, blas.BOUND.fast),
            malformed=self.server.malformed,
        )

    def _state(self) -> DaemonState:
        if self.decoding.starting:
            return DaemonState.STARTING
        return DaemonState.BUSY if self.decoding.busy else DaemonState.READY

    def _adapter_status(self) -> AdapterStatus:
        swap, engine = self.decoding.swap, self.decoding.engine
        return AdapterStatus(
            active=swap.active if swap else "",
            previous=swap.previous if swap else "",
            form=engine.adapter_form if engine else "",
            rejected=dict(swap.rejected) if swap else {},
            watch=self.decoding.monitor.status(),
        )

    def _models_status(self) -> ModelsStatus:
        engine, models, length = self.decoding.engine, self.settings.models, self.decoding.context_length
        if engine is None:
            return ModelsStatus(models.target.name, models.draft.name, loaded=False, context_length=length)
        draft = engine.draft.name if engine.draft else None
        return ModelsStatus(engine.target.name, draft, loaded=True, context_length=length)


def text_size(ask: Ask) -> int:
    """Characters of a request's text, however deeply its messages are nested."""
    return len(ask.prompt) + sum(map(len, ask.stop)) + sum(map(len, strings(ask.messages)))
