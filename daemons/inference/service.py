"""The loop thread of inference: the only owner of its sockets. Takes requests in, passes tokens out, hands records over.

Knows clients, queue places and outboxes; nothing of models. A client that vanishes has its request cancelled.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from specl.daemons.inference.job import Job
from specl.daemons.inference.recorder import Recorder
from specl.daemons.inference.worker import Worker
from specl.shared.messaging.bus import Server
from specl.shared.messaging.codes import DaemonState, FailureCode
from specl.shared.messaging.daemon_status import (
    AdapterStatus,
    BlasStatus,
    InferenceStatus,
    ModelsStatus,
    OutboxStatus,
    QueueStatus,
    WatchStatus,
)
from specl.shared.messaging.endpoints import Addresses
from specl.shared.messaging.messages import (
    Activity,
    AdapterReady,
    Ask,
    Cancel,
    Done,
    Failed,
    Fetch,
    GetStatus,
    Heartbeat,
    Purge,
    Queued,
    RecordReady,
    Reply,
    SetAdapter,
)
from specl.shared.messaging.outbox import Outbox
from specl.shared.models import blas
from specl.shared.paths import Paths
from specl.shared.retention.answer_files import AnswerFiles
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.retention.purge_matching import purge_matches
from specl.shared.retention.redaction import Redactor
from specl.shared.runtime import log
from specl.shared.runtime.signals import StopFlag
from specl.shared.settings.schema import Settings

TICK_S = 0.5
ACTIVITY_S = 2.0
LOST = "the inference daemon does not know this request (any more): it was restarted, or gave the request up"
_log = log.get("inference")


@dataclass(slots=True)
class Client:
    """Who waits for a request."""

    peer: bytes
    heard: float
    name: str = ""  # as it calls itself; a program's requests have a connection each

    def same(self, peer: bytes, name: str) -> bool:
        """Whether another request is this one's too."""
        return self.peer == peer or (bool(name) and self.name == name)


