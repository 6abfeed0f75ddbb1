"""Whatever a well-formed record says, it is stored or in quarantine, and those before and behind it are stored."""

import random
import sqlite3
from dataclasses import fields, replace

import pytest
import sqlalchemy as sa

from specl.shared.answer_stats import AnswerStats
from specl.shared.errors import StoreError, WireError
from specl.shared.messaging.codec import encode, kind_of
from specl.shared.messaging.daemon_status import CollectorStatus
from specl.shared.messaging.messages import Envelope
from specl.shared.store import Store, rows, schema
from tests.fakes import (
    make_activation,
    make_adapter_record,
    make_evaluation,
    make_generation,
    make_training_run,
    to_row,
)

HUGE = 2**64 - 1
JSON = (
    [],
    {},
    [[]],
    HUGE,
    -(2**63),
    "nan",
    "inf",
    None,
    True,
    1e308,
    "\0",
    "x" * 5000,
    {"": {"": []}},
    [HUGE, "1", None],
)
KEYS = ("temperature", "tokens_by_source", "role", "content", "a", "", "id", "data")


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "store.db")
    made.set_threshold(0.5)
    yield made
    made.close()


def between(store, *records):
    """Store them with a good record before and behind; ids in generations and in quarantine."""
    good = [to_row(make_generation(id)) for id in ("before", "behind")]
    poison = [Envelope(record.id, kind_of(record), encode(record)) for record in records]
    assert store.add_rows([good[0], *poison, good[1]]) == ["before", *(row.id for row in poison), "behind"]
    stored = {row["id"] for row in store.sql("SELECT id FROM generations")}
    assert {"before", "behind"} <= stored
    return stored, {row["id"]: row["reason"] for row in store.sql("SELECT id, reason FROM quarantine")}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"output_tokens": b"", "stats": AnswerStats(tokens_by_source={"a": 2**62})}, "output_count: out of range"),
        ({"sampling": {"temperature": "nan"}}, "temperature: out of range"),
        ({"sampling": {"temperature": []}}, "TypeError"),
        ({"model_drafted": 2**63 - 1}, "model_drafted: out of range"),
        ({"tokens_per_second": 1e308}, "tokens_per_second: out of range"),
        ({"created_at": 1e300}, "WireError|OverflowError|ValueError"),
    ],
)
def test_senseless_values_go_to_quarantine_with_their_reason(store, changes, reason):
    import re

    stored, bad = between(store, make_generation("bad", **changes))
    assert list(bad) == ["bad"] and re.search(reason, bad["bad"]) and "bad" not in stored
    between(store, make_generation("bad", **changes))  # a second time is no more of it


def test_record_refused_by_sqlite_is_quarantined(store, monkeypatch):
    real = rows.row_of
    monkeypatch.setattr(rows, "row_of", lambda record: real(record) | ({"mode": None} if record.id == "bad" else {}))
    late = make_evaluation("e", subject="generation", generation_id="before", agreement=0.25)
    stored, bad = between(store, late, make_generation("bad"))
    assert list(bad) == ["bad"] and "NOT NULL" in bad["bad"] and stored == {"before", "behind"}
    assert store.sql("SELECT count(*) AS n FROM disagreements")[0]["n"] == 2
    assert store.sql("SELECT agreement FROM generations WHERE id = 'before'")[0]["agreement"] == 0.25


def test_a_disk_that_refuses_puts_nothing_into_quarantine(store, monkeypatch):
    def full(*arguments):
        raise sa.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))

    monkeypatch.setattr(Store, "_add", full)
    with pytest.raises(StoreError, match="disk is full"):
        store.add_rows([to_row(make_generation("g"))])
    monkeypatch.undo()
    assert store.summary().quarantined == 0 and store.add_rows([to_row(make_generation("g"))]) == ["g"]


def senseless(record, chance):
    """The record with two to four fields changed to values of the declared types that nobody would write."""
    by_type = {
        int: (0, -1, 2**63 - 1, -(2**63)), float: (0.0, -1.0, 1e308, 5e-324, 1e18, -1e18), str: ("", "\0", "\ud7ff", "x" * 10_000),
        bytes: (b"", b"\1", b"\xff" * 999),
    }  # fmt: skip
    names = [field.name for field in fields(record) if field.name != "id"]
    changes = {}
    for name in chance.sample(names, chance.randint(2, 4)):
        value = getattr(record, name)
        if isinstance(value, dict):
            changes[name] = {key: chance.choice(JSON) for key in chance.sample(KEYS, chance.randint(0, 4))}
        elif name == "messages":
            changes[name] = [
                {key: chance.choice(JSON) for key in chance.sample(KEYS, 3)} for _ in range(chance.randint(0, 2))
            ]
        elif type(value) in by_type:
            changes[name] = chance.choice(by_type[type(value)])
        elif value is None:
            changes[name] = None
        elif isinstance(value, list):
            changes[name] = []
    return replace(record, **changes)


def test_thousand_senseless_records_end_no_reader(store):
    chance = random.Random(11)
    makers = (make_generation, make_activation, make_training_run, make_evaluation, make_adapter_record)
    sent = []
    while len(sent) < 1000:
        record = senseless(chance.choice(makers)(f"r{len(sent)}"), chance)
        try:
            sent.append(Envelope(record.id, kind_of(record), encode(record)))
        except WireError:  # not well-formed: its producer refuses it
            continue
    for start in range(0, len(sent), 100):
        store.add_rows(sent[start : start + 100])
    tables = [table.name for table in (*schema.TABLES.values(), schema.quarantine)]
    found = [row["id"] for table in tables for row in store.sql(f"SELECT id FROM {table}")]
    assert sorted(found) == sorted(row.id for row in sent)
    bad = store.summary().quarantined
    assert 0 < bad < len(sent)
    encode(CollectorStatus("ready", 1.0, 1, "", 0, {}, store.summary()))
    ids = [row["id"] for row in store.sql("SELECT id FROM generations")]
    store.texts(ids), list(store.export())
    assert store.purge(store.matching([], 9e18, "")) >= len(ids)
