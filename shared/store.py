"""The SQLite failure store: tables, views, migrations, queries. The only file that imports sqlalchemy.

One file, WAL, readable with `sqlite3` alone: token arrays are blobs with their text beside them. The collector is the only
writer; everyone else opens it read-only with short transactions. Storing a record twice is storing it once.
"""

import json
import math
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from specl.shared.crash import crash_point
from specl.shared.errors import StoreError, StoreTooNew, WireError
from specl.shared.store_views import ADAPTER_ACTIVATIONS, ADAPTER_HISTORY
from specl.shared.wire import Activation, Adapter, Evaluation, Generation, Record, Row, TrainingRun, decode, kind_of

SCHEMA_VERSION = 3
EARLIEST, LATEST = 0.0, 253_000_000_000.0  # moments before and after all others that can be written as a date
PURGE_MOST = 100_000  # ids that one request names: they travel back in one frame
_meta = sa.MetaData()
_Text, _Int, _Real, _Blob = sa.Text, sa.Integer, sa.Float, sa.LargeBinary


def _column(name: str, kind: Any, **more: Any) -> sa.Column:
    return sa.Column(name, kind, nullable=more.pop("nullable", False), **more)


generations = sa.Table(
    "generations",
    _meta,
    sa.Column("n", _Int, primary_key=True),
    _column("id", _Text, unique=True),
    _column("conversation_id", _Text, index=True),
    _column("created_at", _Real, index=True),
    _column("created", _Text),
    _column("mode", _Text),
    _column("prompt", _Text),
    _column("output", _Text),
    _column("messages", _Text),
    _column("acceptance_rate", _Real, nullable=True),
    _column("agreement", _Real, nullable=True),
    _column("drafted", _Int),
    _column("accepted", _Int),
    _column("model_drafted", _Int),
    _column("model_accepted", _Int),
    _column("rounds", _Int),
    _column("output_count", _Int),
    _column("tokens_per_second", _Real),
    _column("ttft_ms", _Real),
    _column("finish_reason", _Text),
    _column("adapter_id", _Text),
    _column("target_model", _Text),
    _column("draft_model", _Text),
    _column("target_fingerprint", _Text),
    _column("draft_fingerprint", _Text),
    _column("sampling", _Text),
    _column("temperature", _Real),
    _column("stats", _Text),
    _column("prompt_tokens", _Blob),
    _column("output_tokens", _Blob),
    _column("sources", _Blob),
    _column("top_k", _Int, nullable=True),
    _column("top_ids", _Blob, nullable=True),
    _column("top_logprobs", _Blob, nullable=True),
    _column("tail", _Blob, nullable=True),
    _column("entropy", _Blob, nullable=True),
)
disagreements = sa.Table(
    "disagreements",
    _meta,
    sa.Column("n", _Int, primary_key=True),
    _column("generation_id", _Text, index=True),
    _column("position", _Int),
    _column("draft_token", _Int),
    _column("target_token", _Int),
    _column("draft_text", _Text),
    _column("target_text", _Text),
    _column("draft_confidence", _Real),
    _column("target_confidence", _Real),
    _column("drafter", _Text),
    _column("depth", _Int),
    _column("context_tokens", _Text),
)
adapters = sa.Table(
    "adapters",
    _meta,
    sa.Column("n", _Int, primary_key=True),
    _column("id", _Text, unique=True),
    _column("created_at", _Real),
    _column("created", _Text),
    _column("kind", _Text),
    _column("parent_id", _Text),
    _column("training_run_id", _Text),
    _column("path", _Text),
    _column("sha256", _Text),
    _column("base_fingerprint", _Text),
    _column("manifest", _Text),
)
training_runs = sa.Table(
    "training_runs",
    _meta,
    sa.Column("n", _Int, primary_key=True),
    _column("id", _Text, unique=True),
    _column("created_at", _Real),
    _column("created", _Text),
    _column("finished_at", _Real),
    _column("trigger", _Text),
    _column("verdict", _Text),
    _column("reason", _Text),
    _column("parent_id", _Text),
    _column("adapter_id", _Text),
    _column("examples", _Int),
    _column("steps", _Int),
    _column("tokens", _Int),
    _column("loss_first", _Real, nullable=True),
    _column("loss_last", _Real, nullable=True),
    _column("last_generation", _Text),
    _column("settings", _Text),
)
evaluations = sa.Table(
    "evaluations",
    _meta,
    sa.Column("n", _Int, primary_key=True),
    _column("id", _Text, unique=True),
    _column("created_at", _Real),
    _column("created", _Text),
    _column("subject", _Text),
    _column("generation_id", _Text),
    _column("training_run_id", _Text),
    _column("adapter_id", _Text),
    _column("generations", _Int),
    _column("positions", _Int),
    _column("agreement", _Real),
    _column("by_depth", _Text),
    _column("details", _Text),
)
activations = sa.Table(
    "activations",
    _meta,
    sa.Column("n", _Int, primary_key=True),
    _column("id", _Text, unique=True),
    _column("created_at", _Real),
    _column("created", _Text),
    _column("event", _Text),
    _column("adapter_id", _Text),
    _column("previous_id", _Text),
    _column("reason", _Text),
    _column("details", _Text),
)
quarantine = sa.Table(
    "quarantine",
    _meta,
    sa.Column("n", _Int, primary_key=True),
    _column("id", _Text, unique=True),
    _column("kind", _Text),
    _column("created", _Text),
    _column("reason", _Text),
    _column("raw", _Blob),
)
_THRESHOLD = sa.Table("settings", _meta, sa.Column("name", _Text, primary_key=True), _column("value", _Text))
_TABLES: dict[type, sa.Table] = {
    Generation: generations,
    Activation: activations,
    TrainingRun: training_runs,
    Evaluation: evaluations,
    Adapter: adapters,
}

