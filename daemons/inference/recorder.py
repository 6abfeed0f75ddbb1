"""Owns the outbox and the spool, on a thread of its own: neither a token nor another request ever waits for a disk.

`recorded: true` is said only after the outbox has committed. Where it cannot, the answer stands all the same and says why.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from specl.shared.engine.answer_history import PastAnswer
from specl.shared.errors import OutboxFull, WireError
from specl.shared.messaging.codec import encode, kind_of
from specl.shared.messaging.messages import Done, Fetch, Generation, Purge, Record, RecordBatch, Reply
from specl.shared.messaging.outbox import Outbox
from specl.shared.retention.answer_files import AnswerFiles
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.retention.redaction import Redactor
from specl.shared.runtime import log
from specl.shared.runtime.failpoints import failpoint

_log = log.get("recorder")
_STOP = object()
Emit = Callable[[bytes | None, Any], None]


class Recorder(threading.Thread):
    """`announce(id)` is called after each commit, `answer(peer, message)` when a message may go out."""

    def __init__(
        self, outbox: Outbox, spool: HiddenSpool, discretion: Redactor, announce: Callable[[str], None], answer: Emit
    ) -> None:
        super().__init__(name="recorder", daemon=True)
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outbox, self._spool, self._discretion = outbox, spool, discretion
        self._announce, self._answer = announce, answer
        self.refused = 0
        self.trouble = outbox.trouble
        self.failure: BaseException | None = None  # set when the thread cannot go on

    # ------------------------------------------------------------------------------------- called from other threads
    def finish(self, peer: bytes, done: Done, record: Record | None, states: np.ndarray | None) -> None:
        """Record, then answer. Without a record the answer goes out as it is."""
        self._queue.put(lambda: self._finish(peer, done, record, states))

    def fact(self, record: Record) -> None:
        """Record something that nobody waits for."""
        self._queue.put(lambda: self._record(record, None))

    def keeps_whole(self, record: Generation) -> bool:
        """Whether all of it may be kept: its text, and with it its tokens."""
        return self._discretion.apply(record).whole

    def write_answers(self, files: AnswerFiles, client_id: str, answers: Sequence[PastAnswer]) -> None:
        """Write a client's past answers, which draft its next ones."""

        def write() -> None:
            try:
                files.write(client_id, answers)
            except OSError as error:
                _log.warning("answers.not_kept", reason=str(error))

        self._queue.put(write)

    def expire_answers(self, files: AnswerFiles, before: float) -> None:
        """Remove past answers that were generated before a moment from the disk."""

        def remove() -> None:
            try:
                files.expire(before)
            except OSError as error:
                _log.warning("answers.not_expired", reason=str(error))

        self._queue.put(remove)

    def fetch(self, peer: bytes, fetch: Fetch) -> None:
        """Let go of what is done and answer with the oldest records."""
        self._queue.put(lambda: self._answer(peer, self._batch(fetch)))

    def purge(self, peer: bytes, wish: Purge, matching: Callable[[Any], bool], files: AnswerFiles) -> None:
        """Forget records, states and past answers, then answer with the ids that were here."""
        self._queue.put(lambda: self._answer(peer, self._purge(wish, matching, files)))

    def stop(self) -> None:
        """Commit what is queued, then end."""
        self._queue.put(_STOP)
        self.join(timeout=1.5)

    # ------------------------------------------------------------------------------------------------ the thread
    def run(self) -> None:
        """The thread's body."""
        try:
            while (action := self._queue.get()) is not _STOP:
                action()
        except BaseException as error:
            self.failure = error

    def _finish(self, peer: bytes, done: Done, record: Record | None, states: np.ndarray | None) -> None:
        if record is not None:
            note = self._record(record, states)
            done = replace(done, recorded=not note, record_note=note)
        failpoint("record.before_done")
        self._answer(peer, done)

    def _record(self, record: Record, states: np.ndarray | None) -> str:
        """Why it was not recorded; empty where it was."""
        if isinstance(record, Generation):
            redaction = self._discretion.apply(record)
            record, states = redaction.record, states if redaction.whole else None
        try:
            self._outbox.append(record.id, kind_of(record), encode(record))
        except (OutboxFull, WireError) as error:
            self.refused += 1
            self.trouble = str(error)
            if self.refused & (self.refused - 1) == 0:  # 1st, 2nd, 4th, 8th ...
                _log.error("record.refused", reason=str(error), refused=self.refused)
            return str(error)
        self.trouble = ""
        self._announce(record.id)
        if states is not None:
            try:
                self._spool.write(record.id, states)
            except OSError as error:
                _log.warning("hidden.not_spooled", reason=str(error))
        return ""

    def _batch(self, fetch: Fetch) -> RecordBatch:
        try:
            self._outbox.discard(fetch.done)
            rows = self._outbox.oldest(fetch.limit)
        except OutboxFull as error:
            # nothing is lost: they stay, and are offered again once the disk lets go of them. Not at once, or the same
            # rows would go round and round
            self.trouble = str(error)
            _log.error("outbox.trouble", reason=str(error))
            return RecordBatch([], self._outbox.pending)
        return RecordBatch(rows, self._outbox.pending - len(rows))

    def _purge(self, wish: Purge, matching: Callable[[Any], bool], files: AnswerFiles) -> Reply:
        try:
            files.purge()  # behind what was queued to be written
            ids = list({*wish.ids, *self._outbox.matching(matching)})
            self._outbox.purge(ids)
            self._spool.purge(ids)
        except (OutboxFull, OSError) as error:
            return Reply(False, str(error))
        return Reply(True, "outbox, hidden states, past answers and prefix cache forgot them", ids=ids)
