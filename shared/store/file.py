"""The store's file: opened with the right pragmas, brought to today's schema with a copy kept,
asked in short transactions.
"""

import itertools
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from specl.shared.conversations import folded, is_hash_shaped, strings
from specl.shared.errors import StoreError, StoreTooNew
from specl.shared.runtime.atomic_files import atomic_file, erase_file
from specl.shared.store.migrations import MIGRATIONS

LOCK_TIMEOUT_S = 5.0
IDS_AT_ONCE = 500  # in one statement
WRITER_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "fullfsync=ON", "secure_delete=ON")


class StoreFile:
    """The open file at `path`; see `Store`. `migrations` are the steps to the schema that is wanted
    (tests hand in others).
    """

    def __init__(self, path: Path, read_only: bool = False, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
        self.path, self._migrations = path, migrations
        if read_only and not path.is_file():
            raise StoreError(
                f"there is no store at {path} yet", "it is made when the collector first runs (`honcho start`)"
            )
        if not read_only:
            path.parent.mkdir(parents=True, exist_ok=True)
            _create_private(path)
        mode = "ro" if read_only else "rwc"
        url = sa.URL.create("sqlite", database=f"file:{quote(str(path))}", query={"mode": mode, "uri": "true"})
        self._engine = sa.create_engine(
            url, connect_args={"timeout": LOCK_TIMEOUT_S}, poolclass=sa.pool.SingletonThreadPool
        )
        sa.event.listen(self._engine, "connect", _on_connect_read_only if read_only else _on_connect)
        begin = "BEGIN" if read_only else "BEGIN IMMEDIATE"
        sa.event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        with self._errors():
            self._bring_up_to_date(read_only)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, sqlite3.Error) as error:
            raise StoreError(f"the store {self.path}: {getattr(error, 'orig', error)}") from error

    # ------------------------------------------------------------------------------------------------ schema
    def _bring_up_to_date(self, read_only: bool) -> None:
        """Run the steps that an older file lacks, in one transaction, with a copy made before."""
        newest = len(self._migrations)
        with self._engine.connect() as connection:
            version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
        if version > newest:
            raise StoreTooNew(
                f"the store {self.path} has schema {version}; this program knows up to {newest}",
                "upgrade speclora",
            )
        if version == newest:
            return
        if read_only:
            raise StoreError(
                f"the store {self.path} has the older schema {version}",
                "start the collector once: it upgrades the store",
            )
        if version:
            self._back_up(version)
        with self._engine.begin() as connection:
            for statement in itertools.chain(*self._migrations[version:]):
                connection.exec_driver_sql(statement)
            connection.exec_driver_sql(f"PRAGMA user_version = {newest}")

    def _back_up(self, version: int) -> None:
        """Copy the store before an upgrade, its write-ahead log included; the copy is complete or
        not there at all.

        One copy of each version is kept: an upgrade that fails is tried again every few seconds,
        and a copy each time would fill the disk. Raises StoreError where the disk refuses.
        """
        older = sorted(self.path.parent.glob(f"{self.path.name}.backup-{version}-*"), key=written_at)
        if older and older[-1].stat().st_mtime_ns >= self._changed_ns():
            return
        final = self.path.with_name(f"{self.path.name}.backup-{version}-{int(time.time())}")
        try:
            for leftover in self.path.parent.glob(f".{self.path.name}.backup-*"):  # of a kill in the middle of copying
                leftover.unlink(missing_ok=True)
            with atomic_file(final, sync=True) as scratch:
                self._outside_transaction("VACUUM INTO ?", scratch.name)
            for path in older:
                if path != final:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"the store {self.path} could not be copied before its upgrade: {error}") from error

    def _changed_ns(self) -> int:
        """When the store's files were last written, in ns. An empty write-ahead log does not count:
        opening makes one.
        """
        log = self.path.with_name(f"{self.path.name}-wal")
        files = [self.path, *([log] if log.exists() and log.stat().st_size else [])]
        return max(file.stat().st_mtime_ns for file in files)

    def backups(self) -> list[Path]:
        """Copies that upgrades have left."""
        return sorted(self.path.parent.glob(f"{self.path.name}.backup-*"))

    def drop_backups(self, days: float, now: float) -> list[Path]:
        """Remove copies that are older than `days`; without such a limit (0) all but the newest.
        Those that went.
        """
        copies = sorted(self.backups(), key=written_at)
        outdated = [path for path in copies if written_at(path) < now - days * 86400] if days else copies[:-1]
        for path in outdated:
            erase_file(path)
        return outdated

    # ------------------------------------------------------------------------------------------------ queries
    def sql(self, text: str, **values: Any) -> list[dict[str, Any]]:
        """The rows of a query in SQL, for views. `values` are its parameters (`:name`)."""
        return self._all(sa.text(text).bindparams(**values))

    def _all(self, query: sa.Executable) -> list[dict[str, Any]]:
        with self._errors(), self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def _outside_transaction(self, statement: str, *values: Any) -> Any:
        """Run what SQLite refuses inside a transaction (sqlalchemy always opens one); the first
        row.
        """
        connection = self._engine.raw_connection()
        try:
            cursor: sqlite3.Cursor = connection.cursor()  # type: ignore[assignment]  # the driver's own, behind a protocol
            return cursor.execute(statement, values).fetchone()
        finally:
            connection.close()

    def close(self) -> None:
        """Close this thread's connection."""
        self._engine.dispose()


def parts(ids: Sequence[str]) -> Iterator[list[str]]:
    """`ids` in portions that fit into one statement."""
    for start in range(0, len(ids), IDS_AT_ONCE):
        yield list(ids[start : start + IDS_AT_ONCE])


def written_at(backup: Path) -> float:
    """When a copy was made, in seconds since 1970: as its name says, else as the disk does."""
    stamp = backup.name.rpartition("-")[2]
    return float(stamp) if stamp.isdigit() else backup.stat().st_mtime


def _create_private(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


def _text_holds(value: str | bytes, pattern: str) -> bool:
    """Whether a text, or bytes as far as they are text, holds a `folded` pattern. SQLite's own
    LIKE ends at U+0000 and folds ASCII only.
    """
    return pattern in folded(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)


def _messages_hold(messages: str, pattern: str) -> bool:
    """Whether any text in messages holds a `folded` pattern; as JSON they have escapes."""
    return any(pattern in folded(text) for text in strings(json.loads(messages)))


def _name_holds(conversation_id: str, pattern: str) -> bool:
    """Whether a conversation's name holds a `folded` pattern. Three letters stand in many a hash,
    so of a derived id only the whole counts.
    """
    if is_hash_shaped(conversation_id):
        return conversation_id == pattern
    return pattern in folded(conversation_id)


SEARCHES = {"text_holds": _text_holds, "messages_hold": _messages_hold, "name_holds": _name_holds}


def _on_connect(connection: sqlite3.Connection, record: object) -> None:
    _on_connect_read_only(connection, record)
    for pragma in WRITER_PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


def _on_connect_read_only(connection: sqlite3.Connection, record: object) -> None:
    # else a sort or a copy writes texts to the system's temporary folder, out of a purge's reach
    connection.execute("PRAGMA temp_store=MEMORY")
    connection.isolation_level = None  # sqlalchemy's `begin` event starts transactions
    for name, function in SEARCHES.items():
        connection.create_function(name, 2, function, deterministic=True)
    connection.execute(f"PRAGMA busy_timeout={int(1000 * LOCK_TIMEOUT_S)}")
