"""A purge that was stopped half-way is finished, not forgotten; what is short or plenty goes as well. No daemon runs here."""

import json
import sqlite3

import pytest

from specl.cli.chat.chat_input import open_history
from specl.shared.errors import SpecLoraError
from specl.shared.messaging.endpoints import Keys, write_keys
from specl.shared.paths import find_paths
from specl.shared.retention import purge
from specl.shared.retention.chat_history import history_file
from specl.shared.retention.checkpoints import checkpoint_folder
from specl.shared.runtime.locks import Lock, is_locked
from specl.shared.settings.schema import Records
from specl.shared.store import Store
from tests.fakes import make_generation, to_row

SECRET = "the purple heron of Aldersgate"


def spoken(id, text, **more):
    return make_generation(id, messages=[{"role": "user", "content": text}], prompt=f"<user>{text}", **more)


@pytest.fixture
def kept():
    """One generation with the secret, its hidden states and a checkpoint that learned from it; one that stays."""
    paths = find_paths().create()
    store = Store(paths.store)
    store.add_rows([to_row(spoken("a", SECRET)), to_row(spoken("b", "something else, that stays here"))])
    store.close()
    (paths.hidden / "a.npy").write_bytes(b"states")
    checkpoint = checkpoint_folder(paths.training)
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text(json.dumps({"ids": ["a"]}))
    return paths


def left(paths):
    return (paths.hidden / "a.npy").exists(), checkpoint_folder(paths.training).exists()


def ids_in(path):
    connection = sqlite3.connect(path)
    try:
        return [row[0] for row in connection.execute("SELECT id FROM generations ORDER BY n")]
    finally:
        connection.close()


def stop_after_the_store(monkeypatch, error):
    """The rows go, then nothing more."""
    real = Store.purge

    def half(self, ids):
        real(self, ids)
        if ids:
            raise error

    monkeypatch.setattr(Store, "purge", half)
    return lambda: monkeypatch.setattr(Store, "purge", real)


@pytest.mark.parametrize("again", [["--resume"], ["--pattern", "heron", "--yes"], ["--id", "a", "--yes"]])
@pytest.mark.parametrize("error", [SpecLoraError("another program reads it"), KeyboardInterrupt()])
def test_interrupted_purge_is_finished_by_the_next(specl, kept, monkeypatch, error, again):
    undo = stop_after_the_store(monkeypatch, error)
    stopped = specl("store", "purge", "--pattern", "HERON", "--yes")
    assert stopped.exit_code in (1, 130) and "--resume" in stopped.stderr
    assert ids_in(kept.store) == ["b"] and left(kept) == (True, True)
    assert kept.pending_purge.stat().st_mode & 0o077 == 0
    assert any("purge --resume" in problem for problem in specl("status", "--json").json["problems"])
    undo()
    finished = specl("store", "purge", *again)
    assert finished.exit_code == 0, finished.stderr
    assert "finishing the purge of" in finished.stdout and "is erased under" in finished.stdout
    assert left(kept) == (False, False) and not kept.pending_purge.exists()
    assert ids_in(kept.store) == ["b"]
    assert not any("purge" in problem for problem in specl("status", "--json").json["problems"])


def test_records_after_an_interrupted_full_purge_stay(specl, kept, monkeypatch):
    undo = stop_after_the_store(monkeypatch, SpecLoraError("busy"))
    assert specl("store", "purge", "--all", "--yes").exit_code == 1
    undo()
    store = Store(kept.store)
    store.add_rows([to_row(spoken("later", "said afterwards", created_at=9e9))])
    store.close()
    assert specl("store", "purge", "--resume").exit_code == 0
    assert ids_in(kept.store) == ["later"]


def test_id_that_prefixes_a_purged_one_is_found(specl, kept, monkeypatch):
    store = Store(kept.store)
    store.add_rows([to_row(spoken("1", "words one")), to_row(spoken("10", "words ten"))])
    store.close()
    undo = stop_after_the_store(monkeypatch, SpecLoraError("busy"))
    specl("store", "purge", "--id", "10", "--yes")
    undo()
    assert specl("store", "purge", "--id", "1", "--yes").exit_code == 0
    assert ids_in(kept.store) == ["a", "b"]


def test_truncated_purge_journal_is_used(specl, kept, monkeypatch):
    undo = stop_after_the_store(monkeypatch, SpecLoraError("busy"))
    specl("store", "purge", "--pattern", "heron", "--yes")
    with open(kept.pending_purge, "ab") as file:
        file.write(b'{"ids": ["b')
    undo()
    assert specl("store", "purge", "--resume").exit_code == 0
    assert left(kept) == (False, False) and ids_in(kept.store) == ["b"]


def test_a_purge_of_an_earlier_version_is_finished(specl, kept):
    request = {"begun": 1.0, "ids": [], "before": None, "pattern": "heron", "everything": False}
    lines = [{"wish": request}, {"ids": ["a"], "texts": [SECRET], "typed": [SECRET, "pin 1"]}]
    kept.pending_purge.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (kept.logs / "old.log").write_text(f'{{"error": "{SECRET}"}}\n{{"event": "kept"}}\n')
    history = open_history(kept, Records(), remember=True)
    for message in (SECRET, "pin 1", "stays"):
        history.store_string(message)
    assert specl("store", "purge", "--resume").exit_code == 0
    assert ids_in(kept.store) == ["b"] and left(kept) == (False, False)
    assert (kept.logs / "old.log").read_text() == '{"event": "kept"}\n'
    assert list(open_history(kept, Records(), remember=True).load_history_strings()) == ["stays"]