_VIEWS = {
    # acceptance decides; agreement stands in where the model drafter guessed too little to tell (DESIGN: two figures)
    "failures": """
        SELECT created, id, round(acceptance_rate, 3) AS acceptance, round(agreement, 3) AS agreement,
               (SELECT count(*) FROM disagreements d WHERE d.generation_id = g.id) AS disagreements,
               output_count AS tokens, round(tokens_per_second, 1) AS tokens_per_second, adapter_id,
               substr(json_extract(messages, '$[#-1].content'), 1, 120) AS prompt, substr(output, 1, 160) AS output
        FROM generations g
        WHERE coalesce(acceptance_rate, agreement) < (SELECT CAST(value AS REAL) FROM settings WHERE name = 'acceptance_threshold')
        ORDER BY created_at DESC""",
    "acceptance_by_day": """
        SELECT substr(created, 1, 10) AS day, adapter_id, count(*) AS generations, sum(model_drafted) AS drafted,
               round(1.0 * sum(model_accepted) / nullif(sum(model_drafted), 0), 4) AS acceptance,
               round(avg(agreement), 4) AS agreement,
               round(avg(nullif(tokens_per_second, 0)), 2) AS tokens_per_second
        FROM generations GROUP BY day, adapter_id ORDER BY day, adapter_id""",
    "costliest_tokens": """
        SELECT draft_text, target_text, count(*) AS times, round(avg(draft_confidence), 3) AS draft_confidence,
               round(avg(target_confidence), 3) AS target_confidence, draft_token, target_token
        FROM disagreements GROUP BY draft_token, target_token ORDER BY times DESC""",
    "adapter_history": """
        SELECT t.created, t.verdict, t.adapter_id, t.parent_id, t.examples, t.steps, round(t.loss_first, 4) AS loss_first,
               round(t.loss_last, 4) AS loss_last,
               (SELECT round(agreement, 4) FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'heldout'
                 AND e.adapter_id = t.parent_id ORDER BY n LIMIT 1) AS heldout_before,
               (SELECT round(agreement, 4) FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = 'heldout'
                 AND e.adapter_id <> t.parent_id ORDER BY n LIMIT 1) AS heldout_after,
               t.reason
        FROM training_runs t ORDER BY t.created_at DESC""",
}


def _m001(connection: sa.Connection) -> None:
    """Tables, indexes and views as first released."""
    _meta.create_all(connection)
    for name, query in _VIEWS.items():
        connection.exec_driver_sql(f"CREATE VIEW {name} AS {query}")


def _m002(connection: sa.Connection) -> None:
    """An adapter's whole story: data, interval and regression in `adapter_history`; `adapter_activations`."""
    connection.exec_driver_sql("DROP VIEW adapter_history")
    connection.exec_driver_sql(f"CREATE VIEW adapter_history AS {ADAPTER_HISTORY}")
    connection.exec_driver_sql(f"CREATE VIEW adapter_activations AS {ADAPTER_ACTIVATIONS}")


def _m003(connection: sa.Connection) -> None:
    """Imported rows have no speed and no longer count as standing still."""
    connection.exec_driver_sql("DROP VIEW acceptance_by_day")
    connection.exec_driver_sql(f"CREATE VIEW acceptance_by_day AS {_VIEWS['acceptance_by_day']}")


