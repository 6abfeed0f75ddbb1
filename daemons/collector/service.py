"""Fetch, commit, acknowledge. One exchange in flight with each producer; a publication is only a reason to ask at once.

Knows producers as endpoints and records as rows; what is inside a record is the store's business.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from specl.shared.errors import StoreError, StoreTooNew
from specl.shared.messaging.bus import Server
from specl.shared.messaging.codes import DaemonState
from specl.shared.messaging.daemon_status import CollectorStatus, ProducerStatus, StoreSummary
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
from specl.shared.paths import Paths
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.runtime import log
from specl.shared.runtime.failpoints import failpoint
from specl.shared.runtime.signals import StopFlag
from specl.shared.settings.schema import Settings
from specl.shared.store import Store

PRODUCERS = ("inference", "trainer")
TICK_S = 1.0
ANSWER_S = 2.0  # after this a fetch is asked again
BACK_OFF_S = (1, 2, 4, 8)  # of a store that refuses: trying costs little
SUMMARY_S = 1.0  # figures for `status` are no older, where they are cheap
SUMMARY_SHARE = 30  # making them takes at most one part in so many of the time: it is done between commits
CHEAP_S = 0.15  # figures that take no longer are made for whoever asks; the others' are the last that were made
TIDY_S = 300.0
TIDY_ROWS = 500  # removed at once: some tens of milliseconds
_log = log.get("collector")


@dataclass(slots=True)
class Line:
    """The exchange with one producer."""

    name: str
    send: Callable[[Any], None]
    done: list[str] = field(default_factory=list)
    asked_at: float | None = None
    next_at: float = 0.0
    heard_at: float = 0.0
    left: int = 0


class Collector:
    """The daemon's whole state; `run` is its loop."""

    def __init__(self, paths: Paths, settings: Settings, server: Server, open_store: Callable[[], Store]) -> None:
        self.paths, self.settings, self.server, self._open_store = paths, settings, server, open_store
        self._store: Store | None = None
        self._tidy_at = 0.0
        self._log_full = False  # rows are removed, but somebody read, and their bytes are still in the write-ahead log
        self.started = time.monotonic()
        self.stored = 0
        self.trouble = self._unreadable = ""
        self._failures = 0
        self._summary: StoreSummary | None = None
        self._summary_at = self._summary_due = 0.0  # made when, and made anew not before
        self._summary_took = 0.0
        self._summary_stale = True
        addresses = Addresses(paths, settings.bus)
        self.lines = [self._line(name, addresses) for name in PRODUCERS]

    @property
    def store(self) -> Store:
        """The store, opened when first needed and again after it could not be. Raises StoreError."""
        if self._store is None:
            store = self._open_store()
            store.set_threshold(self.settings.speculative.acceptance_threshold)
            self._store = store
        return self._store

    def _line(self, name: str, addresses: Addresses) -> Line:
        line = Line(name, lambda message: None)
        line.send = self.server.requester(addresses.answer(name), lambda message: self._arrived(line, message))
        self.server.subscribe(addresses.publish(name), lambda message: self._hint(line, message))
        return line

    def run(self, stop: StopFlag) -> None:
        """Serve until stopped. Raises StoreTooNew; every other trouble with the store is waited out."""
        try:
            self._look()
            while not stop:
                self._turn()
        finally:
            if self._store is not None:
                self._store.close()

    def _look(self) -> None:
        """Open the store now, so that whoever may not use it hears so at once."""
        try:
            self._summarise()
        except StoreTooNew:
            raise
        except StoreError as error:
            self._refused(error, 0)

    def _summarise(self) -> None:
        """Make the figures for `status` anew. Raises StoreError."""
        start = time.monotonic()
        self._summary_due = start + SUMMARY_S
        self._summary = self.store.summary()
        self._summary_at = time.monotonic()
        self._summary_took = self._summary_at - start
        self._summary_due = self._summary_at + SUMMARY_SHARE * self._summary_took
        self._summary_stale, self._unreadable = False, ""

    def _refresh(self) -> None:
        try:
            self._summarise()
        except StoreError as error:
            self._unreadable = str(error)

    def _turn(self) -> None:
        """Ask who is due, then take what arrives."""
        now = time.monotonic()
        if now >= self._tidy_at:
            self._tidy_at = now + TIDY_S
            self._tidy()
        for line in self.lines:
            self._ask(line, now)
        due = min(self._due(line) for line in self.lines)
        stale = self._summary_stale and not self._failures  # a store that refuses is left alone
        if stale:
            due = min(due, self._summary_due)
        self.server.poll(min(TICK_S, max(0.0, due - time.monotonic())), self._request)
        if stale and time.monotonic() >= self._summary_due:
            self._refresh()

    def _tidy(self) -> None:
        """Let go of what is older, or more, than the settings keep. A little at a time: producers are waiting."""
        records = self.settings.records
        try:
            self.store.drop_backups(records.retention_days, time.time())
            old = self.store.expired(records.retention_days, records.max_generations, records.max_store_mb, time.time())
            if not old and not self._log_full:
                return
            part = old[:TIDY_ROWS]
            # what goes by id goes first: a row that stays is found again, an id that is gone is not
            HiddenSpool(self.paths.hidden, records.hidden_spool_mb << 20).purge(part)
            self._log_full = True
            self.store.purge(part)
            self._log_full = False
        except (StoreError, OSError) as error:
            _log.warning("retention.postponed", reason=str(error))
            return
        self._summary_stale = True
        if len(part) < len(old):
            self._tidy_at = 0.0
        _log.info("retention.removed", generations=len(part), left=len(old) - len(part))

    def _due(self, line: Line) -> float:
        return line.asked_at + ANSWER_S if line.asked_at is not None else line.next_at

    def _ask(self, line: Line, now: float) -> None:
        if now < self._due(line):
            return
        failpoint("fetch.before_request")
        line.asked_at = now
        line.send(Fetch(done=line.done, limit=FETCH_LIMIT))

    def _hint(self, line: Line, message: Any) -> None:
        if isinstance(message, RecordReady) and line.asked_at is None and not self._failures:
            line.next_at = 0.0

    def _arrived(self, line: Line, message: Any) -> None:
        """A batch: commit it; only then do its ids travel back as done."""
        if not isinstance(message, RecordBatch):
            return
        failpoint("fetch.after_reply")
        now = time.monotonic()
        line.asked_at, line.heard_at, line.left = None, now, message.left
        line.done = []
        if not message.rows:
            line.next_at = now + TICK_S
            return
        try:
            line.done = self.store.add_rows(message.rows)
        except StoreError as error:
            line.next_at = now + self._refused(error, len(message.rows))
            return
        if self._failures:
            _log.info("store.recovered", after_failures=self._failures)
        self._failures, self.trouble = 0, ""
        self.stored += len(message.rows)
        self._summary_stale = True
        line.next_at = 0.0  # acknowledge at once, and see what else there is
        _log.debug("records.stored", producer=line.name, rows=len(message.rows), left=message.left)

    def _refused(self, error: StoreError, rows: int) -> int:
        """Say so, and for how many seconds to leave the store alone."""
        pause = BACK_OFF_S[min(self._failures, len(BACK_OFF_S) - 1)]
        self._failures += 1
        self.trouble = str(error)
        _log.error("store.refused", error=str(error), rows=rows, again_in_s=pause)
        return pause

    def _request(self, peer: bytes, message: Any) -> None:
        if isinstance(message, GetStatus):
            self.server.send(peer, self._status())
        elif isinstance(message, Purge):
            self.server.send(peer, self._purge(message))
        elif isinstance(message, Import):
            try:
                done = self.store.add_rows(message.rows)
                self.server.send(peer, Reply(True, f"{len(done)} records stored"))
            except StoreError as error:
                self.server.send(peer, Reply(False, str(error)))
        elif not isinstance(message, Reply):
            self.server.send(peer, Reply(False, "the collector does not know this request"))

    def _purge(self, message: Purge) -> Reply:
        try:
            ids = self.store.matching(message.ids, message.before, message.pattern)
            removed = self.store.purge(ids)
        except StoreError as error:
            return Reply(False, str(error))
        self._summary_stale = True
        _log.info("store.purged", generations=removed)
        return Reply(True, f"{removed} generations removed from the store", ids=ids)

    def _status(self) -> CollectorStatus:
        """How it is, at once, however long figures take to make."""
        now = time.monotonic()
        if self._summary_took < CHEAP_S and (self._summary_stale or now - self._summary_at > SUMMARY_S):
            self._refresh()
        trouble = self.trouble or self._unreadable
        return CollectorStatus(
            state=DaemonState.FAILED if trouble else DaemonState.READY,
            uptime_s=round(now - self.started, 1),
            stored=self.stored,
            trouble=trouble,
            malformed=self.server.malformed,
            producers={line.name: ProducerStatus(_seconds_since(line.heard_at, now), line.left) for line in self.lines},
            summary=self._summary,
        )


def _seconds_since(moment: float, now: float) -> float | None:
    return round(now - moment, 1) if moment else None
