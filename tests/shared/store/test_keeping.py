"""Outbox, store and adapter directories: what was accepted is kept, writes are idempotent and atomic, whatever is killed when."""

import json
import os
import sqlite3
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest
from safetensors.numpy import save_file

from specl.shared.adapters.registry import Adapters, Manifest
from specl.shared.errors import AdapterRejected, OutboxFull, StoreError
from specl.shared.messaging import codec, messages
from specl.shared.messaging.outbox import Outbox
from specl.shared.store import Store
from tests.fakes import ROOT


def generation(id=None, acceptance=0.2, text="hello", created=None, agreement_only=False):
    tokens = np.arange(5, dtype="<u4").tobytes()
    top = messages.TopK(2, np.zeros((5, 2), "<u4").tobytes(), np.zeros((5, 2), "<f2").tobytes(), bytes(10), bytes(10))
    lines = [messages.Disagreement(2, 7, 9, " a", " b", 0.5, 0.75, "model", 1, [1, 2, 3])]
    return messages.Generation(
        id=id or uuid.uuid4().hex, conversation_id="c", created_at=created or time.time(), mode="detailed",
        messages=[{"role": "user", "content": text}], prompt=text, prompt_tokens=tokens, output=f"{text} there", output_tokens=tokens,
        finish_reason="stop", sampling={"temperature": 0.0}, drafted=20, accepted=4, model_drafted=20, model_accepted=4, rounds=9,
        acceptance_rate=None if agreement_only else acceptance, tokens_per_second=30.0, ttft_ms=50.0, target_model="t", draft_model="d",
        target_fingerprint="tf", draft_fingerprint="df", adapter_id="", sources=bytes(5), stats=None, disagreements=lines, top_k=top,
    )  # fmt: skip


def row(record):
    return messages.Envelope(record.id, codec.kind_of(record), codec.encode(record))


# ------------------------------------------------------------------------------------------------ outbox
def test_accepted_records_survive_reopening_in_order_and_once(tmp_path):
    cli_instance = Outbox(tmp_path / "o.db")
    for name in ("a", "b", "b", "c"):
        cli_instance.append(name, "Generation", name.encode())
    cli_instance.close()
    again = Outbox(tmp_path / "o.db")
    assert [r.id for r in again.oldest()] == ["a", "b", "c"] and again.pending == 3
    again.discard(["a", "zzz"])
    assert [r.id for r in again.oldest(1)] == ["b"]


def test_full_outbox_refuses_new_and_keeps_old(tmp_path):
    cli_instance = Outbox(tmp_path / "o.db", limit_bytes=1000)
    cli_instance.append("a", "Generation", b"x" * 900)
    with pytest.raises(OutboxFull):
        cli_instance.append("b", "Generation", b"x" * 200)
    assert [r.id for r in cli_instance.oldest()] == ["a"]


