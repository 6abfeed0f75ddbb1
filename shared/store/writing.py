"""What the collector writes: fetched records, each once, in one transaction with what is found out about them."""

from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy.exc import DataError, IntegrityError, InterfaceError, ProgrammingError

from specl.shared.messaging.messages import Envelope
from specl.shared.runtime.failpoints import failpoint
from specl.shared.store.file import StoreFile
from specl.shared.store.rows import Incoming, quarantined, read
from specl.shared.store.schema import TABLES, disagreements, generations, quarantine, thresholds

# what a record's contents are to blame for; a full disk or a lock are OperationalError, and are waited out
UNSTORABLE = (IntegrityError, DataError, InterfaceError, ProgrammingError, ValueError, TypeError, OverflowError)


class Writing(StoreFile):
    """The writer's part of the store."""

    def set_threshold(self, threshold: float) -> None:
        """What the `failures` view compares with."""
        with self._errors(), self._engine.begin() as connection:
            connection.execute(sa.delete(thresholds))
            connection.execute(sa.insert(thresholds).values(name="acceptance_threshold", value=str(threshold)))

    def add_rows(self, rows: Iterable[Envelope]) -> list[str]:
        """Store fetched records in one transaction; the ids that are now committed, old ones included.

        A body that is no record goes to quarantine in the same transaction, so that it blocks nothing. Raises StoreError
        (nothing stored, nothing to acknowledge) where the disk refuses.
        """
        rows = list(rows)
        incoming = [read(row) for row in rows]
        with self._errors():
            try:
                with self._engine.begin() as connection:
                    self._add_all(connection, incoming)
                    failpoint("store.before_commit")
            except UNSTORABLE:
                with self._engine.begin() as connection:
                    self._add_singly(connection, rows, incoming)
                    failpoint("store.before_commit")
        failpoint("store.after_commit")
        return [row.id for row in rows]

    def _add_all(self, connection: sa.Connection, incoming: list[Incoming]) -> None:
        for table in (*TABLES.values(), quarantine):  # generations before what was found out about them
            self._add(connection, table, [item for item in incoming if item.table is table])

    def _add_singly(self, connection: sa.Connection, rows: list[Envelope], incoming: list[Incoming]) -> None:
        """One by one, as one of them is refused for what it holds: that one goes to quarantine, the others stand."""
        order = [*TABLES.values(), quarantine]
        for row, item in sorted(zip(rows, incoming, strict=True), key=lambda pair: order.index(pair[1].table)):
            try:
                with connection.begin_nested():
                    self._add(connection, item.table, [item])
            except UNSTORABLE as error:
                self._add(connection, quarantine, [quarantined(row, getattr(error, "orig", None) or error)])

    def _add(self, connection: sa.Connection, table: sa.Table, items: list[Incoming]) -> None:
        """Insert what is not there yet. One statement for all: a statement each costs five times the CPU."""
        if not items:
            return
        ids = [item.columns["id"] for item in items]
        present = set(connection.execute(sa.select(table.c.id).where(table.c.id.in_(ids))).scalars())
        new = {item.columns["id"]: item for item in reversed(items) if item.columns["id"] not in present}
        fresh = list(reversed(new.values()))
        if not fresh:
            return
        connection.execute(sa.insert(table), [item.columns for item in fresh])
        if lines := [line for item in fresh for line in item.lines]:
            connection.execute(sa.insert(disagreements), lines)
        if scores := [item.columns for item in fresh if item.columns.get("subject") == "generation"]:
            update = sa.update(generations).where(generations.c.id == sa.bindparam("of"))
            connection.execute(
                update.values(agreement=sa.bindparam("score")),
                [{"of": score["generation_id"], "score": score["agreement"]} for score in scores],
            )
