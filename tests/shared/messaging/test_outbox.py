"""What was accepted stays until it is let go, whatever dies when."""

import sqlite3
import stat
import threading

import pytest

from specl.shared.errors import OutboxFull
from specl.shared.messaging.messages import Envelope
from specl.shared.messaging.outbox import Outbox
from tests.fakes import run_python


@pytest.fixture
def path(tmp_path):
    return tmp_path / "outbox" / "inference.db"


def ids(outbox):
    return [row.id for row in outbox.oldest()]


def test_accepted_records_survive_reopening_in_order(path):
    outbox = Outbox(path)
    for id in ("b", "a", "c"):
        outbox.append(id, "Generation", id.encode())
    outbox.close()
    again = Outbox(path)
    assert again.oldest() == [Envelope(id, "Generation", id.encode()) for id in ("b", "a", "c")]
    assert (again.pending, again.bytes) == (3, 3)


def test_the_same_id_twice_is_that_record_once(path):
    outbox = Outbox(path)
    outbox.append("a", "Generation", b"first")
    outbox.append("a", "Generation", b"second")
    assert outbox.oldest() == [Envelope("a", "Generation", b"first")]
    assert (outbox.pending, outbox.bytes) == (1, 5)


def test_size_cap_refuses_and_keeps_accepted(path):
    outbox = Outbox(path, limit_bytes=10)
    outbox.append("a", "Generation", b"12345678")
    with pytest.raises(OutboxFull):
        outbox.append("b", "Generation", b"123")
    outbox.append("c", "Generation", b"12")
    assert ids(outbox) == ["a", "c"]
    outbox.discard(["a"])
    outbox.append("b", "Generation", b"123")
    assert ids(outbox) == ["c", "b"]


def test_the_cap_counts_what_an_earlier_process_left(path):
    Outbox(path, limit_bytes=10).append("a", "Generation", b"12345678")
    with pytest.raises(OutboxFull):
        Outbox(path, limit_bytes=10).append("b", "Generation", b"123")


def test_discarding_unknown_ids_changes_nothing(path):
    outbox = Outbox(path)
    outbox.append("a", "Generation", b"x")
    outbox.discard([])
    outbox.discard(["z", "y"])
    assert ids(outbox) == ["a"]


def test_batch_is_bounded_but_one_always_fits(path):
    outbox = Outbox(path)
    for number in range(5):
        outbox.append(str(number), "Generation", bytes(100))
    assert len(outbox.oldest(limit=3)) == 3
    assert len(outbox.oldest(max_bytes=250)) == 2
    assert len(outbox.oldest(max_bytes=1)) == 1
    assert outbox.oldest(limit=0) == outbox.oldest(limit=-1) == []
    assert len(outbox.oldest(limit=10**9)) == 5


def test_a_purged_record_is_gone_from_the_disk(path):
    outbox = Outbox(path)
    outbox.append("a", "Generation", b"S3CR3T-TEXT" * 500)
    outbox.append("b", "Generation", b"kept")
    outbox.purge(["a"])
    assert ids(outbox) == ["b"]
    for file in path.parent.iterdir():
        assert b"S3CR3T-TEXT" not in file.read_bytes(), file


def test_threads_share_an_outbox(path):
    outbox = Outbox(path)

    def work(name):
        for number in range(15):
            outbox.append(f"{name}-{number}", "Generation", b"x")

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outbox.pending == len(outbox.oldest()) == 30
    for name in "ab":
        assert [id for id in ids(outbox) if id[0] == name] == [f"{name}-{number}" for number in range(15)]


def test_only_its_owner_may_read_it(path):
    Outbox(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_non_database_file_is_an_error(path):
    path.parent.mkdir()
    path.write_bytes(b"not a database at all, but long enough to look at" * 50)
    outbox = Outbox(path)
    assert "inference.db" in outbox.problem
    with pytest.raises(OutboxFull, match="inference.db"):
        outbox.append("a", "Generation", b"x")


def test_a_locked_file_refuses_in_its_own_words(path):
    outbox = Outbox(path, lock_timeout_s=0.0)
    outbox.append("a", "Generation", b"x")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(OutboxFull):
        outbox.append("b", "Generation", b"x")
    with pytest.raises(OutboxFull):
        outbox.discard(["a"])
    other.execute("ROLLBACK")
    outbox.append("b", "Generation", b"x")
    assert ids(outbox) == ["a", "b"]


SCRIPT = """
import sys
from pathlib import Path
from specl.shared.messaging.outbox import Outbox
outbox = Outbox(Path(sys.argv[1]) if len(sys.argv) > 1 else Path({path!r}))
outbox.append("one", "Generation", b"1")
print("accepted one", flush=True)
outbox.append("two", "Generation", b"2")
print("accepted two", flush=True)
outbox.discard(["one"])
print("let go of one", flush=True)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("point", "said", "left"),
    [
        ("outbox.before_commit:2", "accepted one", {"one"}),
        ("outbox.after_commit:2", "accepted one", {"one", "two"}),
        ("outbox.before_delete", "accepted two", {"one", "two"}),
        ("outbox.after_delete", "accepted two", {"two"}),
    ],
)
def test_dying_anywhere_loses_nothing_that_was_accepted(path, point, said, left):
    died = run_python(SCRIPT.format(path=str(path)), SPECL_CRASH_AT=point)
    assert died.returncode == 137, died.stderr
    assert died.stdout.splitlines()[-1] == said
    outbox = Outbox(path)
    assert set(ids(outbox)) == left
    assert outbox.pending == len(left)
    outbox.append("three", "Generation", b"3")
    assert ids(outbox)[-1] == "three"
