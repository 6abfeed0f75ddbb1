"""What is to be forgotten, and forgetting it: by id, age or pattern, by the limits of the settings,
down to the bytes on disk.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from specl.shared.conversations import folded, strings, typed_in
from specl.shared.errors import StoreError
from specl.shared.store.file import StoreFile, parts
from specl.shared.store.rows import iso
from specl.shared.store.schema import disagreements, evaluations, generations, quarantine, training_runs

EARLIEST, LATEST = 0.0, 253_000_000_000.0  # the first and the last time that can be written as a date
PURGE_MOST = 2_000  # generations that one request removes: at 41 KB each well within a command's timeout
DAY_S = 86400
SIZE_TARGET = 0.95  # of the size limit: what is left after rows went for it

g, q, t = generations.c, quarantine.c, training_runs.c


class Forgetting(StoreFile):
    """Purge and retention."""

    # ------------------------------------------------------------------------------------------------ what a purge means
    def matching(self, ids: Sequence[str], before: float | None, pattern: str) -> list[str]:
        """Ids of the generations and unreadable records that a purge means, at most PURGE_MOST: who
        wants all asks again.

        It means any of `ids`, what is older than `before`, and what has `pattern` in any of its
        texts, in upper or lower case.
        """
        conditions: list[sa.ColumnElement[bool]] = [g.id.in_(list(ids))] if ids else []
        if before is not None:
            conditions.append(g.created_at < before)
        if pattern:
            text = folded(pattern)
            conditions += [sa.func.text_holds(column, text) == 1 for column in (g.prompt, g.output)]
            conditions += [sa.func.messages_hold(g.messages, text) == 1]
            conditions += [sa.func.name_holds(g.conversation_id, text) == 1]
        if not conditions:
            return []
        stored = self._scalars(sa.select(g.id).where(sa.or_(*conditions)).limit(PURGE_MOST))
        return (stored + self._unreadable(ids, before, pattern))[:PURGE_MOST]

    def _unreadable(self, ids: Sequence[str], before: float | None, pattern: str) -> list[str]:
        """What `matching` means among the records in quarantine, by their bytes."""
        conditions: list[sa.ColumnElement[bool]] = [q.id.in_(list(ids))] if ids else []
        if before is not None:
            conditions.append(q.created < iso(max(EARLIEST, min(before, LATEST))))
        if pattern:
            conditions.append(sa.func.text_holds(q.raw, folded(pattern)) == 1)
        return self._scalars(sa.select(q.id).where(sa.or_(*conditions)).limit(PURGE_MOST))

    def _scalars(self, query: sa.Select[Any]) -> list[Any]:
        with self._errors(), self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def texts(self, ids: Sequence[str]) -> tuple[list[str], list[str]]:
        """Every text of these generations, and those of them that a user typed."""
        texts: list[str] = []
        typed: list[str] = []
        for part in parts(ids):
            for row in self._all(sa.select(g.prompt, g.output, g.messages).where(g.id.in_(part))):
                messages = json.loads(row["messages"])
                texts += [row["prompt"], row["output"], *strings(messages)]
                typed += typed_in(messages)
        return [text for text in texts if text], [text for text in typed if text]

    def beginning(self, prefix: str) -> list[str]:
        """Ids of generations and unreadable records that begin with `prefix`, at most two; a whole
        id is that one.
        """
        ids: list[str] = []
        for column in (g.id, q.id):
            if self._scalars(sa.select(column).where(column == prefix)):
                return [prefix]
            ids += self._scalars(sa.select(column).where(column.startswith(prefix, autoescape=True)).limit(2))
        return sorted(set(ids))[:2]

    # ------------------------------------------------------------------------------------------------ retention
    def expired(self, days: float, max_generations: int, max_mb: int, now: float) -> list[str]:
        """The oldest generations beyond an age, a number or a size; 0 means no such limit.
        Unreadable records go by their age: they hold the same texts, and nothing else will ever ask
        for them.
        """
        by_age: list[str] = []
        unreadable = self._unreadable([], now - days * DAY_S, "") if days else []
        oldest = sa.select(g.id).order_by(g.created_at, g.n)
        with self._errors(), self._engine.connect() as connection:
            total: int = connection.execute(sa.select(sa.func.count()).select_from(generations)).scalar_one()
            if days:
                by_age = list(connection.execute(oldest.where(g.created_at < now - days * DAY_S)).scalars())
            surplus = total - max_generations if max_generations else 0
            used, limit = _used_bytes(connection), max_mb << 20
            if limit and used > limit:
                surplus = max(surplus, math.ceil(total * (1 - SIZE_TARGET * limit / used)))
            if surplus > len(by_age):
                by_age = list(connection.execute(oldest.limit(surplus)).scalars())
        return unreadable + by_age

    def last_known_time(self) -> float:
        """A time that has certainly come: of the newest generation, or when the file was last
        written. An open program's writes stand in the write-ahead log, so that the file tells of
        the time before.
        """
        newest = self._scalars(sa.select(g.created_at).order_by(g.n.desc()).limit(1))
        return float(max([self.path.stat().st_mtime, *newest]))

    # ------------------------------------------------------------------------------------------------ forgetting
    def purge(self, ids: Sequence[str]) -> int:
        """Remove generations (or unreadable records), their disagreements and evaluations, and
        overwrite what they held on disk.

        How many rows of generations and of the quarantine went. Raises StoreError, also where
        another program reads the store: then rows are gone and their bytes are not, and it is to be
        called again.
        """
        removed = 0
        with self._errors():
            with self._engine.begin() as connection:
                for part in parts(ids):
                    self._move_marks(connection, part)
                    connection.execute(sa.delete(disagreements).where(disagreements.c.generation_id.in_(part)))
                    connection.execute(sa.delete(evaluations).where(evaluations.c.generation_id.in_(part)))
                    removed += connection.execute(sa.delete(generations).where(g.id.in_(part))).rowcount
                    removed += connection.execute(sa.delete(quarantine).where(q.id.in_(part))).rowcount
            self._empty_log()
        return removed

    def _move_marks(self, connection: sa.Connection, ids: Sequence[str]) -> None:
        """Have training runs name an older generation as the newest they had, where that goes.

        Without it all older generations would count as new to the trainer.
        """
        marked = sa.select(g.id, g.n).join(training_runs, t.last_generation == g.id).where(g.id.in_(ids)).distinct()
        for id, n in connection.execute(marked).all():
            before = sa.select(g.id).where(g.n < n, g.id.not_in(ids)).order_by(g.n.desc()).limit(1)
            older = connection.execute(before).scalar() or ""
            connection.execute(sa.update(training_runs).where(t.last_generation == id).values(last_generation=older))

    def _empty_log(self) -> None:
        """Move everything from the write-ahead log into the store and truncate the log. Raises
        StoreError while another process reads.
        """
        busy, _, _ = self._outside_transaction("PRAGMA wal_checkpoint(TRUNCATE)")
        if busy:
            raise StoreError(
                f"another program reads {self.path}; its write-ahead log could not be emptied",
                "close it and purge again",
            )


def _used_bytes(connection: sa.Connection) -> int:
    """Bytes of the file that hold something; the rest is free for what comes next."""

    def pragma(name: str) -> int:
        return int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())

    return (pragma("page_count") - pragma("freelist_count")) * pragma("page_size")
