"""Writes fetched records for the collector, each once, in one transaction with what was found out
about them.
"""

from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy.exc import DataError, IntegrityError, InterfaceError, ProgrammingError

from specl.shared.messaging.messages import Envelope
from specl.shared.runtime.failpoints import failpoint
from specl.shared.store.failure import THRESHOLD
from specl.shared.store.file import StoreFile
from specl.shared.store.rows import RowsToInsert, quarantined, rows_to_insert
from specl.shared.store.schema import TABLES, disagreements, generations, quarantine, settings

# errors that a record's contents cause; a full disk or a lock is an OperationalError, and is waited
# out
UNSTORABLE = (IntegrityError, DataError, InterfaceError, ProgrammingError, ValueError, TypeError, OverflowError)
TABLE_ORDER = (*TABLES.values(), quarantine)  # generations before what was found out about them


class Writing(StoreFile):
    """The writer's part of the store."""

    def set_threshold(self, threshold: float) -> None:
        """Write down what the `failures` view compares with."""
        with self._errors(), self._engine.begin() as connection:
            connection.execute(sa.delete(settings))
            connection.execute(sa.insert(settings).values(name=THRESHOLD, value=str(threshold)))

    def add_rows(self, envelopes: Iterable[Envelope]) -> list[str]:
        """Store fetched records in one transaction; the ids that are now committed, those of
        earlier calls included.

        A body that is no record goes to quarantine in that transaction, so that it blocks nothing.
        Raises StoreError (nothing stored, nothing to acknowledge) where the disk refuses.
        """
        envelopes = list(envelopes)
        items = [rows_to_insert(envelope) for envelope in envelopes]
        with self._errors():
            try:
                with self._engine.begin() as connection:
                    self._add_all(connection, items)
                    failpoint("store.before_commit")
            except UNSTORABLE:
                with self._engine.begin() as connection:
                    self._add_singly(connection, envelopes, items)
                    failpoint("store.before_commit")
        failpoint("store.after_commit")
        return [envelope.id for envelope in envelopes]

    def _add_all(self, connection: sa.Connection, items: list[RowsToInsert]) -> None:
        for table in TABLE_ORDER:
            self._add(connection, table, [item for item in items if item.table is table])

    def _add_singly(self, connection: sa.Connection, envelopes: list[Envelope], items: list[RowsToInsert]) -> None:
        """Add one by one, where SQLite refuses a record for its contents: that one goes to
        quarantine, the others are stored.
        """
        pairs = zip(envelopes, items, strict=True)
        for envelope, item in sorted(pairs, key=lambda pair: TABLE_ORDER.index(pair[1].table)):
            try:
                with connection.begin_nested():
                    self._add(connection, item.table, [item])
            except UNSTORABLE as error:
                self._add(connection, quarantine, [quarantined(envelope, getattr(error, "orig", None) or error)])

    def _add(self, connection: sa.Connection, table: sa.Table, items: list[RowsToInsert]) -> None:
        """Insert what is not there yet. One statement for all: a statement each costs five times
        the CPU.
        """
        if not items:
            return
        ids = [item.columns["id"] for item in items]
        stored = set(connection.execute(sa.select(table.c.id).where(table.c.id.in_(ids))).scalars())
        first_of_id = {item.columns["id"]: item for item in reversed(items) if item.columns["id"] not in stored}
        new = list(reversed(first_of_id.values()))
        if not new:
            return
        connection.execute(sa.insert(table), [item.columns for item in new])
        if rows := [row for item in new for row in item.disagreements]:
            connection.execute(sa.insert(disagreements), rows)
        if scores := [item.columns for item in new if item.columns.get("subject") == "generation"]:
            update = sa.update(generations).where(generations.c.id == sa.bindparam("scored_id"))
            connection.execute(
                update.values(agreement=sa.bindparam("score")),
                [{"scored_id": score["generation_id"], "score": score["agreement"]} for score in scores],
            )
