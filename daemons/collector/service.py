"""Fetches records from producers, commits them, acknowledges them. One exchange is in flight with
each producer; a publication is only a reason to ask at once.

Knows producers as endpoints and records as rows; what a record holds is the store's business.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from specl.daemons.collector.expiry import Expiry
from specl.daemons.collector.summary import SummaryCache
from specl.shared.errors import StoreError, StoreTooNew
from specl.shared.messaging.bus import Server
from specl.shared.messaging.codes import DaemonState
from specl.shared.messaging.daemon_status import CollectorStatus, ProducerStatus
from specl.shared.messaging.endpoints import Addresses
from specl.shared.messaging.messages import (
    FETCH_LIMIT,
    Fetch,
    GetStatus,
    Import,
    Purge,
    RecordBatch,
    RecordReady,
    Reply,
)
from specl.shared.paths import PRODUCERS, Paths
from specl.shared.retention.chat_history import history_file
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.runtime import log
from specl.shared.runtime.failpoints import failpoint
from specl.shared.runtime.signals import StopFlag
from specl.shared.settings.schema import Settings
from specl.shared.store import Store

POLL_S = 1.0
REPLY_TIMEOUT_S = 2.0  # after this a fetch is sent again
BACK_OFF_S = (1, 2, 4, 8)  # pauses while the store refuses: trying costs little
_log = log.get("collector")


@dataclass(slots=True)
class Producer:
    """The exchange with one producer. `acknowledged` are ids that are committed and not yet
    reported; `remaining`: records that it still has; `asked_at` is None while no fetch is in flight. Times are those of `time.monotonic`.
    """

    name: str
    send: Callable[[Any], None]
    acknowledged: list[str] = field(default_factory=list)
    asked_at: float | None = None
    next_at: float = 0.0
    heard_at: float = 0.0
    remaining: int = 0

    @property
    def due_at(self) -> float:
        """When to send the next fetch."""
        return self.next_at if self.asked_at is None else self.asked_at + REPLY_TIMEOUT_S


class Collector:
    """The daemon's whole state; `run` is its loop."""

    def __init__(self, paths: Paths, settings: Settings, server: Server, open_store: Callable[[], Store]) -> None:
        self.paths, self.settings, self.server = paths, settings, server
        self._open_store = open_store
        self._store: Store | None = None
        self.started = time.monotonic()
        self.stored = 0
        self.problem = ""
        self._refusals = 0  # of the store, one after another
        self.summary = SummaryCache(lambda: self.store.summary())
        spool = HiddenSpool(paths.hidden, settings.records.hidden_spool_mb << 20)
        self.expiry = Expiry(settings.records, spool, history_file(paths))
        addresses = Addresses(paths, settings.bus)
        self.producers = [self._producer(name, addresses) for name in PRODUCERS]

    @property
    def store(self) -> Store:
        """The store, opened when first needed and again after it could not be. Raises StoreError."""
        if self._store is None:
            store = self._open_store()
            store.set_threshold(self.settings.speculative.acceptance_threshold)
            self._store = store
        return self._store

    def _producer(self, name: str, addresses: Addresses) -> Producer:
        producer = Producer(name, lambda message: None)
        producer.send = self.server.requester(addresses.answer(name), lambda message: self.receive(producer, message))
        self.server.subscribe(addresses.publish(name), lambda message: self._notice(producer, message))
        return producer

    # ------------------------------------------------------------------------------ the loop
    def run(self, stop: StopFlag) -> None:
        """Serve until stopped. Raises StoreTooNew; every other failure of the store is waited
        out.
        """
        try:
            self.open()
            while not stop:
                self.step()
        finally:
            self.close()

    def open(self) -> None:
        """Open the store now, so that a store of a newer program ends the daemon at once."""
        try:
            _ = self.store  # opening may upgrade it: that is not what figures cost
            self.summary.make()
        except StoreTooNew:
            raise
        except StoreError as error:
            self._back_off(error, 0)

    def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            self._store.close()

    def step(self) -> None:
        """Send the fetches that are due, then handle what arrives until the next thing is due."""
        now = time.monotonic()
        if now >= self.expiry.due_at and self.expiry.run(lambda: self.store, now):
            self.summary.invalidate()
        for producer in self.producers:
            if now >= producer.due_at:
                failpoint("fetch.before_request")
                producer.asked_at = now
                producer.send(Fetch(done=producer.acknowledged, limit=FETCH_LIMIT))
        due = min(producer.due_at for producer in self.producers)
        # a store that refuses is left alone
        summary_due = None if self._refusals else self.summary.due_at
        if summary_due is not None:
            due = min(due, summary_due)
        self.server.poll(min(POLL_S, max(0.0, due - time.monotonic())), self.handle)
        if summary_due is not None and time.monotonic() >= summary_due:
            self.summary.refresh()

    # ------------------------------------------------------------------------------ producers
    def _notice(self, producer: Producer, message: Any) -> None:
        """A publication: ask at once."""
        if isinstance(message, RecordReady) and producer.asked_at is None and not self._refusals:
            producer.next_at = 0.0

    def receive(self, producer: Producer, message: Any) -> None:
        """Commit a batch of records; only then do their ids travel back as acknowledged."""
        if not isinstance(message, RecordBatch):
            return
        failpoint("fetch.after_reply")
        now = time.monotonic()
        producer.asked_at, producer.heard_at, producer.remaining = None, now, message.left
        producer.acknowledged = []
        if not message.rows:
            producer.next_at = now + POLL_S
            return
        try:
            producer.acknowledged = self.store.add_rows(message.rows)
        except StoreError as error:
            producer.next_at = now + self._back_off(error, len(message.rows))
            return
        if self._refusals:
            _log.info("store.recovered", after_failures=self._refusals)
        self._refusals, self.problem = 0, ""
        self.stored += len(message.rows)
        self.summary.invalidate()
        producer.next_at = 0.0  # acknowledge at once, and see what else there is
        _log.debug("records.stored", producer=producer.name, rows=len(message.rows), left=message.left)

    def _back_off(self, error: StoreError, rows: int) -> int:
        """Log that the store refuses; for how many seconds to leave it alone."""
        pause = BACK_OFF_S[min(self._refusals, len(BACK_OFF_S) - 1)]
        self._refusals += 1
        self.problem = str(error)
        _log.error("store.refused", error=str(error), rows=rows, again_in_s=pause)
        return pause

    # ------------------------------------------------------------------------------ requests
    def handle(self, peer: bytes, message: Any) -> None:
        """Answer a request."""
        if isinstance(message, GetStatus):
            self.server.send(peer, self.status())
        elif isinstance(message, Purge):
            self.server.send(peer, self._purge(message))
        elif isinstance(message, Import):
            self.server.send(peer, self._import(message))
        elif not isinstance(message, Reply):
            self.server.send(peer, Reply(False, "the collector does not know this request"))

    def _import(self, message: Import) -> Reply:
        try:
            ids = self.store.add_rows(message.rows)
        except StoreError as error:
            return Reply(False, str(error))
        self.summary.invalidate()
        return Reply(True, f"{len(ids)} records stored")

    def _purge(self, message: Purge) -> Reply:
        try:
            ids = self.store.matching(message.ids, message.before, message.pattern)
            removed = self.store.purge(ids)
        except StoreError as error:
            return Reply(False, str(error))
        self.summary.invalidate()
        _log.info("store.purged", generations=removed)
        return Reply(True, f"{removed} generations removed from the store", ids=ids)

    def status(self) -> CollectorStatus:
        """How the collector is, at once, however long the store's figures take to make."""
        now = time.monotonic()
        self.summary.refresh_if_cheap()
        problem = self.problem or self.summary.error
        return CollectorStatus(
            state=DaemonState.FAILED if problem else DaemonState.READY,
            uptime_s=round(now - self.started, 1),
            stored=self.stored,
            trouble=problem,
            malformed=self.server.malformed,
            producers={
                producer.name: ProducerStatus(_age_s(producer.heard_at, now), producer.remaining)
                for producer in self.producers
            },
            summary=self.summary.summary,
        )


def _age_s(timestamp: float, now: float) -> float | None:
    return round(now - timestamp, 1) if timestamp else None