def test_resume_without_pending_purge_says_so(specl, kept):
    assert "no purge was stopped" in specl("store", "purge", "--resume").stdout
    assert specl("store", "purge", "--resume", "--all", "--yes").exit_code == 2
    lock = Lock(kept.run, "purge", "specl-ctl store purge")
    try:
        outcome = specl("store", "purge", "--all", "--yes")
        assert outcome.exit_code == 1 and "is at work" in outcome.stderr
    finally:
        lock.release()
    assert ids_in(kept.store) == ["a", "b"]


def test_a_large_purge_goes_in_portions(specl, kept, monkeypatch):
    from specl.shared.store import forgetting

    store = Store(kept.store)
    store.add_rows([to_row(spoken(f"n{n}", f"many words, number {n}")) for n in range(23)])
    store.close()
    asked = []
    real = purge.through_daemon
    monkeypatch.setattr(forgetting, "PURGE_MOST", 5)
    monkeypatch.setattr(purge, "PURGE_MOST", 5)
    monkeypatch.setattr(
        purge,
        "through_daemon",
        lambda client, role, message, *more: asked.append(len(message.ids)) or real(client, role, message, *more),
    )
    outcome = specl("store", "purge", "--pattern", "many words", "--yes", "--json")
    assert outcome.json["stored"] == 23 and ids_in(kept.store) == ["a", "b"]
    assert max(asked) == 5


def test_short_messages_leave_the_chats_history_too(specl, kept):
    store = Store(kept.store)
    store.add_rows([to_row(spoken("pin", "PIN 4711")), to_row(spoken("fenced", "one\nKey 9"))])
    store.close()
    history = open_history(kept, Records(), remember=True)
    for message in ("PIN 4711", "PIN 47", '"""one', 'Key 9"""', "stays"):
        history.store_string(message)
    assert specl("store", "purge", "--id", "pin", "--id", "fenced", "--yes").exit_code == 0
    assert list(open_history(kept, Records(), remember=True).load_history_strings()) == ["stays", "PIN 47"]
    (kept.root / "store.db.backup-2-1").write_bytes(b"a copy")
    assert specl("store", "purge", "--all", "--yes").exit_code == 0
    assert history_file(kept).read_bytes() == b"" and not list(kept.root.glob("*backup*"))


def test_prefix_ids_and_quarantined_ids_can_be_purged(specl, kept):
    from specl.shared.messaging.messages import Envelope

    store = Store(kept.store)
    store.add_rows(
        [to_row(spoken("1", "words one")), to_row(spoken("10", "words ten")), Envelope("bad", "Generation", b"x")]
    )
    store.close()
    assert specl("store", "show", "1", "--json").json["id"] == "1"
    assert specl("store", "purge", "--id", "1", "--yes").exit_code == 0
    assert specl("store", "purge", "--id", "bad", "--yes").exit_code == 0
    assert ids_in(kept.store) == ["a", "b", "10"]
    opened = Store(kept.store, read_only=True)
    assert opened.summary().quarantined == 0
    opened.close()


@pytest.mark.parametrize("command", [["purge", "--all", "--yes"], ["import", "--jsonl", "in.jsonl", "--text-only"]])
def test_purge_and_import_name_the_server(specl, tmp_path, monkeypatch, command):
    paths = find_paths()
    write_keys(paths.keys, Keys("p" * 40, "c" * 40, "s" * 40))
    (paths.keys / "server.json").unlink()
    settings = tmp_path / "s.yaml"
    settings.write_text("bus: {transport: tcp, host: 192.0.2.7}\n")
    monkeypatch.setenv("SPECL_CONFIG", str(settings))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "x", "target_output": "y"}\n')
    outcome = specl("store", *command)
    assert (
        outcome.exit_code == 2
        and "another machine" in outcome.stderr
        and f"store {command[0]}` there" in outcome.stderr
    )
    assert not paths.run.exists() and not paths.store.exists()


def test_purge_waits_for_a_command_holding_the_lock(specl, kept):
    import threading

    held = Lock(kept.run, "collector", "specl-ctl store import")
    threading.Timer(0.5, held.release).start()
    assert specl("store", "purge", "--id", "a", "--yes").exit_code == 0
    assert ids_in(kept.store) == ["b"]


@pytest.mark.process
def test_checking_a_lock_leaves_no_trace(tmp_path):
    import fcntl

    assert not is_locked(tmp_path, "collector") and not list(tmp_path.iterdir())
    Lock(tmp_path, "collector").release()
    with open(tmp_path / "collector.lock") as other:  # somebody else asks just now
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not is_locked(tmp_path, "collector")
    held = Lock(tmp_path, "collector")
    assert is_locked(tmp_path, "collector")
    held.release()
