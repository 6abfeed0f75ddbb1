"""Puts finished records into the outbox, on a thread of its own: neither a token nor another request ever waits for a disk.

`recorded: true` is said only after the outbox has committed. Where it cannot, the answer stands all the same and says why.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from specl.shared import log
from specl.shared.crash import crash_point
from specl.shared.errors import OutboxFull, WireError
from specl.shared.hidden import HiddenSpool
from specl.shared.outbox import Outbox
from specl.shared.wire import Done, Record, encode, kind_of

_log = log.get("recorder")
_STOP = object()


class Recorder(threading.Thread):
    """`announce(id)` is called after each commit, `answer(peer, done)` when a request's last message may go out."""

    def __init__(
        self, outbox: Outbox, spool: HiddenSpool, announce: Callable[[str], None], answer: Callable[[bytes, Any], None]
    ) -> None:
        super().__init__(name="recorder", daemon=True)
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outbox, self._spool, self._announce, self._answer = outbox, spool, announce, answer
        self.refused = 0
        self.last_refusal = ""

    def finish(self, peer: bytes, done: Done, record: Record | None, states: np.ndarray | None) -> None:
        """Record, then answer. Without a record the answer goes out as it is."""
        self._queue.put((peer, done, record, states))

    def fact(self, record: Record) -> None:
        """Record something that nobody waits for."""
        self._queue.put((b"", None, record, None))

    def stop(self) -> None:
        """Commit what is queued, then end."""
        self._queue.put(_STOP)
        self.join(timeout=2.0)

    def run(self) -> None:
        """The thread's body."""
        while (item := self._queue.get()) is not _STOP:
            peer, done, record, states = item
            note = self._record(record, states) if record is not None else None
            if done is None:
                continue
            crash_point("record.before_done")
            if record is not None:
                done = replace(done, recorded=not note, record_note=note or "")
            self._answer(peer, done)

    def _record(self, record: Record, states: np.ndarray | None) -> str:
        """Why it was not recorded; empty where it was."""
        try:
            self._outbox.append(record.id, kind_of(record), encode(record))
        except (OutboxFull, WireError) as error:
            self.refused += 1
            self.last_refusal = str(error)
            _log.error("record.refused", reason=str(error), refused=self.refused)
            return str(error)
        self._announce(record.id)
        if states is not None:
            try:
                self._spool.write(record.id, states)
            except OSError as error:
                _log.warning("hidden.not_spooled", reason=str(error))
        return ""
