"""Fetch, commit, acknowledge. One exchange in flight with each producer; a publication is only a reason to ask at once.

Knows producers as endpoints and records as rows; what is inside a record is the store's business.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from specl.shared import log
from specl.shared.bus import Server
from specl.shared.config import Settings
from specl.shared.crash import crash_point
from specl.shared.errors import StoreError
from specl.shared.paths import Paths
from specl.shared.process import StopFlag
from specl.shared.store import Store
from specl.shared.wire import FETCH_LIMIT, Batch, Fetch, GetStatus, Import, Purge, RecordReady, Reply, Status

PRODUCERS = ("inference", "trainer")
TICK_S = 1.0
ANSWER_S = 2.0  # after this a fetch is asked again
BACK_OFF_S = (1, 2, 4, 8, 16, 32)
SUMMARY_S = 1.0
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

    def __init__(self, paths: Paths, settings: Settings, server: Server, store: Store) -> None:
        self.paths, self.settings, self.server, self.store = paths, settings, server, store
        self.started = time.monotonic()
        self.stored = 0
        self.trouble = ""
        self._failures = 0
        self._summary: dict[str, Any] = {}
        self._summary_at = 0.0
        store.set_threshold(settings.speculative.acceptance_threshold)
        self.lines = [self._line(name) for name in PRODUCERS]

    def _line(self, name: str) -> Line:
        line = Line(name, lambda message: None)
        line.send = self.server.asker(self.paths.socket(name), lambda message: self._arrived(line, message))
        self.server.subscribe(self.paths.socket(f"{name}-pub"), lambda message: self._hint(line, message))
        return line

    def run(self, stop: StopFlag) -> None:
        """Serve until stopped."""
        while not stop:
            now = time.monotonic()
            for line in self.lines:
                self._ask(line, now)
            due = min(self._due(line) for line in self.lines)
            self.server.poll(min(TICK_S, max(0.0, due - time.monotonic())), self._request)

    def _due(self, line: Line) -> float:
        return line.asked_at + ANSWER_S if line.asked_at is not None else line.next_at

    def _ask(self, line: Line, now: float) -> None:
        if now < self._due(line):
            return
        crash_point("fetch.before_request")
        line.asked_at = now
        line.send(Fetch(done=line.done, limit=FETCH_LIMIT))

    def _hint(self, line: Line, message: Any) -> None:
        if isinstance(message, RecordReady) and line.asked_at is None and not self._failures:
            line.next_at = 0.0

    def _arrived(self, line: Line, message: Any) -> None:
        """A batch: commit it; only then do its ids travel back as done."""
        if not isinstance(message, Batch):
            return
        crash_point("fetch.after_reply")
        now = time.monotonic()
        line.asked_at, line.heard_at, line.left = None, now, message.left
        line.done = []
        if not message.rows:
            line.next_at = now + TICK_S
            return
        try:
            line.done = self.store.add_rows(message.rows)
        except StoreError as error:
            pause = BACK_OFF_S[min(self._failures, len(BACK_OFF_S) - 1)]
            self._failures += 1
            self.trouble = str(error)
            line.next_at = now + pause
            _log.error("store.refused", error=str(error), rows=len(message.rows), again_in_s=pause)
            return
        if self._failures:
            _log.info("store.recovered", after_failures=self._failures)
        self._failures, self.trouble = 0, ""
        self.stored += len(message.rows)
        self._summary_at = 0.0
        line.next_at = 0.0  # acknowledge at once, and see what else there is
        _log.debug("records.stored", producer=line.name, rows=len(message.rows), left=message.left)

    def _request(self, peer: bytes, message: Any) -> None:
        if isinstance(message, GetStatus):
            self.server.send(peer, Status("collector", self._status()))
        elif isinstance(message, Purge):
            self.server.send(peer, self._purge(message))
        elif isinstance(message, Import):
            try:
                done = self.store.add_rows(message.rows)
                self.server.send(peer, Reply(True, f"{len(done)} records stored"))
            except StoreError as error:
                self.server.send(peer, Reply(False, str(error)))

    def _purge(self, message: Purge) -> Reply:
        try:
            ids = self.store.matching(message.ids, message.before, message.pattern)
            removed = self.store.purge(ids)
        except StoreError as error:
            return Reply(False, str(error))
        self._summary_at = 0.0
        _log.info("store.purged", generations=removed)
        return Reply(True, f"{removed} generations removed from the store", {"ids": ids})

    def _status(self) -> dict[str, Any]:
        now = time.monotonic()
        if now - self._summary_at > SUMMARY_S:
            try:
                self._summary, self._summary_at = asdict(self.store.summary()), now
            except StoreError as error:
                self.trouble = str(error)
        return {
            "state": "ready" if not self.trouble else "failed",
            "uptime_s": round(now - self.started, 1),
            "stored": self.stored,
            "trouble": self.trouble,
            "malformed": self.server.malformed,
            "producers": {
                line.name: {"heard_s_ago": round(now - line.heard_at, 1) if line.heard_at else None, "left": line.left}
                for line in self.lines
            },
            "summary": self._summary,
        }
