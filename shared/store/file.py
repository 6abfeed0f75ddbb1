"""The file itself: opened with the right pragmas, brought to today's schema with a copy kept, asked in short transactions."""

import itertools
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

from specl.shared.errors import StoreError, StoreTooNew
from specl.shared.runtime.atomic_files import atomic_file
from specl.shared.store.migrations import MIGRATIONS


class StoreFile:
    """The open file at `path`; see `Store`."""

    def __init__(self, path: Path, read_only: bool = False, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
        self.path, self._migrations = path, migrations
        if read_only and not path.is_file():
            raise StoreError(
                f"there is no store at {path} yet", "it is made when the collector first runs (`honcho start`)"
            )
        if not read_only:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        mode = "ro" if read_only else "rwc"
        url = sa.URL.create("sqlite", database=f"file:{quote(str(path))}", query={"mode": mode, "uri": "true"})
        self._engine = sa.create_engine(url, connect_args={"timeout": 5.0}, poolclass=sa.pool.SingletonThreadPool)
        sa.event.listen(self._engine, "connect", _on_connect if not read_only else _on_connect_read_only)
        sa.event.listen(
            self._engine,
            "begin",
            lambda connection: connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE"),
        )
        with self._errors():
            self._open(read_only)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, sqlite3.Error) as error:
            raise StoreError(f"the store {self.path}: {getattr(error, 'orig', error)}") from error

    def _open(self, read_only: bool) -> None:
        with self._engine.connect() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        newest = len(self._migrations)
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
        """A whole copy before an upgrade, the write-ahead log included, complete or not there at all. One of each version: an
        upgrade that fails is tried again every few seconds, and a copy each time would fill the disk.
        """
        older = sorted(self.path.parent.glob(f"{self.path.name}.backup-{version}-*"), key=written_at)
        if older and older[-1].stat().st_mtime_ns >= self._changed():
            return
        final = self.path.with_name(f"{self.path.name}.backup-{version}-{int(time.time())}")
        try:
            for left in self.path.parent.glob(f".{self.path.name}.backup-*"):  # a kill in the middle of copying
                left.unlink(missing_ok=True)
            with atomic_file(final, sync=True) as scratch:
                self._outside_transaction("VACUUM INTO ?", scratch.name)
            for path in older:
                if path != final:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"the store {self.path} could not be copied before its upgrade: {error}") from error

    def _changed(self) -> int:
        """When the store's files were last written, in ns. An empty write-ahead log is made by opening it."""
        log = self.path.with_name(f"{self.path.name}-wal")
        files = [self.path, *([log] if log.exists() and log.stat().st_size else [])]
        return max(file.stat().st_mtime_ns for file in files)

    def drop_backups(self, days: float, now: float) -> list[Path]:
        """Remove copies that are older than `days`; without such a limit (0) all but the newest. Which."""
        held = sorted(self.backups(), key=written_at)
        gone = [path for path in held if written_at(path) < now - days * 86400] if days else held[:-1]
        for path in gone:
            path.unlink(missing_ok=True)
        return gone

    def _outside_transaction(self, statement: str, *values: Any) -> Any:
        """Run what SQLite refuses inside a transaction (sqlalchemy always opens one); the first row."""
        connection = self._engine.raw_connection()
        try:
            return connection.cursor().execute(statement, values).fetchone()
        finally:
            connection.close()

    def backups(self) -> list[Path]:
        """Copies that upgrades have left."""
        return sorted(self.path.parent.glob(f"{self.path.name}.backup-*"))

    def close(self) -> None:
        """Close this thread's connection."""
        self._engine.dispose()

    def _all(self, query: Any) -> list[dict[str, Any]]:
        with self._errors(), self._engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]

    def sql(self, text: str, **values: Any) -> list[dict[str, Any]]:
        """Rows of a written query, for views."""
        return self._all(sa.text(text).bindparams(**values))


def written_at(backup: Path) -> float:
    """When a copy was made, in seconds since 1970: as its name says, else as the disk does."""
    stamp = backup.name.rpartition("-")[2]
    return float(stamp) if stamp.isdigit() else backup.stat().st_mtime


def _lowered(value: str | bytes | None) -> str | None:
    """Lower case of all scripts (SQLite's own is that of ASCII); of bytes as far as they are text."""
    return value.decode("utf-8", "replace").lower() if isinstance(value, bytes) else value and value.lower()


def _on_connect(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # sqlalchemy's `begin` event starts transactions
    connection.create_function("lowered", 1, _lowered, deterministic=True)
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "fullfsync=ON", "secure_delete=ON", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _on_connect_read_only(connection: Any, record: Any) -> None:
    connection.isolation_level = None
    connection.create_function("lowered", 1, _lowered, deterministic=True)
    connection.execute("PRAGMA busy_timeout=5000")
