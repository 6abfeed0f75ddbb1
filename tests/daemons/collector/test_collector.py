"""The collector without a socket: what it says of itself at once, what it lets go of and in which order."""

import time

import pytest

from specl.daemons.collector import service
from specl.shared.answer_stats import AnswerStats
from specl.shared.errors import StoreError
from specl.shared.messaging.messages import Envelope, Import, RecordBatch, Reply
from specl.shared.paths import find_paths
from specl.shared.settings.schema import Settings
from specl.shared.store import Store
from tests.fakes import make_generation, to_row


class Server:
    """Where the bus would be."""

    malformed = 0

    def __init__(self):
        self.sent = []

    def requester(self, endpoint, heard):
        return lambda message: None

    def subscribe(self, endpoint, heard):
        pass

    def poll(self, timeout_s, handle):
        self.waited = timeout_s

    def send(self, peer, message):
        self.sent.append(message)


@pytest.fixture
def collector():
    made = []

    def make(**records):
        paths = find_paths().create()
        settings = Settings.model_validate({"records": records})
        made.append(service.Collector(paths, settings, Server(), lambda: Store(paths.store)))
        return made[-1]

    yield make
    for one in made:
        if one._store is not None:
            one._store.close()


def arrive(collector, *ids, **changes):
    rows = [to_row(make_generation(id, **changes)) for id in ids]
    collector._arrived(collector.lines[0], RecordBatch(rows, 0))


def test_status_uses_the_last_summary_meanwhile(collector, monkeypatch):
    one = collector()
    one._look()
    looks = []
    real = Store.summary

    def slow(store):
        looks.append(time.sleep(2 * service.CHEAP_S))
        return real(store)

    monkeypatch.setattr(Store, "summary", slow)
    one._summarise()
    arrive(one, "a")
    for _ in range(5):
        assert one._status().summary.generations == 0
    assert len(looks) == 1, "nobody waits for figures"
    one._tidy_at = time.monotonic() + 99
    for _ in range(20):
        one._turn()
    assert len(looks) == 1, "they take at most one part in SUMMARY_SHARE of the time"
    one._summary_due = 0.0
    one._turn()
    assert len(looks) == 2 and one._status().summary.generations == 1
    assert one.server.waited <= service.TICK_S


def test_quick_figures_are_those_of_now(collector, monkeypatch):
    monkeypatch.setattr(service, "CHEAP_S", 60.0)
    one = collector()
    one._look()
    arrive(one, "a")
    assert one._status().summary.generations == 1


def test_figures_read_no_row_as_a_whole(collector):
    """On a full store each row is some ten pages; only the last fifty speeds are read from rows."""
    import sqlalchemy as sa

    one = collector()
    arrive(one, *map(str, range(9)))
    asked = []
    sa.event.listen(one.store._engine, "before_cursor_execute", lambda *a: asked.append((a[2], a[3])))
    one.store.summary()
    with one.store._engine.connect() as connection:
        plans = [
            (statement, row[3])
            for statement, values in asked
            if statement.startswith("SELECT") and "LIMIT" not in statement
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)
        ]
    read = [plan for plan in plans if "generations" in plan[1]]
    assert read and not [
        plan for plan in read if "COVERING INDEX" not in plan[1] and "rowid" not in plan[1] and "id=?" not in plan[1]
    ]


def test_dependent_rows_go_although_the_log_stays(collector, monkeypatch):
    one = collector(retention_days=5)
    arrive(one, "old", created_at=time.time() - 9 * 86400)
    hidden = one.paths.hidden / "old.npy"
    hidden.write_bytes(b"states")
    real, tries = Store._empty_log, []

    def busy(store):
        tries.append(1)
        if len(tries) == 1:
            raise StoreError("another program reads it")
        real(store)

    monkeypatch.setattr(Store, "_empty_log", busy)
    one._tidy()
    assert not hidden.exists() and one.store.summary().generations == 0
    one._tidy()
    one._tidy()
    assert len(tries) == 2, "the log is emptied once that is possible, though no row is left"


def test_unreadable_records_and_store_copies_expire(collector):
    one = collector(retention_days=5)
    one.store.add_rows([Envelope(id, "Generation", b"poison") for id in ("old", "new")])
    with one.store._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE quarantine SET created = '2020-01-01T00:00:00Z' WHERE id = 'old'")
    now = int(time.time())
    for age in (9, 1):
        (one.paths.root / f"store.db.backup-3-{now - 86400 * age}").write_bytes(b"")
    one._tidy()
    assert one.store.sql("SELECT id FROM quarantine") == [{"id": "new"}]
    assert [path.name for path in one.store.backups()] == [f"store.db.backup-3-{now - 86400}"]


def test_one_store_copy_is_kept_without_limit(collector):
    one = collector()
    for name in ("2-9", "3-10", "1-8"):
        (one.paths.root / f"store.db.backup-{name}").write_bytes(b"")
    one._tidy()
    assert [path.name for path in one.store.backups()] == ["store.db.backup-3-10"]


def test_import_of_impossible_rows_is_answered(collector):
    one = collector()
    poison = to_row(make_generation("p", output_tokens=b"", stats=AnswerStats(tokens_by_source={"a": 2**62})))
    one._request(b"peer", Import([poison, to_row(make_generation("g"))]))
    (reply,) = one.server.sent
    assert isinstance(reply, Reply) and reply.ok
    assert one.store.summary().generations == 1 and one.store.summary().quarantined == 1
