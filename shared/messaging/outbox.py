"""Records that a producer has accepted and the collector has not yet committed. One SQLite file a producer; survives kill -9.

The promise: a record is *accepted* when `append` returns, and stays until its id comes back as done. Order is that of
acceptance. A disk that refuses now is asked again with the next record, so nothing needs a restart. Knows nothing of
sockets and never opens a record's bytes, save to purge.
"""

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from specl.shared.errors import OutboxFull
from specl.shared.messaging.messages import FETCH_BYTES, FETCH_LIMIT, Envelope, Fetch, RecordBatch
from specl.shared.runtime import log
from specl.shared.runtime.failpoints import failpoint

_log = log.get("outbox")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (
  n INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL
)
"""


class Outbox:
    """The file at `path`, made where it is missing. Safe to use from several threads of one process.

    Making one never fails: where the file cannot be opened (a full or read-only disk), `problem` says why and every use
    tries again.
    """

    def __init__(self, path: Path, limit_bytes: int = 1024**3, lock_timeout_s: float = 5.0) -> None:
        self.path = path
        self.limit_bytes = limit_bytes
        self._lock_timeout_s = lock_timeout_s  # another process may read the file
        self.problem = ""
        self._lock = threading.Lock()
        self._opened: sqlite3.Connection | None = None
        self._bytes = self._count = 0
        with suppress(OutboxFull), self._use():
            pass

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch(mode=0o600)
        db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=self._lock_timeout_s)
        try:
            # FULL: `append` returns after the commit is on disk; secure_delete: a purged text leaves no free pages
            # temp_store: a sort writes texts nowhere else
            for pragma in (
                "journal_mode=WAL",
                "synchronous=FULL",
                "fullfsync=ON",
                "secure_delete=ON",
                "temp_store=MEMORY",
            ):
                db.execute(f"PRAGMA {pragma}")
            db.execute(_SCHEMA)
            sums = "SELECT coalesce(sum(length(body)), 0), count(*) FROM outbox"
            self._bytes, self._count = db.execute(sums).fetchone()
        except sqlite3.Error:
            db.close()
            raise
        return db

    @contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        """The open file, for one thread at a time. Raises OutboxFull for whatever SQLite or the disk refuses."""
        with self._lock:
            try:
                if self._opened is None:
                    self._opened = self._open()
                yield self._opened
            except (sqlite3.Error, OSError) as error:
                if self._opened is not None and self._opened.in_transaction:
                    with suppress(sqlite3.Error):  # SQLite has rolled back by itself after some errors
                        self._opened.execute("ROLLBACK")
                self.problem = f"the outbox {self.path}: {error}"
                raise OutboxFull(self.problem, "free some disk; recording goes on by itself") from error
            self.problem = ""

    def append(self, id: str, kind: str, body: bytes) -> None:
        """Accept a record. Raises OutboxFull, with nothing changed, at the size cap or where the disk refuses."""
        with self._use() as db:
            if self._bytes + len(body) > self.limit_bytes:
                raise OutboxFull(f"the outbox holds {self._bytes >> 20} MiB; its limit is {self.limit_bytes >> 20} MiB")
            failpoint("outbox.before_commit")
            try:
                db.execute("INSERT INTO outbox (id, kind, body) VALUES (?, ?, ?)", (id, kind, body))
            except sqlite3.IntegrityError:
                return  # the same record twice is that record once
            self._bytes += len(body)
            self._count += 1
            failpoint("outbox.after_commit")

    def discard(self, ids: Iterable[str]) -> None:
        """Remove what the collector has committed. Raises OutboxFull, with nothing changed, where the disk refuses."""
        ids = list(ids)
        if not ids:
            return
        with self._use() as db:
            failpoint("outbox.before_delete")
            db.execute("BEGIN IMMEDIATE")
            removed_bytes = removed = 0
            for id in ids:
                for (size,) in db.execute("DELETE FROM outbox WHERE id = ? RETURNING length(body)", (id,)).fetchall():
                    removed_bytes, removed = removed_bytes + size, removed + 1
            db.execute("COMMIT")
            self._bytes, self._count = self._bytes - removed_bytes, self._count - removed
            failpoint("outbox.after_delete")

    def oldest(self, limit: int = FETCH_LIMIT, max_bytes: int = FETCH_BYTES) -> list[Envelope]:
        """The oldest records, at most `limit` of them and `max_bytes` together (one always fits). Raises OutboxFull
        where the disk cannot be read.
        """
        rows: list[Envelope] = []
        size = 0
        with self._use() as db:
            cursor = db.execute(
                "SELECT id, kind, body FROM outbox ORDER BY n LIMIT ?", (max(0, min(limit, FETCH_LIMIT)),)
            )
            for id, kind, body in cursor:
                size += len(body)
                if rows and size > max_bytes:
                    break
                rows.append(Envelope(id, kind, body))
        return rows

    def answer(self, fetch: Fetch) -> RecordBatch:
        """Remove what the fetch acknowledges; the oldest others as a batch.

        Where the disk refuses, `problem` says so and the batch is empty: nothing is lost, but the same rows, sent again at once,
        would go round and round.
        """
        try:
            self.discard(fetch.done)
            rows = self.oldest(fetch.limit)
        except OutboxFull as error:
            _log.error("fetch.refused", reason=str(error))
            return RecordBatch([], self.pending)
        return RecordBatch(rows, self.pending - len(rows))

    @property
    def pending(self) -> int:
        """Records that are not acknowledged yet."""
        return self._count

    @property
    def bytes(self) -> int:
        """The size of all records."""
        return self._bytes

    def matching(self, matches: Callable[[Envelope], bool]) -> list[str]:
        """Ids of the records for which `matches` is true."""
        with self._use() as db:
            rows = db.execute("SELECT id, kind, body FROM outbox ORDER BY n")
            return [row.id for row in (Envelope(*values) for values in rows) if matches(row)]

    def purge(self, ids: Iterable[str]) -> None:
        """Remove these records, delivered or not, from the file and its write-ahead log. Raises OutboxFull where the disk refuses."""
        self.discard(ids)
        with self._use() as db:
            (busy, _, _) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise sqlite3.OperationalError("another program reads it; the write-ahead log could not be emptied")

    def close(self) -> None:
        """Close the file; nothing is lost by not calling this."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