_MIGRATIONS = (_m001, _m002, _m003)


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts and rates that `status` shows."""

    generations: int
    disagreements: int
    failures: int
    pending_failures: int
    quarantined: int
    lifetime_acceptance: float | None
    rolling_acceptance: float | None
    rolling_tokens_per_second: float | None
    by_adapter: dict[str, float | None]
    last_verdict: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class StoredGeneration:
    """A row as the trainer and the command line read it."""

    values: dict[str, Any]
    disagreements: list[dict[str, Any]]


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _row_of(record: Record) -> dict[str, Any]:
    """A record's values under its table's column names."""
    row = {name: getattr(record, name) for name in record.__slots__ if name not in ("disagreements", "top_k")}
    row["created"] = _iso(record.created_at)
    for name, value in row.items():
        if isinstance(value, (dict, list)):
            row[name] = json.dumps(value, ensure_ascii=False)
    if isinstance(record, Generation):
        row["agreement"] = None
        row["temperature"] = float(record.sampling.get("temperature", 0.0))
        # a record without its text still says how long it was
        row["output_count"] = len(record.output_tokens) // 4 or sum(record.stats.get("tokens_by_source", {}).values())
        top = record.top_k
        row |= {
            "top_k": top.k if top else None,
            "top_ids": top.ids if top else None,
            "top_logprobs": top.logprobs if top else None,
            "tail": top.tail if top else None,
            "entropy": top.entropy if top else None,
        }
    return row


@dataclass(frozen=True, slots=True)
class _Incoming:
    """A delivered record as rows: one of `table`, and `lines` of disagreements."""

    table: sa.Table
    columns: dict[str, Any]
    lines: Sequence[dict[str, Any]] = ()


def _read(row: Row) -> _Incoming:
    """What `row` holds; what is no record is a row of the quarantine."""
    try:
        record = decode(row.body)
        if type(record) not in _TABLES or kind_of(record) != row.kind or record.id != row.id:
            raise WireError(f"not the record it is labelled as ({row.kind})")
        columns = _row_of(record)
    except (WireError, ValueError, TypeError, OverflowError, OSError) as error:  # a moment or number out of range
        reason = f"{type(error).__name__}: {error}"
        values = {"id": row.id, "kind": row.kind, "created": _iso(time.time()), "reason": reason, "raw": row.body}
        return _Incoming(quarantine, values)
    return _Incoming(_TABLES[type(record)], columns, _lines_of(record) if isinstance(record, Generation) else ())


def _lines_of(record: Generation) -> list[dict[str, Any]]:
    return [
        {name: getattr(item, name) for name in item.__slots__ if name != "context_tokens"}
        | {"generation_id": record.id, "context_tokens": json.dumps(item.context_tokens)}
        for item in record.disagreements
    ]


class Store:
    """Open `path`. `read_only` needs an existing store and takes no lock that could delay the writer.

    Raises StoreError for a missing, foreign, damaged or newer store.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path = path
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
        if version > SCHEMA_VERSION:
            raise StoreTooNew(
                f"the store {self.path} has schema {version}; this program knows up to {SCHEMA_VERSION}",
                "upgrade speclora",
            )
        if version == SCHEMA_VERSION:
            return
        if read_only:
            raise StoreError(
                f"the store {self.path} has the older schema {version}",
                "start the collector once: it upgrades the store",
            )
        if version:
            self._back_up(version)
        with self._engine.begin() as connection:
            for number in range(version, SCHEMA_VERSION):
                _MIGRATIONS[number](connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _back_up(self, version: int) -> None:
        """A whole copy before an upgrade, the write-ahead log included, complete or not there at all."""
        final = self.path.with_name(f"{self.path.name}.backup-{version}-{int(time.time())}")
        scratch = final.with_name(f".{final.name}")
        try:
            scratch.unlink(missing_ok=True)
            os.close(os.open(scratch, os.O_CREAT | os.O_RDWR, 0o600))
            self._outside_transaction("VACUUM INTO ?", str(scratch))
            os.rename(scratch, final)
        except OSError as error:
            raise StoreError(f"the store {self.path} could not be copied before its upgrade: {error}") from error
        finally:
            scratch.unlink(missing_ok=True)

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

    # ------------------------------------------------------------------------------------------------ write
    def set_threshold(self, threshold: float) -> None:
        """What the `failures` view compares with."""
        with self._errors(), self._engine.begin() as connection:
            connection.execute(sa.delete(_THRESHOLD))
            connection.execute(sa.insert(_THRESHOLD).values(name="acceptance_threshold", value=str(threshold)))

    def add_rows(self, rows: Iterable[Row]) -> list[str]:
        """Store fetched records in one transaction; the ids that are now committed, old ones included.

        A body that is no record goes to quarantine in the same transaction, so that it blocks nothing. Raises StoreError
        (nothing stored, nothing to acknowledge) where the disk refuses.
        """
        rows = list(rows)
        read = [_read(row) for row in rows]
        with self._errors(), self._engine.begin() as connection:
            for table in (*_TABLES.values(), quarantine):  # generations before what was found out about them
                self._add(connection, table, [item for item in read if item.table is table])
            crash_point("store.before_commit")
        crash_point("store.after_commit")
        return [row.id for row in rows]

    def _add(self, connection: sa.Connection, table: sa.Table, items: list["_Incoming"]) -> None:
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

    def matching(self, ids: Sequence[str], before: float | None, pattern: str) -> list[str]:
        """Generation ids that a purge means: any of `ids`, older than `before`, or with `pattern` in any of its texts, in upper
        or lower case; at most PURGE_MOST of them, so that whoever wants all asks again.
        """
        wanted = [generations.c.id.in_(list(ids))] if ids else []
        if before is not None:
            wanted.append(generations.c.created_at < before)
        if pattern:
            g = generations.c
            wanted += [
                sa.func.lowered(column).contains(pattern.lower(), autoescape=True)
                for column in (g.prompt, g.output, g.messages, g.conversation_id)
            ]
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
            wanted.append(q.created < _iso(max(EARLIEST, min(before, LATEST))))
        if pattern:
            wanted.append(sa.func.lowered(q.raw).contains(pattern.lower(), autoescape=True))
        with self._errors(), self._engine.connect() as connection:
            return list(connection.execute(sa.select(q.id).where(sa.or_(*wanted)).limit(PURGE_MOST)).scalars())

    def texts(self, ids: Sequence[str]) -> list[str]:
        """Every text of these generations, for whoever must see that it is gone."""
        found: list[str] = []
        g = generations.c
        for start in range(0, len(ids), 500):
            query = sa.select(g.prompt, g.output, g.messages).where(g.id.in_(ids[start : start + 500]))
            for row in self._all(query):
                found += [row["prompt"], row["output"], *_strings(json.loads(row["messages"]))]
        return [text for text in found if text]

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
        """The oldest generations beyond an age, a number or a size; 0 means no such limit."""
        chosen: list[str] = []
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
        return chosen

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

    # ------------------------------------------------------------------------------------------------ read
    def _all(self, query: Any) -> list[dict[str, Any]]:
        with self._errors(), self._engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]

    def sql(self, text: str, **values: Any) -> list[dict[str, Any]]:
        """Rows of a written query, for views."""
        return self._all(sa.text(text).bindparams(**values))

    def summary(self, rolling: int = 50) -> Summary:
        """Everything `status` shows of the store."""
        g = generations.c
        (totals,) = self._all(
            sa.select(
                sa.func.count().label("n"),
                sa.func.sum(g.model_drafted).label("d"),
                sa.func.sum(g.model_accepted).label("a"),
            )
        )
        recent = self._all(
            sa.select(g.model_drafted, g.model_accepted, g.tokens_per_second).order_by(g.n.desc()).limit(rolling)
        )
        by_adapter = self._all(
            sa.select(
                g.adapter_id, sa.func.sum(g.model_drafted).label("d"), sa.func.sum(g.model_accepted).label("a")
            ).group_by(g.adapter_id)
        )
        runs = self._all(sa.select(training_runs).order_by(training_runs.c.n.desc()).limit(1))
        drafted = sum(row["model_drafted"] for row in recent)
        speeds = [row["tokens_per_second"] for row in recent if row["tokens_per_second"] > 0]  # imported ones have none
        return Summary(
            generations=totals["n"],
            disagreements=self._count("disagreements"),
            failures=self._count("failures"),
            pending_failures=self.pending_failures(),
            quarantined=self._count("quarantine"),
            lifetime_acceptance=_rate(totals["a"], totals["d"]),
            rolling_acceptance=_rate(sum(row["model_accepted"] for row in recent), drafted),
            rolling_tokens_per_second=sum(speeds) / len(speeds) if speeds else None,
            by_adapter={row["adapter_id"] or "none": _rate(row["a"], row["d"]) for row in by_adapter},
            last_verdict=_verdict(runs[0]) if runs else None,
        )

    def _count(self, name: str) -> int:
        return self._all(sa.select(sa.func.count().label("n")).select_from(sa.text(name)))[0]["n"]

    def adapter_runs(self) -> list[dict[str, Any]]:
        """What `adapter_history` has, newest first."""
        return self.sql("SELECT * FROM adapter_history")

    def activations_of(self, adapter_id: str) -> list[dict[str, Any]]:
        """When and by whom an adapter was used or sent away, oldest first."""
        return self.sql("SELECT * FROM adapter_activations WHERE adapter_id = :id", id=adapter_id)

    def pending_failures(self) -> int:
        """Failures stored since the last training run that used any."""
        (row,) = self.sql(
            "SELECT count(*) AS n FROM failures f JOIN generations g ON g.id = f.id WHERE g.n > coalesce((SELECT max(x.n) "
            "FROM generations x JOIN training_runs t ON t.last_generation = x.id), 0)"
        )
        return row["n"]

    def generation(self, id: str) -> StoredGeneration | None:
        """One generation, by its id or an unambiguous beginning of it."""
        rows = self._all(sa.select(generations).where(generations.c.id.startswith(id, autoescape=True)).limit(2))
        if len(rows) != 1:
            return None
        return StoredGeneration(rows[0], self._disagreements_of([rows[0]["id"]]).get(rows[0]["id"], []))

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those of `ids` that are no generation here (any more)."""
        found: set[str] = set()
        for start in range(0, len(ids), 500):
            query = sa.select(generations.c.id).where(generations.c.id.in_(ids[start : start + 500]))
            found.update(row["id"] for row in self._all(query))
        return [id for id in ids if id not in found]

    def _disagreements_of(self, ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for start in range(0, len(ids), 500):
            query = sa.select(disagreements).where(disagreements.c.generation_id.in_(ids[start : start + 500]))
            for row in self._all(query.order_by(disagreements.c.n)):
                found.setdefault(row["generation_id"], []).append(row)
        return found

    def recent_generations(self, limit: int, trainable: bool = False, since: float = 0.0) -> list[StoredGeneration]:
        """The newest first. `trainable` wants those with the target's top-k."""
        query = (
            sa.select(generations)
            .where(generations.c.created_at >= since)
            .order_by(generations.c.n.desc())
            .limit(limit)
        )
        if trainable:
            query = query.where(generations.c.top_ids.is_not(None))
        rows = self._all(query)
        lines = self._disagreements_of([row["id"] for row in rows])
        return [StoredGeneration(row, lines.get(row["id"], [])) for row in rows]

    def unscored(self, limit: int) -> list[StoredGeneration]:
        """Generations with neither figure yet: parked, so that only teacher-forced agreement can tell."""
        query = (
            sa.select(generations)
            .where(
                generations.c.acceptance_rate.is_(None),
                generations.c.agreement.is_(None),
                generations.c.top_ids.is_not(None),
            )
            .order_by(generations.c.n.desc())
            .limit(limit)
        )
        return [StoredGeneration(row, []) for row in self._all(query)]

    def each(self) -> Iterator[StoredGeneration]:
        """Every generation, oldest first, read in small pieces."""
        last = 0
        while rows := self._all(
            sa.select(generations).where(generations.c.n > last).order_by(generations.c.n).limit(200)
        ):
            lines = self._disagreements_of([row["id"] for row in rows])
            for row in rows:
                yield StoredGeneration(row, lines.get(row["id"], []))
            last = rows[-1]["n"]

    def export(self) -> Iterator[dict[str, Any]]:
        """Every generation in the sources' JSONL shape, oldest first."""
        for row in self.each():
            yield _exported(row.values, row.disagreements)


def _exported(row: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("position", "draft_token", "target_token", "draft_confidence", "target_confidence")
    messages = json.loads(row["messages"])
    return {
        "id": row["id"],
        "prompt": messages[-1]["content"] if messages else row["prompt"],
        "target_output": row["output"],
        "acceptance_rate": row["acceptance_rate"],
        "timestamp": row["created"],
        "disagreements": [
            {name: line[name] for name in names} | {"context_tokens": json.loads(line["context_tokens"])}
            for line in lines
        ],
    }


def _verdict(run: dict[str, Any]) -> dict[str, Any]:
    return {
        name: run[name]
        for name in ("created", "verdict", "reason", "adapter_id", "parent_id", "examples", "steps", "loss_last")
    }


def _rate(part: float | None, whole: float | None) -> float | None:
    return round(part / whole, 4) if whole else None


def _strings(value: Any) -> Iterator[str]:
    """Every text in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


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
