"""Owns the outbox and the hidden-state spool, on a thread of its own: no token and no other request
waits for a disk.

Redaction happens here and nowhere else. `recorded: true` is sent only after the outbox has
committed; where it cannot, the answer is sent all the same and says why it was not recorded.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from specl.daemons.inference.outgoing import Emit
from specl.shared.engine.answer_history import PastAnswer
from specl.shared.errors import OutboxFull, WireError
from specl.shared.messaging.codec import encode, kind_of
from specl.shared.messaging.messages import (
    Done,
    Envelope,
    Fetch,
    Generation,
    Purge,
    Record,
    RecordReady,
    Reply,
)
from specl.shared.messaging.outbox import Outbox
from specl.shared.retention.answer_files import AnswerFiles
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.retention.redaction import Redactor
from specl.shared.runtime import log
from specl.shared.runtime.failpoints import failpoint

STOP_TIMEOUT_S = 1.5
_log = log.get("recorder")


class Recorder(threading.Thread):
    """`refused` counts records that the outbox did not take, `problem` is the last refusal's reason
    while it lasts.

    `failure` is set when the thread cannot go on.
    """

    def __init__(self, outbox: Outbox, spool: HiddenSpool, redactor: Redactor, emit: Emit) -> None:
        super().__init__(name="recorder", daemon=True)
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None ends the thread
        self._outbox, self._spool, self._redactor, self._emit = outbox, spool, redactor, emit
        self.refused = 0
        self.problem = outbox.problem
        self.failure: BaseException | None = None

    # ------------------------------------------------------------------------------------- called from other threads
    def finish(
        self,
        peer: bytes,
        done: Done,
        generation: Generation | None,
        states: np.ndarray | None,
        on_unredacted: Callable[[], None],
    ) -> None:
        """Record an answer, then send `done`; without a `generation` it is sent as it is.

        `on_unredacted` is called, on the recorder's thread and before `done` goes out, if redaction
        takes nothing away.
        """
        self._queue.put(lambda: self._finish(peer, done, generation, states, on_unredacted))

    def record(self, record: Record) -> None:
        """Record something that no client waits for."""

        def append() -> None:
            self._append(record)

        self._queue.put(append)

    def write_answers(self, files: AnswerFiles, client_id: str, answers: Sequence[PastAnswer]) -> None:
        """Write a client's past answers, which draft its next ones."""

        def write() -> None:
            try:
                files.write(client_id, answers)
            except OSError as error:
                _log.warning("answers.not_written", reason=str(error))

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
        """Discard the records that the collector has stored and send it the oldest others."""
        self._queue.put(lambda: self._emit(peer, self._outbox.answer(fetch)))

    def purge(
        self,
        peer: bytes,
        purge: Purge,
        matches: Callable[[Envelope], bool],
        files: AnswerFiles,
        files_purged: Callable[[], None],
    ) -> None:
        """Remove records, hidden states and past answers, then reply with the ids that were
        removed. `files_purged` is called, on the recorder's thread, once past answers are gone.
        """
        self._queue.put(lambda: self._emit(peer, self._purge(purge, matches, files, files_purged)))

    def stop(self) -> None:
        """Commit what is queued, then end."""
        self._queue.put(None)
        self.join(timeout=STOP_TIMEOUT_S)

    # ------------------------------------------------------------------------------------------------ the thread
    def run(self) -> None:
        """The thread's body."""
        try:
            while (action := self._queue.get()) is not None:
                action()
        except BaseException as error:
            self.failure = error

    def _finish(
        self,
        peer: bytes,
        done: Done,
        generation: Generation | None,
        states: np.ndarray | None,
        on_unredacted: Callable[[], None],
    ) -> None:
        if generation is not None:
            redaction = self._redactor.apply(generation)
            if redaction.timed_out:
                _log.warning("redaction.timed_out", id=generation.id, stored="statistics")
            if redaction.whole:
                on_unredacted()
            note = self._append(redaction.record)
            if states is not None and redaction.whole and not note:
                self._spool_states(generation.id, states)
            done = replace(done, recorded=not note, record_note=note)
        failpoint("record.before_done")
        self._emit(peer, done)

    def _append(self, record: Record) -> str:
        """Commit a record to the outbox; why that failed, or empty."""
        try:
            self._outbox.append(record.id, kind_of(record), encode(record))
        except (OutboxFull, WireError) as error:
            self.refused += 1
            self.problem = str(error)
            if self.refused & (self.refused - 1) == 0:  # 1st, 2nd, 4th, 8th ...
                _log.error("record.refused", reason=str(error), refused=self.refused)
            return str(error)
        self.problem = ""
        self._emit(None, RecordReady(record.id))
        return ""

    def _spool_states(self, id: str, states: np.ndarray) -> None:
        try:
            self._spool.write(id, states)
        except OSError as error:
            _log.warning("hidden_states.not_spooled", reason=str(error))

    def _purge(
        self,
        purge: Purge,
        matches: Callable[[Envelope], bool],
        files: AnswerFiles,
        files_purged: Callable[[], None],
    ) -> Reply:
        try:
            files.purge()  # after every write that was queued before
            files_purged()
            ids = list({*purge.ids, *self._outbox.matching(matches)})
            self._outbox.purge(ids)
            self._spool.purge(ids)
        except (OutboxFull, OSError) as error:
            return Reply(False, str(error))
        return Reply(True, "outbox, hidden states, past answers and prefix cache forgot them", ids=ids)
