"""The collector without a socket: its status is quick, it removes what the settings do not keep."""

import time

import pytest

from specl.daemons.collector import service
from specl.daemons.collector.summary import CHEAP_S, MAX_AGE_S, TIME_SHARE, SummaryCache
from specl.daemons.collector.trusted_clock import LASTING_S
from specl.shared.answer_stats import AnswerStats
from specl.shared.errors import StoreError
from specl.shared.messaging.messages import Envelope, Import, RecordBatch, Reply
from specl.shared.paths import find_paths
from specl.shared.retention.chat_history import history_file
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
    collectors = []

    def make(**records):
        paths = find_paths().create()
        settings = Settings.model_validate({"records": records})
        collectors.append(service.Collector(paths, settings, Server(), lambda: Store(paths.store)))
        return collectors[-1]

    yield make
    for collector in collectors:
        collector.close()


def deliver(collector, *ids, **changes):
    rows = [to_row(make_generation(id, **changes)) for id in ids]
    collector.receive(collector.producers[0], RecordBatch(rows, 0))


def expire(collector):
    collector.expiry.run(lambda: collector.store, time.monotonic())


class Clock:
    """Time that passes only while figures are made."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def cache(clock):
    """Figures that count how often they were made, in `cost` seconds each."""

    def make():
        clock.now += cache.cost
        cache.made += 1
        return cache.made

    cache = SummaryCache(make, clock)
    cache.cost, cache.made = 2 * CHEAP_S, 0
    return cache


def test_expensive_figures_are_not_made_for_requests(cache):
    cache.make()
    cache.invalidate()
    for _ in range(5):
        cache.refresh_if_cheap()
    assert cache.summary == 1


def test_expensive_figures_take_a_share_of_time(cache, clock):
    cache.make()
    assert cache.due_at is None
    cache.invalidate()
    assert cache.due_at == pytest.approx(clock.now + TIME_SHARE * cache.cost)


def test_cheap_figures_are_current(cache, clock):
    cache.cost = CHEAP_S / 2
    cache.make()
    cache.refresh_if_cheap()
    assert cache.summary == 1
    cache.invalidate()
    cache.refresh_if_cheap()
    assert cache.summary == 2
    clock.now += 2 * MAX_AGE_S
    cache.refresh_if_cheap()
    assert cache.summary == 3


def test_status_tells_why_figures_are_old(collector, monkeypatch):
    one = collector()
    one.open()

    def refuse(store):
        raise StoreError("the disk is gone")

    monkeypatch.setattr(Store, "summary", refuse)
    deliver(one, "a")
    status = one.status()
    assert status.trouble == "the disk is gone" and status.summary.generations == 0


def test_stale_figures_are_made_between_commits(collector):
    one = collector()
    one.open()
    deliver(one, "a")
    end = time.monotonic() + 60
    while one.summary.summary.generations == 0 and time.monotonic() < end:
        one.step()
    assert one.summary.summary.generations == 1 and one.server.waited <= service.POLL_S


def test_figures_read_no_row_as_a_whole(collector):
    """On a full store each row is some ten pages; only the last fifty speeds are read from rows."""
    import sqlalchemy as sa

    one = collector()
    deliver(one, *map(str, range(9)))
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
    deliver(one, "old", created_at=time.time() - 9 * 86400)
    hidden = one.paths.hidden / "old.npy"
    hidden.write_bytes(b"states")
    real, tries = Store._empty_log, []

    def busy(store):
        tries.append(1)
        if len(tries) == 1:
            raise StoreError("another program reads it")
        real(store)

    monkeypatch.setattr(Store, "_empty_log", busy)
    expire(one)
    assert not hidden.exists() and one.store.summary().generations == 0
    expire(one)
    expire(one)
    assert len(tries) == 2, "the log is emptied once that is possible, though no row is left"


def test_unreadable_records_and_store_copies_expire(collector):
    one = collector(retention_days=5)
    one.store.add_rows([Envelope(id, "Generation", b"poison") for id in ("old", "new")])
    with one.store._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE quarantine SET created = '2020-01-01T00:00:00Z' WHERE id = 'old'")
    now = int(time.time())
    for age in (9, 1):
        (one.paths.root / f"store.db.backup-3-{now - 86400 * age}").write_bytes(b"")
    expire(one)
    assert one.store.sql("SELECT id FROM quarantine") == [{"id": "new"}]
    assert [path.name for path in one.store.backups()] == [f"store.db.backup-3-{now - 86400}"]


def test_clock_ahead_for_a_moment_removes_nothing(collector, monkeypatch):
    one = collector(retention_days=30)
    deliver(one, "new", created_at=time.time())
    backup = one.paths.root / f"store.db.backup-3-{int(time.time())}"
    backup.write_bytes(b"")
    one.store.add_rows([Envelope("unreadable", "Generation", b"poison")])
    ahead = time.time() + 365 * 86400
    for first in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: ahead)
            if not first:
                deliver(one, "asked meanwhile", created_at=ahead)
            expire(one)
        expire(one)
    assert one.store.summary().generations == 2 and one.store.summary().quarantined == 1 and backup.exists()


def test_machine_switched_off_for_long_expires_later(collector, monkeypatch):
    one = collector(retention_days=30)
    deliver(one, "old", created_at=time.time())
    later, start = time.time() + 365 * 86400, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: later)
    one.expiry.run(lambda: one.store, start)
    assert one.store.summary().generations == 1
    one.expiry.run(lambda: one.store, start + LASTING_S)
    assert one.store.summary().generations == 0


@pytest.mark.parametrize("records", [{"keep": "statistics"}, {"redact": ["x"]}, {"retention_days": 5}])
def test_chat_history_goes_where_not_kept(collector, records):
    for settings, is_left in (({}, True), (records, False)):
        one = collector(**settings)
        history = history_file(one.paths)
        if settings == {}:
            history.write_text("\n# now\n+a secret\n")
        expire(one)
        assert history.exists() == is_left


def test_one_store_copy_is_kept_without_limit(collector):
    one = collector()
    for name in ("2-9", "3-10", "1-8"):
        (one.paths.root / f"store.db.backup-{name}").write_bytes(b"")
    expire(one)
    assert [path.name for path in one.store.backups()] == ["store.db.backup-3-10"]


def test_import_of_impossible_rows_is_answered(collector):
    one = collector()
    poison = to_row(make_generation("p", output_tokens=b"", stats=AnswerStats(tokens_by_source={"a": 2**62})))
    one.handle(b"peer", Import([poison, to_row(make_generation("g"))]))
    (reply,) = one.server.sent
    assert isinstance(reply, Reply) and reply.ok
    assert one.store.summary().generations == 1 and one.store.summary().quarantined == 1
