"""The store's schema moves forward in one transaction with a copy kept, or not at all; a newer one is refused."""

import sqlite3

import pytest

from specl.shared.errors import StoreError, StoreTooNew
from specl.shared.messaging.codec import encode
from specl.shared.messaging.messages import Envelope
from specl.shared.store import SCHEMA_VERSION, Store
from specl.shared.store.migrations import MIGRATIONS
from tests.harness.records import generation
from tests.harness.waiting import wait_until

NOW = SCHEMA_VERSION
ADD_COLUMN = "ALTER TABLE generations ADD COLUMN mood TEXT"
NEXT = (*MIGRATIONS, (ADD_COLUMN,))  # what a newer program would do


@pytest.fixture
def older(tmp_path):
    """A store of today's schema with a row that is still in its write-ahead log."""
    path = tmp_path / "store.db"
    store = Store(path)
    store.add_rows([Envelope("a", "Generation", encode(generation("a")))])

    yield path
    store.close()


def version(path):
    with sqlite3.connect(path) as db:
        return db.execute("PRAGMA user_version").fetchone()[0]


def test_an_older_store_is_copied_and_upgraded(older):
    store = Store(older, migrations=NEXT)
    (backup,) = store.backups()
    assert version(older) == NOW + 1 and version(backup) == NOW
    assert backup.stat().st_mode & 0o077 == 0
    with sqlite3.connect(older) as db:
        assert db.execute("SELECT id, mood FROM generations").fetchall() == [("a", None)]
    with sqlite3.connect(backup) as db:
        assert db.execute("SELECT id FROM generations").fetchall() == [("a",)]
    store.close()
    assert len(Store(older, migrations=NEXT).backups()) == 1


def test_an_upgrade_that_fails_changes_nothing(older):
    with pytest.raises(StoreError):
        Store(older, migrations=(*MIGRATIONS, (ADD_COLUMN, "SELECT nonsense")))
    assert version(older) == NOW
    with sqlite3.connect(older) as db:
        assert "mood" not in [row[1] for row in db.execute("PRAGMA table_info(generations)")]


def test_reader_does_not_upgrade_an_older_store(older):
    with pytest.raises(StoreError, match=f"older schema {NOW}"):
        Store(older, read_only=True, migrations=NEXT)


def test_newer_store_is_refused_and_not_retried(instance):
    Store(instance.paths.store).close()
    with sqlite3.connect(instance.paths.store) as db:
        db.execute("PRAGMA user_version = 99")
    collector = instance.start("collector")
    wait_until(lambda: collector.code is not None, 10, "it ends")
    assert collector.code == 78
    assert "schema 99" in instance.output("collector") and "upgrade speclora" in instance.output("collector")
    with pytest.raises(StoreTooNew):
        Store(instance.paths.store, read_only=True)