class Inference:
    """The daemon's loop; `run` returns when stopped, raises what killed one of its threads."""

    def __init__(self, paths: Paths, settings: Settings, server: Server) -> None:
        self.paths, self.settings, self.server = paths, settings, server
        self.outbox = Outbox(paths.outbox("inference"), settings.records.outbox_limit_mb << 20)
        self.spool = HiddenSpool(paths.hidden, settings.records.hidden_spool_mb << 20)
        self.clients: dict[str, Client] = {}
        self.started = time.monotonic()
        self._out: deque[tuple[bytes | None, Any]] = deque()
        self._busy, self._tell_again = False, 0.0
        self.recorder = Recorder(
            self.outbox,
            self.spool,
            Redactor(settings.records),
            lambda id: self._emit(None, RecordReady(id)),
            self._emit,
        )
        self.worker = Worker(paths, settings, self.recorder, self._emit, server.wake)
        server.subscribe(Addresses(paths, settings.bus).publish("trainer"), self._published)

    def _emit(self, peer: bytes | None, message: Any) -> None:
        """From any thread: send to a client, or publish where there is no peer."""
        self._out.append((peer, message))
        self.server.wake()

    def run(self, stop: StopFlag) -> None:
        """Serve until stopped."""
        self.recorder.start()
        self.worker.start()
        next_check = 0.0
        while not stop:
            self.server.poll(TICK_S, self._request)
            self._flush()
            self._tell_activity()
            if failure := self.worker.failure or self.recorder.failure:
                raise failure
            if time.monotonic() >= next_check:
                next_check = time.monotonic() + TICK_S
                self._drop_silent_clients()
        self.worker.stop()
        self.recorder.stop()
        self._flush()
        self.outbox.close()

    def _flush(self) -> None:
        while self._out:
            peer, message = self._out.popleft()
            if peer is None:
                self.server.publish(message)
                continue
            if not peer:
                continue
            sent = self.server.send(peer, message)
            request_id = getattr(message, "request_id", "")
            if isinstance(message, (Done, Failed)):
                self.clients.pop(request_id, None)
            elif not sent and request_id in self.clients:
                self._give_up(request_id, "the client is gone")

    def _tell_activity(self) -> None:
        """On every change, and again every ACTIVITY_S: whoever has just started, or missed one, hears the next."""
        busy, now = self.worker.busy, time.monotonic()
        if busy != self._busy or now >= self._tell_again:
            self._busy, self._tell_again = busy, now + ACTIVITY_S
            self.server.publish(Activity(busy))

    def _drop_silent_clients(self) -> None:
        deadline = time.monotonic() - self.settings.serving.client_timeout_s
        for request_id in [id for id, client in self.clients.items() if client.heard < deadline]:
            self._give_up(request_id, "the client is silent")

    def _give_up(self, request_id: str, why: str) -> None:
        _log.info("client.lost", request=request_id, why=why)
        self.clients.pop(request_id, None)
        self.worker.cancel(request_id, why)

    # ------------------------------------------------------------------------------------------------ messages
    def _published(self, message: Any) -> None:
        if isinstance(message, AdapterReady) and self.worker.engine is not None:
            self.worker.announced(message)

    def _request(self, peer: bytes, message: Any) -> None:
        match message:
            case Ask():
                self._ask(peer, message)
            case Heartbeat():
                client = self.clients.get(message.request_id)
                if client is None:  # it waits for a process that is gone
                    self.server.send(peer, Failed(message.request_id, FailureCode.LOST, LOST, "ask again"))
                elif client.peer == peer:
                    client.heard = time.monotonic()
            case Cancel():
                self.worker.cancel(message.request_id, "cancelled by the client", peer)
            case Fetch():
                self.recorder.fetch(peer, message)
            case GetStatus():
                self.server.send(peer, self._status())
            case SetAdapter():
                if self.worker.engine is None and not self.worker.unloaded:
                    self.server.send(peer, Reply(False, "the models are still loading"))
                else:
                    self.worker.set_adapter(peer, message)
            case Purge():
                self._purge(peer, message)
            case _:
                self.server.send(peer, Reply(False, "inference does not know this request"))

    def _ask(self, peer: bytes, ask: Ask) -> None:
        refusal = ""
        if ask.max_tokens < 1:
            refusal = f"max_tokens must be at least 1, not {ask.max_tokens}"
        elif ask.mode not in ("detailed", "fast"):
            refusal = f"mode must be detailed or fast, not {ask.mode!r}"
        elif ask.num_draft_tokens is not None and not 0 <= ask.num_draft_tokens <= 16:
            refusal = f"num_draft_tokens must lie between 0 and 16, not {ask.num_draft_tokens}"
        elif ask.request_id in self.clients:
            refusal = "a request with this id is running"
        elif (size := text_size(ask)) > self.settings.serving.max_prompt_kb << 10:
            refusal = f"the prompt has {size >> 10} KB; serving.max_prompt_kb is {self.settings.serving.max_prompt_kb}"
        mine = sum(client.same(peer, ask.client_id) for client in self.clients.values())
        if refusal:
            self.server.send(peer, Failed(ask.request_id, FailureCode.REJECTED, refusal))
        elif mine >= self.settings.serving.client_queue_limit:
            self.server.send(
                peer,
                Failed(
                    ask.request_id,
                    FailureCode.BUSY,
                    f"{mine} requests of this client wait already",
                    "try again in a moment",
                ),
            )
        elif len(self.clients) >= self.settings.serving.queue_limit:
            self.server.send(
                peer,
                Failed(
                    ask.request_id,
                    FailureCode.BUSY,
                    f"{len(self.clients)} requests wait already",
                    "try again in a moment",
                ),
            )
        else:
            self.clients[ask.request_id] = Client(peer, time.monotonic(), ask.client_id)
            if self.worker.engine is None:
                self.server.send(peer, Queued(ask.request_id, len(self.clients) - 1))
            self.worker.submit(Job(peer, ask, time.monotonic()))

    def _purge(self, peer: bytes, wish: Purge) -> None:
        """Forget generations here: prefix cache, past answers, outbox and spool, then answer. The store is the collector's."""
        engine = self.worker.engine

        def forget() -> None:
            if engine is not None:
                engine.prefixes.purge()
                engine.past.forget()
            files = AnswerFiles(self.paths.answers)
            self.recorder.purge(peer, wish, lambda row: purge_matches(wish, row), files)

        if engine is None:
            forget()
        else:
            self.worker.call(forget)

    def _status(self) -> InferenceStatus:
        worker = self.worker
        recent = list(worker.recent)
        drafted = sum(item[0] for item in recent)
        return InferenceStatus(
            state=self._state(),
            uptime_s=round(time.monotonic() - self.started, 1),
            queue=QueueStatus(len(worker.waiting), len(worker.active)),
            outbox=OutboxStatus(self.outbox.pending, 0, self.recorder.refused, self.recorder.trouble),
            served=worker.served,
            rolling_acceptance=round(sum(item[1] for item in recent) / drafted, 4) if drafted else None,
            rolling_tokens_per_second=round(sum(item[2] for item in recent) / len(recent), 2) if recent else None,
            adapter=self._adapter_status(),
            models=self._models_status(),
            blas=BlasStatus(blas.BOUND.name, blas.BOUND.fast),
            malformed=self.server.malformed,
        )

    def _state(self) -> DaemonState:
        worker = self.worker
        if worker.engine is None and not worker.unloaded:
            return DaemonState.STARTING
        return DaemonState.BUSY if worker.busy else DaemonState.READY

    def _adapter_status(self) -> AdapterStatus:
        swap, engine, watch = self.worker.swap, self.worker.engine, self.worker.monitor.status()
        return AdapterStatus(
            active=swap.active if swap else "",
            previous=swap.previous if swap else "",
            form=engine.adapter_form if engine else "",
            rejected=dict(swap.rejected) if swap else {},
            watch=WatchStatus(**watch) if watch else None,
        )

    def _models_status(self) -> ModelsStatus:
        engine = self.worker.engine
        if engine is None:
            return ModelsStatus(self.settings.models.target.name, self.settings.models.draft.name, loaded=False)
        return ModelsStatus(engine.target.name, engine.draft.name if engine.draft else None, loaded=True)


def text_size(ask: Ask) -> int:
    """Characters of a request's text, whatever it is nested in."""
    size, pending = len(ask.prompt) + sum(len(stop) for stop in ask.stop), list(ask.messages)
    while pending:
        item: Any = pending.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item
    return size
