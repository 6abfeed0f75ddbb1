"""The trainer's records on their way into its outbox. A record that the outbox refuses waits in
this queue and is offered again.

Inference drops a refused record, because the next request is more important; the trainer has few,
and each took minutes to make. They wait in memory, oldest first, and are lost only with the
process. Safe to use from both of the trainer's threads.
"""

import threading
from collections import deque
from collections.abc import Callable

from specl.shared.errors import OutboxFull, WireError
from specl.shared.messaging.codec import encode, kind_of
from specl.shared.messaging.daemon_status import OutboxStatus
from specl.shared.messaging.messages import Envelope, Record
from specl.shared.messaging.outbox import Outbox
from specl.shared.runtime import log

MAX_WAITING = 1000
_log = log.get("trainer")


class RecordQueue:
    """`announce(id)` is called after each commit."""

    def __init__(self, outbox: Outbox, announce: Callable[[str], None]) -> None:
        self._outbox, self._announce = outbox, announce
        self._waiting: deque[tuple[str, str, bytes]] = deque()
        self._lock = threading.Lock()
        self.refused = 0
        self.problem = outbox.problem

    @property
    def waiting(self) -> int:
        """Records that the outbox has refused so far."""
        return len(self._waiting)

    @property
    def undelivered(self) -> int:
        """Records that the collector has not confirmed yet."""
        return self.waiting + self._outbox.pending

    def add(self, record: Record) -> None:
        """Append a record behind those that wait. One that cannot be encoded is refused for good."""
        try:
            item = (record.id, kind_of(record), encode(record))
        except WireError as error:
            self.refused += 1
            self.problem = str(error)
            _log.error("record.refused", kind=kind_of(record), reason=str(error))
            return
        with self._lock:
            before = len(self._waiting)
            self._waiting.append(item)
            self._offer()
            if len(self._waiting) > before:
                self.refused += 1
                _log.error("record.refused", kind=item[1], reason=self.problem, waiting=len(self._waiting))
            while len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()

    def offer(self) -> None:
        """Offer waiting records to the outbox again."""
        with self._lock:
            if self._waiting:
                self._offer()

    def _offer(self) -> None:
        while self._waiting:
            id, kind, body = self._waiting[0]
            try:
                self._outbox.append(id, kind, body)
            except OutboxFull as error:
                self.problem = str(error)
                return
            self._waiting.popleft()
            self._announce(id)
        self.problem = ""

    def purge(self, matches: Callable[[Envelope], bool]) -> list[str]:
        """Remove waiting records that match; their ids."""
        with self._lock:
            removed = [item[0] for item in self._waiting if matches(Envelope(*item))]
            self._waiting = deque(item for item in self._waiting if item[0] not in removed)
        return removed

    def status(self) -> OutboxStatus:
        """The outbox's part of the daemon's status."""
        problem = self.problem or self._outbox.problem
        return OutboxStatus(self._outbox.pending, self.waiting, self.refused, problem)
