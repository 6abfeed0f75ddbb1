"""Files as the code of their day wrote them are read: stores of every schema, outboxes, the rest of a run directory.

The files in `tests/fixtures/v1` are never made anew (its README says which commit wrote which). `EXPECTED.json` holds the records
that were written and what the views said before the first renaming. Where something has another name now, it is told here, in
NOW, and nowhere else in this file.
"""

import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from specl.daemons.inference.adapter_monitor import AdapterMonitor
from specl.shared.adapters.marks import MarkState
from specl.shared.adapters.registry import Adapters
from specl.shared.adapters.tensors import read_shape
from specl.shared.engine.costs import Costs
from specl.shared.loading.costs import read_costs
from specl.shared.messaging.codec import decode
from specl.shared.messaging.codes import CollapseCheckState
from specl.shared.messaging.daemon_status import CollapseCheckStatus
from specl.shared.messaging.endpoints import read_keys
from specl.shared.messaging.outbox import Outbox
from specl.shared.messaging.upgrade import activation_reason_v1, run_trigger_v1
from specl.shared.paths import Paths
from specl.shared.retention.answer_files import AnswerFiles
from specl.shared.retention.checkpoints import checkpoint_folder, generations_in
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.retention.purge_journal import PurgeJournal, PurgeRequest
from specl.shared.store import SCHEMA_VERSION, Store
from specl.shared.training_files.checkpoint import load_checkpoint, read_notes
from specl.shared.training_files.shards import load_or_discard

V1 = Path(__file__).parents[2] / "fixtures" / "v1"
EXPECTED = json.loads((V1 / "EXPECTED.json").read_text(encoding="utf-8"))
SCHEMAS = (1, 2, 3, 4)
NOW = {
    "activations.reason": "note",
    "training_runs.trigger": "cause",
    "adapter_activations.reason": "note",
}  # what has another name now: by `table` or `table.column` as of then; views count as tables
TABLES = {
    "Generation": "generations",
    "Activation": "activations",
    "TrainingRun": "training_runs",
    "Evaluation": "evaluations",
    "Adapter": "adapters",
}
JSON_COLUMNS = ("messages", "sampling", "stats", "settings", "by_depth", "details", "manifest", "context_tokens")
TOP_K = {"k": "top_k", "ids": "top_ids", "logprobs": "top_logprobs", "tail": "tail", "entropy": "entropy"}
DRAFT, TARGET, TOKENIZER = "bbbb1111bbbb1111", "aaaa0000aaaa0000", "cccc2222cccc2222"
WATCH_SAID = (
    "live acceptance 0.210 of 203 model-drafted tokens in 7 requests; the adapter before it would have had 0.402",
    "live acceptance 0.100 of 41 model-drafted tokens in 20 requests; the adapter before it would have had 0.400",
)


def now(table, column=""):
    """Today's name of a table or view, or of one of its columns."""
    return NOW.get(f"{table}.{column}", column) if column else NOW.get(table, table)


def rows_of(path, query):
    """As a person would, with no program of ours."""
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute(query)]
    finally:
        connection.close()


def table(path, name):
    """All rows in their order, with JSON columns read and bytes as EXPECTED spells them; `n` is the order and nothing else."""
    texts = {now(name, column) for column in JSON_COLUMNS}

    def read(column, value):
        if isinstance(value, bytes):
            return {"hex": value.hex()}
        return json.loads(value) if column in texts else value

    rows = rows_of(path, f"SELECT * FROM {now(name)} ORDER BY n")
    return [{column: read(column, value) for column, value in row.items() if column != "n"} for row in rows]


def columns_of(kind, record):
    """A record of EXPECTED.json as its row, but for what the store adds by itself."""
    row = {name: value for name, value in record.items() if name not in ("disagreements", "top_k")}
    if kind == "Generation":
        row |= {column: (record["top_k"] or {}).get(name) for name, column in TOP_K.items()}
    return {now(TABLES[kind], name): value for name, value in row.items()}


