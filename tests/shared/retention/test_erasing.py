"""What a purge removes is overwritten first: its own notes, copies of the store, past answers, the ends of logs."""

import os
import time

import pytest

from specl.shared.retention.answer_files import AnswerFiles
from specl.shared.retention.purge_journal import PurgeJournal, PurgeRequest
from specl.shared.retention.purged_text import PurgedText, erase_from_logs
from specl.shared.runtime.atomic_files import erase_file
from specl.shared.store import Store

SECRET = b"my secret words"


def left_behind(path, remove):
    """What the disk has in the place of a file's bytes once it is removed."""
    with open(path, "rb") as file:
        remove()
        return file.read()


def test_purge_overwrites_its_own_notes(tmp_path):
    journal = PurgeJournal(tmp_path / "purge.pending")
    request = PurgeRequest(time.time(), [], None, SECRET.decode())
    journal.begin(request)
    assert SECRET in journal.path.read_bytes()
    assert SECRET not in left_behind(journal.path, lambda: journal.begin(request))
    assert SECRET not in left_behind(journal.path, journal.end)
    assert not journal.path.exists()


def test_store_copies_and_answers_are_overwritten(tmp_path):
    store = Store(tmp_path / "store.db")
    backup = tmp_path / "store.db.backup-1-5"
    backup.write_bytes(SECRET * 100_000)
    assert SECRET not in left_behind(backup, lambda: store.drop_backups(1, time.time()))
    store.close()
    files = AnswerFiles(tmp_path / "answers")
    files.write("me", [(1.0, [7, 8, 9, 10])])
    (path,) = files.folder.iterdir()
    assert not any(left_behind(path, files.purge))


def test_ends_of_shortened_logs_are_overwritten(tmp_path, monkeypatch):
    log, sizes = tmp_path / "x.log", []
    log.write_bytes(SECRET + b" and more of them\n" + b"kept\n")
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append(log.read_bytes()))
    erase_from_logs([log], PurgedText([SECRET.decode() + " and more of them"]))
    assert log.read_bytes() == b"kept\n" and sizes and SECRET not in sizes[0]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_what_a_link_points_to_stays(tmp_path, link):
    target, path = tmp_path / "target", tmp_path / "link"
    target.write_bytes(SECRET)
    link(target, path)
    erase_file(path)
    erase_file(path)
    assert target.read_bytes() == SECRET and not path.exists()
