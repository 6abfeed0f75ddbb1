"""A pattern is found wherever it stands: behind U+0000, with accents, across what JSON escapes, in store and outbox alike."""

import sqlite3

import pytest

from specl.shared.messaging.messages import Envelope, Purge
from specl.shared.messaging.outbox import Outbox
from specl.shared.retention.purge_matching import purge_matches
from specl.shared.store import Store
from tests.fakes import make_generation, to_row

TEXTS = {
    "before\0after the zero": "AFTER the zero",
    "a lone \0\0\0 row of zeros, then words": "then words",
    "ÜBER ÉCOLE": "über école",
    "École": "e\N{COMBINING ACUTE ACCENT}cole",
    "STRASSE": "straße",
    "ΟΔΟΣ": "οδος",
    'she said "yes"': 'SAID "yes"',
    "one\nline\tand\\another": "LINE\tand\\another",
    "an emoji \N{GRINNING FACE} here": "\N{GRINNING FACE} HERE",
}


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "store.db")
    yield made
    made.close()


def of(text, field):
    bare = {"prompt": "", "output": "", "messages": [], "conversation_id": "x"}
    return make_generation("g", **bare | {field: [{"role": "user", "content": text}] if field == "messages" else text})


@pytest.mark.parametrize("field", ["prompt", "output", "messages", "conversation_id"])
@pytest.mark.parametrize("text, pattern", TEXTS.items())
def test_pattern_is_found_in_store_and_outbox(store, field, text, pattern):
    row = to_row(of(text, field))
    store.add_rows([row, to_row(make_generation("other"))])
    assert store.matching([], None, pattern) == ["g"]
    assert purge_matches(Purge([], None, pattern), row)


def test_name_behind_a_hash_is_no_hash(store):
    record = make_generation("g", conversation_id="0badc0de" * 4 + "\0my name")
    store.add_rows([to_row(record)])
    assert store.matching([], None, "my name") == ["g"]


def test_pattern_is_found_in_unreadable_records(store):
    store.add_rows([Envelope("p", "Generation", "half\0a RÉCORD".encode())])
    assert store.matching([], None, "a récord") == ["p"]


def test_sorting_writes_no_temporary_files(store, tmp_path, monkeypatch):
    opened, connect = [], sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **more: opened.append(connect(*a, **more)) or opened[-1])
    Outbox(tmp_path / "outbox.db")
    reader = Store(tmp_path / "store.db", read_only=True)
    memory = [opened[0].execute("PRAGMA temp_store").fetchone()[0]]
    memory += [one.sql("PRAGMA temp_store")[0]["temp_store"] for one in (store, reader)]
    assert memory == [2, 2, 2]
