"""A store's file becomes today's step by step: each step makes the schema of its day, and all of them today's tables."""

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa

from specl.shared.errors import StoreError
from specl.shared.store import SCHEMA_VERSION, Store
from specl.shared.store.migrations import MIGRATIONS
from specl.shared.store.schema import metadata
from tests.fakes import make_generation, to_row

V1 = Path(__file__).parents[2] / "fixtures" / "v1"


def schema_of(path):
    """The SQL of every table, index and view, as it stands in the file."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        rows = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
        return {(kind, name): sql for kind, name, sql in rows}
    finally:
        connection.close()


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_steps_make_the_schema_of_their_day(version, tmp_path):
    Store(tmp_path / "store.db", migrations=MIGRATIONS[:version]).close()
    assert schema_of(tmp_path / "store.db") == schema_of(V1 / f"store-schema{version}.db")


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_an_upgraded_store_equals_a_fresh_one(version, tmp_path):
    Store(tmp_path / "fresh.db").close()
    (tmp_path / "old.db").write_bytes((V1 / f"store-schema{version}.db").read_bytes())
    Store(tmp_path / "old.db").close()
    assert schema_of(tmp_path / "old.db") == schema_of(tmp_path / "fresh.db")


def test_a_fresh_store_has_the_described_tables(tmp_path):
    Store(tmp_path / "store.db").close()
    stored = sa.MetaData()
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'store.db'}")
    stored.reflect(engine)
    engine.dispose()
    assert described(stored) == described(metadata)


def described(tables):
    """Columns with type, nullability and key, indexes and unique columns of every table."""
    return {
        table.name: (
            [(c.name, str(c.type), c.nullable, c.primary_key, c.server_default is not None) for c in table.columns],
            sorted((index.name, index.columns.keys()) for index in table.indexes),
            sorted(c.columns.keys() for c in table.constraints if isinstance(c, sa.UniqueConstraint)),
        )
        for table in tables.sorted_tables
    }


def test_a_failing_upgrade_leaves_one_copy(tmp_path, monkeypatch):
    path = tmp_path / "old.db"
    store = Store(path)
    store.add_rows([to_row(make_generation("g"))])
    store.close()
    broken = (*MIGRATIONS, ("CREATE TABLE half AS SELECT * FROM generations", "SELECT nonsense"))
    for second in range(4):
        monkeypatch.setattr("specl.shared.store.file.time.time", lambda second=second: 1e9 + second)
        with pytest.raises(StoreError, match="nonsense"):
            Store(path, migrations=broken)
    (copy,) = tmp_path.glob("*old.db.backup-*")
    with sqlite3.connect(copy) as connection:
        assert connection.execute("SELECT id FROM generations").fetchall() == [("g",)]
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


@pytest.mark.parametrize(
    ("event", "sentence"), [("activated", "for no reason"), ("unloaded", ""), ("activated", "by hand?")]
)
def test_unknown_sentences_are_kept_under_another_code(event, sentence, tmp_path):
    path = tmp_path / "store.db"
    Store(path, migrations=MIGRATIONS[:4]).close()
    with sqlite3.connect(path) as connection:
        values = ("a", 1.0, "1970-01-01T00:00:01Z", event, "000001", "", sentence, "{}")
        columns = "id, created_at, created, event, adapter_id, previous_id, reason, details"
        connection.execute(f"INSERT INTO activations ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
    Store(path).close()
    with sqlite3.connect(path) as connection:
        query = "SELECT who, reason, note FROM adapter_activations"
        assert connection.execute(query).fetchall() == [("other", "other", sentence)]
