"""What a producer has recorded and the collector has not yet committed. One SQLite file a producer; survives kill -9.

The promise: a record is *accepted* when `append` returns, and stays here until its id comes back as done. Order is that
of acceptance. Knows nothing of sockets and never opens a record's bytes, save to purge.
"""

import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path

from specl.shared.crash import crash_point
from specl.shared.errors import OutboxFull
from specl.shared.wire import FETCH_BYTES, FETCH_LIMIT, Row

_SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (
  n INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL
)
"""


class Outbox:
    """Open `path`, making it where it is missing. Safe to use from several threads of one process.

    Raises OutboxFull where the file cannot be opened (a full or read-only disk).
    """

    def __init__(self, path: Path, limit_bytes: int = 1024**3) -> None:
        self.path = path
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=5.0)
            # FULL: `append` returns after the commit is on disk; secure_delete: a purged text leaves no free pages
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "fullfsync=ON", "secure_delete=ON"):
                self._db.execute(f"PRAGMA {pragma}")
            self._db.execute(_SCHEMA)
            self._bytes, self._count = self._db.execute(
                "SELECT coalesce(sum(length(body)), 0), count(*) FROM outbox"
            ).fetchone()
        except (sqlite3.Error, OSError) as error:
            raise OutboxFull(f"the outbox {path} cannot be opened: {error}") from error

    def append(self, id: str, kind: str, body: bytes) -> None:
        """Accept a record. Raises OutboxFull, with nothing changed, at the size cap or where the disk refuses."""
        with self._lock:
            if self._bytes + len(body) > self.limit_bytes:
                raise OutboxFull(f"the outbox holds {self._bytes >> 20} MiB; its limit is {self.limit_bytes >> 20} MiB")
            crash_point("outbox.before_commit")
            try:
                self._db.execute("INSERT INTO outbox (id, kind, body) VALUES (?, ?, ?)", (id, kind, body))
            except sqlite3.IntegrityError:
                return  # the same record twice is that record once
            except sqlite3.Error as error:
                raise OutboxFull(f"the outbox could not be written: {error}") from error
            self._bytes += len(body)
            self._count += 1
            crash_point("outbox.after_commit")

    def discard(self, ids: Iterable[str]) -> None:
        """Let go of what the collector has committed."""
        wanted = [(id,) for id in ids]
        if not wanted:
            return
        with self._lock:
            crash_point("outbox.before_delete")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany("DELETE FROM outbox WHERE id = ?", wanted)
                self._bytes, self._count = self._db.execute(
                    "SELECT coalesce(sum(length(body)), 0), count(*) FROM outbox"
                ).fetchone()
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._db.execute("ROLLBACK")
                raise OutboxFull(f"the outbox could not be written: {error}") from error
            crash_point("outbox.after_delete")

    def oldest(self, limit: int = FETCH_LIMIT, max_bytes: int = FETCH_BYTES) -> list[Row]:
        """The oldest records, at most `limit` of them and `max_bytes` together (one always fits)."""
        rows: list[Row] = []
        size = 0
        with self._lock:
            cursor = self._db.execute(
                "SELECT id, kind, body FROM outbox ORDER BY n LIMIT ?", (max(0, min(limit, FETCH_LIMIT)),)
            )
            for id, kind, body in cursor:
                size += len(body)
                if rows and size > max_bytes:
                    break
                rows.append(Row(id, kind, body))
        return rows

    @property
    def pending(self) -> int:
        """Records that wait."""
        return self._count

    @property
    def bytes(self) -> int:
        """Their size."""
        return self._bytes

    def purge(self, ids: Iterable[str]) -> None:
        """Forget these records, accepted or not: a user's wish stands above the promise."""
        self.discard(ids)
        with self._lock:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close the file; nothing is lost by not calling this."""
        with self._lock:
            self._db.close()