CRASH = """
import sys
from pathlib import Path
from specl.shared.messaging.outbox import Outbox
box = Outbox(Path(sys.argv[1]))
box.append("old", "Generation", b"1")
box.append("new", "Generation", b"2")
box.discard(["old"])
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("point", "left"),
    [
        ("outbox.before_commit:2", ["old"]),
        ("outbox.after_commit:2", ["old", "new"]),
        ("outbox.before_delete", ["old", "new"]),
        ("outbox.after_delete", ["new"]),
    ],
)
def test_kill_at_any_step_keeps_accepted_records(tmp_path, point, left):
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path / "o.db")], env=os.environ | {"SPECL_CRASH_AT": point}
    )
    assert done.returncode == 137
    assert [r.id for r in Outbox(tmp_path / "o.db").oldest()] == left


# ------------------------------------------------------------------------------------------------ store
@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "store.db")
    made.set_threshold(0.5)
    yield made
    made.close()


def test_twice_is_once_and_poison_blocks_nothing(store, tmp_path):
    good = generation()
    rows = [row(good), messages.Envelope("poison", "Generation", b"\x00nonsense"), row(generation())]
    assert store.add_rows(rows) == [r.id for r in rows]
    store.add_rows(rows)
    summary = store.summary()
    assert (summary.generations, summary.disagreements, summary.quarantined) == (2, 2, 1)
    with sqlite3.connect(tmp_path / "store.db") as plain:
        assert plain.execute("SELECT prompt, acceptance FROM failures").fetchall()[0] == ("hello", 0.2)
        for view in ("acceptance_by_day", "costliest_tokens", "adapter_history"):
            plain.execute(f"SELECT * FROM {view}").fetchall()
        assert plain.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_every_kind_of_record_is_stored(store):
    now = time.time()
    records = [
        messages.Activation("a1", now, "activated", "000001", "", "announced", "announced", {"pause_ms": 3}),
        messages.TrainingRun(
            "t1", now, now, "by_hand", "by hand", "promoted", "it rose", "", "000001", 5, 9, 100, 2.0, 1.0, "", {}
        ),
        messages.Evaluation("e1", now, "heldout", "", "t1", "", 4, 40, 0.2, [0.2], {}),
        messages.Evaluation("e2", now, "heldout", "", "t1", "000001", 4, 40, 0.4, [0.4], {}),
        messages.Adapter("000001", now, "lora", "", "t1", "/x", "s", "b", {}),
    ]
    store.add_rows([row(record) for record in records])
    (line,) = store.sql("SELECT * FROM adapter_history")
    assert (line["verdict"], line["heldout_before"], line["heldout_after"]) == ("promoted", 0.2, 0.4)
    assert store.summary().last_verdict.adapter_id == "000001"


def test_pending_failures_count_since_the_last_run(store):
    first, second = generation(), generation()
    store.add_rows([row(first), row(generation(acceptance=0.9)), row(second)])
    assert store.pending_failures() == 2
    run = messages.TrainingRun(
        "t", 0.0, 1.0, "failures", "x", "rejected", "", "", "", 1, 1, 1, None, None, first.id, {}
    )
    store.add_rows([row(run)])
    assert store.pending_failures() == 1


def test_agreement_makes_a_parked_generation_a_failure(store):
    parked = generation(agreement_only=True)
    store.add_rows([row(parked)])
    assert store.summary().failures == 0 and len(store.unscored(5)) == 1
    store.add_rows([row(messages.Evaluation("e", 0.0, "generation", parked.id, "", "", 1, 5, 0.1, [0.1], {}))])
    assert store.summary().failures == 1 and not store.unscored(5)


def test_purge_leaves_no_byte_of_it(store, tmp_path):
    store.add_rows([row(generation(text="Zanzibarometer")), row(generation())])
    assert store.purge(store.matching([], None, "Zanzibarometer")) == 1
    assert not any(b"Zanzibarometer" in path.read_bytes() for path in tmp_path.iterdir())
    assert store.summary().generations == 1


def test_newer_and_missing_stores_are_refused(tmp_path):
    with pytest.raises(StoreError, match="no store"):
        Store(tmp_path / "none.db", read_only=True)
    Store(tmp_path / "store.db").close()
    with sqlite3.connect(tmp_path / "store.db") as plain:
        plain.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="schema 99"):
        Store(tmp_path / "store.db")


# ------------------------------------------------------------------------------------------------ adapters
def manifest(id="000001", **more):
    values = {
        "id": id, "kind": "lora", "created_at": 1.0, "base_model": "d", "base_fingerprint": "base", "target_fingerprint": "t",
        "tokenizer_fingerprint": "tok", "parent_id": "", "training_run_id": "r", "rank": 2, "alpha": 4.0, "modules": ["fc"],
        "change_norm": 1.0, "metrics": {"heldout_after": 0.4}, "training": {},
    }  # fmt: skip
    return Manifest(**(values | more))


def publish(adapters, id="000001", **more):
    scratch = adapters.scratch(id)
    save_file({"fc.lora_a": np.ones((4, 2), np.float32)}, scratch / "adapters.safetensors", metadata={"format": "mlx"})
    (scratch / "adapter_config.json").write_text("{}")
    return adapters.publish(scratch, manifest(id, **more))


def verify(adapters, path):
    return adapters.verify(path, "base", "tok")


def test_published_adapters_verify_and_have_aliases(tmp_path):
    adapters = Adapters(tmp_path)
    publish(adapters)
    publish(adapters, "000002", metrics={"heldout_after": 0.3})
    assert verify(adapters, tmp_path / "000001").id == "000001"
    assert [adapters.resolve(name) for name in ("latest", "current", "best", "1", "77")] == [
        "000002",
        "000002",
        "000001",
        "000001",
        "",
    ]
    assert adapters.next_id() == "000003"


def test_every_damaged_adapter_is_refused_with_reason(tmp_path):
    adapters = Adapters(tmp_path / "adapters")
    path = publish(adapters)
    outside = tmp_path / "000009"
    outside.mkdir()
    (adapters.folder / "000008").symlink_to(path)
    for bad, reason in (
        (outside, "outside"),
        (adapters.folder / "000008", "a link"),
        (adapters.folder / "x", "not an adapter id"),
        (adapters.folder / "000007", "there is no"),
    ):
        with pytest.raises(AdapterRejected, match=reason):
            verify(adapters, bad)
    with pytest.raises(AdapterRejected, match="trained on draft"):
        adapters.verify(path, "other", "tok")
    with pytest.raises(AdapterRejected, match="tokenizer"):
        adapters.verify(path, "base", "other")
    whole = (path / "adapters.safetensors").read_bytes()
    for spoiled, reason in (
        (whole[:-4], "truncated"),
        (b"\xff" * 8 + whole[8:], "not a whole"),
        (whole[:-1] + b"\x01", "sha256"),
        (b"PK\x03\x04" + whole, "safetensors"),
    ):
        (path / "adapters.safetensors").write_bytes(spoiled)
        with pytest.raises(AdapterRejected, match=reason):
            verify(adapters, path)
    (path / "adapters.safetensors").write_bytes(whole)
    (path / "evil.pkl").write_bytes(b"")
    with pytest.raises(AdapterRejected, match="does not belong"):
        verify(adapters, path)


PUBLISH = """
import sys
from pathlib import Path
from tests.shared.store.test_keeping import publish
from specl.shared.adapters.registry import Adapters
publish(Adapters(Path(sys.argv[1])), "000002")
"""
POINTS = ("files_written", "before_rename", "after_rename", "before_current", "after_current")


@pytest.mark.process
@pytest.mark.parametrize("point", POINTS)
def test_kill_while_publishing_keeps_current_whole(tmp_path, point):
    adapters = Adapters(tmp_path)
    publish(adapters)
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH, str(tmp_path)],
        env=os.environ | {"SPECL_CRASH_AT": f"adapter.{point}"},
        cwd=ROOT,
    )
    assert done.returncode == 137
    assert adapters.current() == ("000002" if point == "after_current" else "000001")
    assert verify(adapters, tmp_path / adapters.current())
    adapters.sweep()
    assert not list(tmp_path.glob(".new-*"))


def test_manifest_json_names_every_file(tmp_path):
    path = publish(Adapters(tmp_path))
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == {
        "adapters.safetensors",
        "adapter_config.json",
    }
