"""What is to be forgotten, and forgetting it: by id, age or pattern, by the limits of the settings, down to the bytes."""

import json
import math
from collections.abc import Iterator, Sequence

import sqlalchemy as sa

from specl.shared.conversations import HASH_DIGITS, strings, typed_in
from specl.shared.errors import StoreError
from specl.shared.store.file import StoreFile
from specl.shared.store.rows import iso
from specl.shared.store.schema import disagreements, evaluations, generations, quarantine, training_runs

EARLIEST, LATEST = 0.0, 253_000_000_000.0  # moments before and after all others that can be written as a date
_HASH = "[0-9a-f]" * HASH_DIGITS  # an id that is_hash_shaped, as SQLite says it
PURGE_MOST = 2_000  # generations that one request removes: of 41 KB each well within a command's patience


class Forgetting(StoreFile):
    """Purge and retention."""

    def matching(self, ids: Sequence[str], before: float | None, pattern: str) -> list[str]:
        """Generation ids that a purge means: any of `ids`, older than `before`, or with `pattern` in any of its texts, in upper
        or lower case; at most PURGE_MOST of them, so that whoever wants all asks again.
        """
        wanted = [generations.c.id.in_(list(ids))] if ids else []
        if before is not None:
            wanted.append(generations.c.created_at < before)
        if pattern:
            g = generations.c
            within = [
                sa.func.lowered(column).contains(pattern.lower(), autoescape=True)
                for column in (g.prompt, g.output, g.messages, g.conversation_id)
            ]
            # three letters of a pattern stand in many a hash: of such an id only the whole counts
            named = sa.or_(
                sa.func.glob(_HASH, g.conversation_id) == 0, sa.func.lowered(g.conversation_id) == pattern.lower()
            )
            wanted += [*within[:-1], sa.and_(within[-1], named)]
        if not wanted:
            return []
        query = sa.select(generations.c.id).where(sa.or_(*wanted)).limit(PURGE_MOST)
        with self._errors(), self._engine.connect() as connection:
            found = list(connection.execute(query).scalars())
        return (found + self._unreadable(ids, before, pattern))[:PURGE_MOST]

    def _unreadable(self, ids: Sequence[str], before: float | None, pattern: str) -> list[str]:
        """The same among records in quarantine, by their bytes."""
        q = quarantine.c
        wanted = [q.id.in_(list(ids))] if ids else []
        if before is not None:
            wanted.append(q.created < iso(max(EARLIEST, min(before, LATEST))))
        if pattern:
            wanted.append(sa.func.lowered(q.raw).contains(pattern.lower(), autoescape=True))
        with self._errors(), self._engine.connect() as connection:
            return list(connection.execute(sa.select(q.id).where(sa.or_(*wanted)).limit(PURGE_MOST)).scalars())

    def texts(self, ids: Sequence[str]) -> tuple[list[str], list[str]]:
        """Every text of these generations, for whoever must see that it is gone, and those of them that a user typed."""
        found: list[str] = []
        typed: list[str] = []
        g = generations.c
        for start in range(0, len(ids), 500):
            query = sa.select(g.prompt, g.output, g.messages).where(g.id.in_(ids[start : start + 500]))
            for row in self._all(query):
                messages = json.loads(row["messages"])
                found += [row["prompt"], row["output"], *strings(messages)]
                typed += typed_in(messages)
        return [text for text in found if text], [text for text in typed if text]

    def beginning(self, id: str) -> list[str]:
        """Ids of generations and unreadable records that begin with `id`, at most two; a whole id is that one."""
        found: list[str] = []
        with self._errors(), self._engine.connect() as connection:
            for column in (generations.c.id, quarantine.c.id):
                if connection.execute(sa.select(column).where(column == id)).first():
                    return [id]
                query = sa.select(column).where(column.startswith(id, autoescape=True)).limit(2)
                found += connection.execute(query).scalars()
        return sorted(set(found))[:2]

    def written(self) -> Iterator[str]:
        """Every text of every generation, as it stands in the file, and the tokens that were guessed for it."""
        last, g, d = 0, generations.c, disagreements.c
        columns = (g.prompt, g.output, g.messages, g.conversation_id)
        while rows := self._all(sa.select(g.n, *columns).where(g.n > last).order_by(g.n).limit(200)):
            for row in rows:
                yield from (row[column.name] for column in columns)
            last = rows[-1]["n"]
        for column in (d.draft_text, d.target_text):
            yield from (row["text"] for row in self._all(sa.select(column.label("text")).distinct()))

    def expired(self, days: float, most: int, most_mb: int, now: float) -> list[str]:
        """The oldest generations beyond an age, a number or a size; 0 means no such limit. Unreadable records go by their age:
        they hold the same texts, and nothing else will ever ask for them.
        """
        chosen: list[str] = []
        unreadable = self._unreadable([], now - days * 86400, "") if days else []
        oldest = sa.select(generations.c.id).order_by(generations.c.created_at, generations.c.n)
        with self._errors(), self._engine.connect() as connection:
            (total,) = connection.execute(sa.select(sa.func.count()).select_from(generations)).one()
            if days:
                chosen = list(connection.execute(oldest.where(generations.c.created_at < now - days * 86400)).scalars())
            surplus = total - most if most else 0
            held = self._held_bytes(connection)
            if most_mb and held > most_mb << 20:
                surplus = max(surplus, math.ceil(total * (1 - 0.95 * (most_mb << 20) / held)))
            if surplus > len(chosen):
                chosen = list(connection.execute(oldest.limit(surplus)).scalars())
        return unreadable + chosen

    def _held_bytes(self, connection: sa.Connection) -> int:
        """Bytes of the file that hold something; the rest is free for what comes next."""
        pragma = lambda name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()  # noqa: E731
        return (pragma("page_count") - pragma("freelist_count")) * pragma("page_size")

    def purge(self, ids: Sequence[str]) -> int:
        """Remove generations (or unreadable records), their disagreements and evaluations, and overwrite what they held
        on disk.
        """
        removed = 0
        with self._errors():
            with self._engine.begin() as connection:
                for start in range(0, len(ids), 500):
                    part = list(ids[start : start + 500])
                    self._move_marks(connection, part)
                    connection.execute(sa.delete(disagreements).where(disagreements.c.generation_id.in_(part)))
                    connection.execute(sa.delete(evaluations).where(evaluations.c.generation_id.in_(part)))
                    removed += connection.execute(sa.delete(generations).where(generations.c.id.in_(part))).rowcount
                    removed += connection.execute(sa.delete(quarantine).where(quarantine.c.id.in_(part))).rowcount
            self._empty_log()
        return removed

    def _move_marks(self, connection: sa.Connection, ids: Sequence[str]) -> None:
        """A training run names the newest generation that it had; without it all older ones would count as new to the trainer."""
        g, t = generations.c, training_runs.c
        marked = sa.select(g.id, g.n).join(training_runs, t.last_generation == g.id).where(g.id.in_(ids)).distinct()
        for id, n in connection.execute(marked).all():
            before = sa.select(g.id).where(g.n < n, g.id.not_in(ids)).order_by(g.n.desc()).limit(1)
            older = connection.execute(before).scalar() or ""
            connection.execute(sa.update(training_runs).where(t.last_generation == id).values(last_generation=older))

    def _empty_log(self) -> None:
        """Move everything out of the write-ahead log and cut it to nothing. Raises StoreError while somebody reads."""
        busy, _, _ = self._outside_transaction("PRAGMA wal_checkpoint(TRUNCATE)")
        if busy:
            raise StoreError(
                f"another program reads {self.path}; its write-ahead log could not be emptied",
                "close it and purge again",
            )