def lines_of(records):
    lines = [line | {"generation_id": record["id"]} for record in records for line in record["disagreements"]]
    return [{now("disagreements", name): value for name, value in line.items()} for line in lines]


def check_rows(path, records):
    """Every record is there once, with every value that it was written with."""
    for kind, name in TABLES.items():
        found = {row["id"]: row for row in table(path, name)}
        assert len(found) == len(table(path, name)) == len(records[kind])
        for record in records[kind]:
            wanted = columns_of(kind, record)
            assert {column: found[record["id"]][column] for column in wanted} == wanted


@pytest.fixture(params=SCHEMAS)
def schema(request):
    return request.param


@pytest.fixture
def path(schema, tmp_path):
    """A copy of an old store, as it was."""
    path = tmp_path / "store.db"
    shutil.copyfile(V1 / f"store-schema{schema}.db", path)
    return path


@pytest.fixture
def store(path):
    """The same, opened: an older one is upgraded by that."""
    made = Store(path)
    yield made
    made.close()


# ---------------------------------------------------------------------------------------------------- stores
def test_an_old_store_is_brought_to_todays_schema(schema, path, store, tmp_path):
    assert rows_of(V1 / f"store-schema{schema}.db", "PRAGMA user_version") == [{"user_version": schema}]
    assert rows_of(path, "PRAGMA user_version") == [{"user_version": SCHEMA_VERSION}]
    assert rows_of(path, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert bool(store.backups()) == (schema < SCHEMA_VERSION)
    fresh = tmp_path / "fresh.db"
    Store(fresh).close()
    objects = "SELECT m.type, m.name, c.name AS part FROM sqlite_master m LEFT JOIN pragma_table_info(m.name) c ORDER BY 1, 2, 3"
    assert rows_of(path, objects) == rows_of(fresh, objects)


def test_old_store_rows_have_their_values(schema, path, store):
    records = EXPECTED[f"schema{schema}"]["records"]
    check_rows(path, records)
    assert table(path, "disagreements") == lines_of(records["Generation"])


def test_old_rows_keep_their_order(schema, path, store):
    for kind, name in TABLES.items():
        ids = [record["id"] for record in EXPECTED[f"schema{schema}"]["records"][kind]]
        assert [row["id"] for row in table(path, name)] == ids


def test_columns_added_by_the_store_are_kept(schema, path, store):
    rows = table(path, "generations")
    first = {1: "2026-05-30T00:13:30Z", 2: "2026-05-31T04:00:10Z", 3: "2026-06-01T07:46:50Z", 4: "2026-06-02T11:33:30Z"}
    assert rows[0]["created"] == first[schema]
    assert [row[now("generations", "output_count")] for row in rows] == [8, 6, 5, 3, 6, 5, 4, 0, 7, 6]
    assert [row["temperature"] for row in rows] == [0.0, 0.8, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert [row["agreement"] for row in rows] == [None] * 4 + [0.333333] + [None] * 5
    assert [row["acceptance_rate"] for row in rows] == [0.25, 0.75, 0.4, 0.9, None, None, 0.8333, 0.25, 0.25, 0.625]
    assert [row["mode"] for row in rows] == [
        "detailed", "detailed", "fast", "fast", "detailed", "detailed", "detailed", "imported", "detailed", "detailed",
    ]  # fmt: skip


def test_the_rows_that_are_no_records_are_kept(schema, path, store):
    (row,) = table(path, "quarantine")
    assert (row["id"], row["kind"]) == (f"unreadable-{schema}", "Generation")
    assert row["raw"] == {"hex": (b"\x93c\xaaGeneration\x81\xa2id\xac" + row["id"].encode()).hex()}
    assert row["reason"].startswith("WireError: message version unknown; this program speaks 1, 30 bytes, sha256 ")
    assert rows_of(path, f"SELECT * FROM {now('settings')}") == [{"name": "acceptance_threshold", "value": "0.5"}]


@pytest.mark.parametrize(
    "view", ["failures", "acceptance_by_day", "costliest_tokens", "adapter_history", "adapter_activations"]
)
def test_old_store_views_are_unchanged(schema, path, store, view):
    expected = [
        {now(view, name): value for name, value in row.items()} for row in EXPECTED[f"schema{schema}"]["views"][view]
    ]
    assert expected
    for row in expected:
        if row.get("who") == "watch":
            row["who"] = "monitor"
        elif row.get("note") == "reinstated by a second look":
            row["who"] = "reinstated"
    rows = rows_of(path, f"SELECT * FROM {now(view)}")
    assert [{name: row[name] for name in expected[0]} for row in rows] == expected


def test_sentences_get_the_codes_that_old_records_get(schema, path, store):
    for row in rows_of(path, "SELECT event, reason, note FROM activations"):
        assert row["reason"] == activation_reason_v1(row["event"], row["note"])
    for row in rows_of(path, 'SELECT "trigger", cause FROM training_runs'):
        assert row["trigger"] == run_trigger_v1(row["cause"])


def test_adapter_users_are_read_from_old_rows(schema, path, store):
    rows = [
        (row["event"], row["adapter_id"], row[now("adapter_activations", "who")])
        for row in rows_of(path, f"SELECT * FROM {now('adapter_activations')}")
    ]
    wanted = [
        ("activated", "000001", "promoted"),
        ("activated", "000001", "promoted" if schema == 1 else "restart"),  # schema 1 did not tell a restart
        ("rejected", "000009", "verification"),
        ("rejected", "CURRENT", "verification"),
        ("activated", "000002", "promoted"),
        ("activated", "000001", "monitor"),
        ("rolled_back", "000002", "monitor"),
        ("unloaded", "", "by hand"),
        ("activated", "000001", "by hand"),
    ]
    if schema > 1:
        wanted += [
            ("activated", "000002", "by hand"),
            ("activated", "000001", "by hand"),
            ("activated", "000003", "promoted"),
        ]
    if schema > 3:
        wanted += [("activated", "000002", "reinstated")]
    last = {1: "000001", 2: "000003", 3: "000003", 4: "000002"}[schema]
    assert rows == [*wanted, ("unloaded", "", "monitor"), ("rolled_back", last, "monitor")]


def test_old_verdicts_and_triggers_are_in_the_history(schema, path, store):
    rows = rows_of(path, f"SELECT * FROM {now('adapter_history')}")
    history = [(row[now("adapter_history", "caused_by")], row["verdict"], row["adapter_id"]) for row in reversed(rows)]
    wanted = [
        ("57 failures", "promoted", "000001"),
        ("by hand", "rejected", ""),
        ("50 failures", "rejected", ""),
        ("by hand, now" if schema > 2 else "by hand", "no_verdict", ""),
        ("50 failures", "failed", ""),
        ("by hand", "cancelled", ""),
        ("by hand", "no_data", ""),
        ("64 failures", "promoted", "000002"),
    ]
    if schema > 1:
        wanted += [("import their-adapter", "promoted", "000003"), ("import broken-adapter", "rejected", "")]
    if schema > 3:
        wanted += [
            ("second look at 000002", "reinstated", "000002"),
            ("second look at 000003", "confirmed", ""),
            ("second look at 000003", "no_verdict", ""),
        ]
    assert history == wanted
    first = rows[-1]
    counted = (
        {"failures": 57, "successes": 3, "replay": 40}
        if schema > 1
        else dict.fromkeys(("failures", "successes", "replay"))
    )
    assert {name: first[now("adapter_history", name)] for name in counted} == counted
    assert (first["heldout_before"], first["heldout_after"], first["gain_low"], first["gain_high"]) == (
        0.3125,
        0.5,
        0.125,
        0.25,
    )
    assert (first["regression_before"], first["regression_after"]) == (0.41, 0.4075)
    assert (first["heldout_generations"], first["loss_first"], first["loss_last"]) == (32, 2.5, 1.25)


def test_questions_are_answered_from_an_old_store(schema, store):
    summary = store.summary()
    assert (summary.generations, summary.disagreements, summary.failures, summary.quarantined) == (10, 5, 5, 1)
    assert summary.lifetime_acceptance == round(82 / 145, 4)
    assert summary.by_adapter == {"none": round(43 / 98, 4), "000001": round(19 / 23, 4), "000002": round(20 / 24, 4)}
    verdict = summary.last_verdict
    assert (verdict.verdict, verdict.examples) == (("promoted", 64) if schema == 1 else ("rejected", 0))
    # after g5, the last that a run has learned from: the record without its text, and the imported one
    assert summary.pending_failures == store.pending_failures() == 2
    records = EXPECTED[f"schema{schema}"]["records"]["Generation"]
    assert [row.id for row in store.unscored(10)] == [records[5]["id"]]
    assert [row.id for row in store.generation_summaries(20)] == [records[place]["id"] for place in (6, 5, 4, 1, 0)]
    assert store.generation(records[0]["id"]).output == " the sky is blue because light scatters grün"
    assert len(store.generation(records[0]["id"]).disagreements) == 2


def test_an_old_store_is_exported(schema, store):
    records = EXPECTED[f"schema{schema}"]["records"]["Generation"]
    exported = list(store.export())
    assert [item["id"] for item in exported] == [record["id"] for record in records]
    assert exported[0]["prompt"] == "Why is the sky blue?"
    assert exported[0]["target_output"] == " the sky is blue because light scatters grün"
    assert exported[0]["acceptance_rate"] == 0.25
    assert exported[0]["disagreements"] == [
        {"position": 2, "draft_token": 3, "target_token": 4, "draft_confidence": 0.75, "target_confidence": 0.5,
         "context_tokens": [1, 2, 20, 21, 22, 23, 24, 25, 0, 1]},
        {"position": 5, "draft_token": 7, "target_token": 8, "draft_confidence": 0.5, "target_confidence": 0.25,
         "context_tokens": [1, 2, 20, 21, 22, 23, 24, 25, 0, 1, 2, 3, 4]},
    ]  # fmt: skip
    assert exported[6]["prompt"] == "And at night?"
    assert exported[7] == {
        "id": f"imported-{schema}", "prompt": "From a file", "target_output": "as it was written", "acceptance_rate": 0.25,
        "timestamp": exported[7]["timestamp"],
        "disagreements": [{"position": 1, "draft_token": 3, "target_token": 4, "draft_confidence": 0.5, "target_confidence": 0.75,
                           "context_tokens": [5, 6]}],
    }  # fmt: skip
    assert exported[9]["prompt"] == "The word [redacted] is not kept"


def test_opening_it_again_changes_nothing(path, store):
    before = {name: table(path, name) for name in (*TABLES.values(), "disagreements", "quarantine")}
    store.close()
    Store(path).close()
    assert {name: table(path, name) for name in before} == before
    assert len(list(path.parent.glob("store.db.backup-*"))) <= 1


# ---------------------------------------------------------------------------------------------------- outboxes
@pytest.fixture
def outboxes(tmp_path):
    shutil.copytree(V1 / "outbox", tmp_path / "outbox")
    made = [Outbox(tmp_path / "outbox" / f"{producer}.db") for producer in ("inference", "trainer")]
    yield made
    for outbox in made:
        outbox.close()


def test_old_outbox_records_are_read(outboxes):
    inference, trainer = outboxes
    assert [outbox.problem for outbox in outboxes] == ["", ""]
    assert (inference.pending, trainer.pending) == (24, 41)
    records = EXPECTED["outbox"]["records"]
    for outbox, kinds in (
        (inference, ("Generation", "Activation")),
        (trainer, ("TrainingRun", "Evaluation", "Adapter")),
    ):
        rows = outbox.oldest()
        assert [row.id for row in rows if row.kind == kinds[0]] == [record["id"] for record in records[kinds[0]]]
        assert {row.kind for row in rows} == set(kinds)
        for row in rows:
            assert decode(row.body).id == row.id


def test_old_outbox_records_are_stored_once(outboxes, tmp_path):
    path, records = tmp_path / "store.db", EXPECTED["outbox"]["records"]
    store = Store(path)
    try:
        store.set_threshold(0.5)
        for _ in range(2):  # the second time as after a kill between the commit and the acknowledgement
            for outbox in outboxes:
                rows = outbox.oldest()
                assert store.add_rows(rows) == [row.id for row in rows]
        check_rows(path, records)
        assert table(path, "disagreements") == lines_of(records["Generation"])
        assert table(path, "quarantine") == []
        scores = {row["id"]: row["agreement"] for row in table(path, "generations")}
        assert [score for score in scores.values() if score is not None] == [0.333333]
        for outbox in outboxes:
            outbox.discard([row.id for row in outbox.oldest()])
            assert outbox.pending == 0
    finally:
        store.close()


def test_old_outbox_delivers_into_an_old_store(path, store, outboxes):
    before = {name: len(table(path, name)) for name in TABLES.values()}
    for outbox in outboxes:
        store.add_rows(outbox.oldest())
    records = EXPECTED["outbox"]["records"]
    added = {name: len(table(path, name)) - before[name] for name in TABLES.values()}
    fresh = 3 - before["adapters"]  # an adapter is known by its number: those that are there already stay
    assert added == {name: len(records[kind]) for kind, name in TABLES.items()} | {"adapters": fresh}
    assert len(table(path, "quarantine")) == 1


# ---------------------------------------------------------------------------------------------------- the run directory
@pytest.fixture
def paths(tmp_path):
    """A copy of an old run directory, private as it was."""
    root = tmp_path / "old"
    shutil.copytree(V1 / "var", root)
    for file in root.rglob("*"):
        file.chmod(0o700 if file.is_dir() else 0o600)
    return Paths(root, root / "models")


def test_monitor_reads_what_an_older_one_saved(paths):
    monitor = AdapterMonitor(paths.root / "watch.json")
    assert monitor.load(DRAFT, TARGET) == monitor.adapter == "000003"
    assert monitor.check is None  # its counts by depth are not those of today
    assert monitor.last == CollapseCheckStatus("000001", CollapseCheckState.PASSED, 4, 240, 0.5333)
    assert AdapterMonitor(paths.root / "watch.json").load(DRAFT, "another") is None


def test_adapters_are_verified_and_their_marks_are_known(paths):
    adapters = Adapters(paths.adapters)
    assert adapters.ids() == ["000001", "000002", "000003"]
    assert adapters.next_id() == "000005"  # there was a fourth
    assert (adapters.current(), adapters.resolve("previous"), adapters.resolve("best")) == (
        "000002",
        "000001",
        "000002",
    )
    for number, id in enumerate(adapters.ids(), 1):
        manifest = adapters.verify(paths.adapters / id, DRAFT, TOKENIZER)
        assert manifest == adapters.manifest(id)
        assert (manifest.id, manifest.kind, manifest.created_at) == (id, "lora", 1_780_500_000.0 + 1000 * number)
        assert (manifest.parent_id, manifest.training_run_id) == (
            ["", "000001", "000002"][number - 1],
            f"{number:032x}",
        )
        assert (manifest.rank, manifest.alpha, manifest.change_norm) == (2, 4.0, 0.125)
        assert manifest.score == 0.5 + number / 32
        assert manifest.generations == [f"{10 * number:032x}"]
        assert (manifest.base_fingerprint, manifest.target_fingerprint) == (DRAFT, TARGET)
        shape = read_shape(paths.adapters / id)
        assert (shape.rank, shape.alpha, shape.keys) == (
            2,
            4.0,
            ("layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"),
        )
    # 000002 was reinstated, 000003 was not, of 000001 nobody has decided yet
    states = {
        "000001": MarkState.ROLLBACK_PENDING,
        "000002": MarkState.REINSTATED,
        "000003": MarkState.ROLLED_BACK_FINAL,
    }
    assert {id: mark.state for id, mark in adapters.marks.all().items()} == states
    assert sorted(adapters.rolled_back()) == ["000001", "000003"]
    assert adapters.rolled_back()["000003"] == WATCH_SAID[1]
    assert json.loads((paths.adapters / "ROLLED_BACK.json").read_text())["000002"] == WATCH_SAID[0]


def test_an_unfinished_purge_can_be_finished(paths):
    journal = PurgeJournal(paths.pending_purge)
    first, second = "000000000000000000000000000000a1", "000000000000000000000000000000b2"
    assert journal.request() == PurgeRequest(
        begun=1_780_500_000.0,
        ids=[first],
        before=1_780_400_000.0,
        pattern="xyzzy",
        everything=False,
        drop_adapters=True,
        retrain=True,
    )
    assert list(journal.noted("ids")) == [first, second]
    assert list(journal.noted("texts")) == ["The word xyzzy", "an answer with xyzzy", "another xyzzy"]
    assert list(journal.noted("typed")) == ["The word xyzzy"]


def test_past_answers_are_remembered(paths):
    files = AnswerFiles(paths.answers, TOKENIZER)
    assert files.read("somebody") == [(1_780_490_000.0, list(range(100, 110))), (1_780_495_000.0, [7, 8, 9, 10, 11])]
    assert files.read("somebody else") == []


def test_measured_costs_are_not_measured_again(paths):
    found = read_costs(paths.costs / "0123456789abcdef.json", 16, True)
    assert found == Costs(
        {1: 0.01, 2: 0.011, 3: 0.012, 4: 0.013, 5: 0.014, 6: 0.016, 8: 0.02, 12: 0.03, 16: 0.04},
        {1: 0.002, 2: 0.0035, 4: 0.006, 8: 0.011},
    )


def test_keys_still_let_clients_in(paths):
    keys = read_keys(paths.keys)
    assert keys.server_public == f"{'fixture-server-public-':x<40}"
    assert keys.client_public == f"{'fixture-client-public-':x<40}"
    assert keys.client_secret == f"{'fixture-client-secret-':x<40}"
    assert keys.server_secret == f"{'fixture-server-secret-':x<40}"


def test_what_training_keeps_is_read(paths):
    states = HiddenSpool(paths.hidden, 1 << 20).read("0000000000000000000000000000000a")
    assert np.array_equal(states, np.arange(24).reshape(6, 4) / 16)
    (example,) = load_or_discard(paths.regression / f"{TARGET}-48" / "regression-0001-1.npz")
    assert (example.id, example.prompt_length, example.rows, example.greedy) == ("regression-0001", 5, 4, True)
    assert example.tokens.tolist() == list(range(9))
    assert example.ids.tolist() == np.arange(8).reshape(4, 2).tolist()
    assert (example.logprobs == -1.5).all() and example.states.shape == (8, 4)
    checkpoint = checkpoint_folder(paths.training)
    assert generations_in(checkpoint) == {"000000000000000000000000000000c3"}
    about = read_notes(checkpoint)
    state = load_checkpoint(checkpoint)
    assert state.step == 12 and state.weights and state.optimizer
    assert (about["step"], about["parent"], about["draft"], about["used_s"]) == (12, "000002", DRAFT, 12.5)
    assert (about["losses"], about["tokens"], about["watched"]) == ([2.5, 2.25], 1800, [2.375])
    assert about["shown"] == ["000000000000000000000000000000c3"]


def test_what_the_gateway_said_of_itself_is_read(paths):
    said = json.loads((paths.run / "gateway.json").read_text())
    assert said == {
        "pid": 4242,
        "started": 1_780_504_000.0,
        "state": "ready",
        "address": "http://127.0.0.1:8080",
        "problem": None,
    }
