"""The failure store: once is once, what is purged is gone, and sqlite3 alone can read it."""

import sqlite3
import stat

import pytest

from specl.shared.errors import StoreError
from specl.shared.messaging.codes import ActivationReason
from specl.shared.messaging.messages import Envelope
from specl.shared.store import Store
from tests.fakes import (
    make_activation,
    make_adapter_record,
    make_disagreement,
    make_evaluation,
    make_generation,
    make_training_run,
    run_python,
    to_row,
    tokens_blob,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.db"


@pytest.fixture
def store(path):
    made = Store(path)
    made.set_threshold(0.5)
    yield made
    made.close()


def ask(path, query, *values):
    """As a person would, with no program of ours."""
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute(query, values)]
    finally:
        connection.close()


def add(store, *records):
    return store.add_rows([to_row(record) for record in records])


RECORDS = {
    "generations": make_generation("g1"),
    "activations": make_activation("a1"),
    "training_runs": make_training_run("t1"),
    "evaluations": make_evaluation("e1"),
    "adapters": make_adapter_record("000001"),
}


@pytest.mark.parametrize("table", RECORDS)
def test_storing_a_record_twice_is_storing_it_once(store, path, table):
    record = RECORDS[table]
    assert add(store, record, record) == [record.id, record.id]
    assert add(store, record) == [record.id]
    (row,) = ask(path, f"SELECT * FROM {table}")
    assert row["id"] == record.id
    assert row["created"].endswith("Z")
    assert len(ask(path, "SELECT * FROM disagreements")) == (1 if table == "generations" else 0)
    assert ask(path, "SELECT * FROM quarantine") == []


def test_every_field_of_a_generation_is_kept(store, path):
    record = make_generation("g1", top_k=None, acceptance_rate=None)
    add(store, record, make_generation("g2"))
    first, second = ask(path, "SELECT * FROM generations ORDER BY n")
    for name in (
        "prompt",
        "output",
        "mode",
        "finish_reason",
        "ttft_ms",
        "sources",
        "adapter_id",
        "prompt_tokens",
        "output_tokens",
    ):
        assert first[name] == getattr(record, name)
    assert first["output_count"] == 5
    assert (first["acceptance_rate"], first["top_k"], first["top_ids"]) == (None, None, None)
    assert second["top_k"] == 4
    assert second["top_ids"] == make_generation("g2").top_k.ids
    (line,) = ask(path, "SELECT * FROM disagreements WHERE generation_id = 'g2'")
    assert (line["draft_text"], line["target_text"], line["depth"], line["context_tokens"]) == (
        " cat",
        " dog",
        2,
        "[7, 8, 9]",
    )


@pytest.mark.parametrize(
    "row",
    [
        Envelope("p", "Generation", b"garbage"),
        Envelope("p", "Generation", to_row(make_generation("other")).body),
        Envelope("p", "Activation", to_row(make_generation("p")).body),
        Envelope("p", "Nothing", b""),
    ],
)
def test_poison_goes_to_quarantine_and_blocks_nothing(store, path, row):
    before, after = to_row(make_generation("g1")), to_row(make_generation("g2"))
    assert store.add_rows([before, row, after]) == ["g1", "p", "g2"]
    assert store.add_rows([row]) == ["p"]
    assert [r["id"] for r in ask(path, "SELECT id FROM generations ORDER BY n")] == ["g1", "g2"]
    (kept,) = ask(path, "SELECT * FROM quarantine")
    assert (kept["id"], kept["raw"], bool(kept["reason"])) == ("p", row.body, True)
    assert store.summary().quarantined == 1


@pytest.mark.process
def test_batch_is_stored_whole_or_not_at_all(path):
    code = f"""
from pathlib import Path
from specl.shared.store import Store
from tests.fakes import make_generation, to_row
from specl.shared.messaging.codes import ActivationReason
from specl.shared.messaging.messages import Envelope
store = Store(Path({str(path)!r}))
store.add_rows([to_row(make_generation("old"))])
store.add_rows([to_row(make_generation("g1")), Envelope("p", "Generation", b"poison"), to_row(make_generation("g2"))])
"""
    died = run_python(code, SPECL_CRASH_AT="store.before_commit:2")
    assert died.returncode == 137, died.stderr
    assert [r["id"] for r in ask(path, "SELECT id FROM generations ORDER BY n")] == ["old"]
    assert ask(path, "SELECT * FROM quarantine") == []
    died = run_python(code, SPECL_CRASH_AT="store.after_commit:2")
    assert died.returncode == 137, died.stderr
    assert [r["id"] for r in ask(path, "SELECT id FROM generations ORDER BY n")] == ["old", "g1", "g2"]
    assert len(ask(path, "SELECT * FROM quarantine")) == 1


def test_failures_use_threshold_or_agreement(store, path):
    add(
        store,
        make_generation("bad", acceptance_rate=0.2),
        make_generation("good", acceptance_rate=0.8),
        make_generation("edge", acceptance_rate=0.5),
        make_generation("unknown", acceptance_rate=None),
        make_generation("parked", acceptance_rate=None),
        make_evaluation("e", subject="generation", generation_id="parked", agreement=0.1),
    )
    rows = {row["id"]: row for row in ask(path, "SELECT * FROM failures")}
    assert set(rows) == {"bad", "parked"}
    assert rows["bad"]["acceptance"] == 0.2
    assert rows["parked"]["agreement"] == 0.1
    assert rows["bad"]["prompt"] == "question bad"
    assert rows["bad"]["disagreements"] == 1
    store.set_threshold(0.1)
    assert ask(path, "SELECT * FROM failures") == []


def test_low_agreement_does_not_overrule_good_acceptance(store, path):
    add(
        store,
        make_generation("g", acceptance_rate=0.9),
        make_evaluation("e", subject="generation", generation_id="g", agreement=0.1),
    )
    assert ask(path, "SELECT * FROM failures") == []


def test_daily_acceptance_weighs_by_tokens(store, path):
    add(
        store,
        make_generation("a", created_at=0.0, model_drafted=10, model_accepted=10, drafted=99),
        make_generation("b", created_at=10.0, model_drafted=30, model_accepted=0, drafted=99),
        make_generation("c", created_at=86_400.0, model_drafted=0, model_accepted=0),
        make_generation("d", created_at=86_400.0, adapter_id="000001"),
    )
    rows = ask(path, "SELECT * FROM acceptance_by_day")
    assert [(r["day"], r["adapter_id"], r["generations"], r["acceptance"]) for r in rows] == [
        ("1970-01-01", "", 2, 0.25),
        ("1970-01-02", "", 1, None),
        ("1970-01-02", "000001", 1, 0.4),
    ]


def test_imported_rows_do_not_lower_mean_speed(store, path):
    add(store, make_generation("a", created_at=0.0), make_generation("b", created_at=1.0, tokens_per_second=0.0))
    assert [row["tokens_per_second"] for row in ask(path, "SELECT * FROM acceptance_by_day")] == [12.5]
    assert store.summary().rolling_tokens_per_second == 12.5
    add(store, make_generation("c", created_at=200_000.0, tokens_per_second=0.0))
    assert ask(path, "SELECT * FROM acceptance_by_day")[-1]["tokens_per_second"] is None


def test_every_reason_of_an_activation_says_who(store, path):
    add(store, *(make_activation(reason, reason=reason) for reason in ActivationReason))
    rows = ask(path, "SELECT reason, who FROM adapter_activations")
    assert {row["reason"]: row["who"] for row in rows} == {
        "announced": "promoted",
        "restart": "restart",
        "by_hand": "by hand",
        "by_hand_again": "by hand",
        "rolled_back_by_hand": "by hand",
        "rollback": "monitor",
        "live_acceptance": "monitor",
        "reinstated": "reinstated",
        "reevaluation": "reevaluation",
        "verification": "verification",
        "other": "other",
    }


def test_costliest_tokens_are_counted_by_pair(store, path):
    add(
        store,
        make_generation("a", disagreements=[make_disagreement(1), make_disagreement(4, draft_confidence=0.25)]),
        make_generation("b", disagreements=[make_disagreement(2, target_token=99, target_text="!")]),
    )
    first, second = ask(path, "SELECT * FROM costliest_tokens")
    assert (first["draft_text"], first["target_text"], first["times"], first["draft_confidence"]) == (
        " cat",
        " dog",
        2,
        0.5,
    )
    assert (second["target_token"], second["times"]) == (99, 1)


def test_adapter_history_has_both_figures_of_a_run(store, path):
    add(
        store,
        make_training_run("t1", parent_id="", adapter_id="000001"),
        make_evaluation("e1", training_run_id="t1", adapter_id="", agreement=0.4),
        make_evaluation("e2", training_run_id="t1", adapter_id="000001", agreement=0.6),
    )
    (row,) = ask(path, "SELECT * FROM adapter_history")
    assert (row["verdict"], row["heldout_before"], row["heldout_after"], row["loss_last"]) == (
        "promoted",
        0.4,
        0.6,
        1.25,
    )


def test_adapter_history_has_data_interval_regression_and_activations(store, path):
    add(
        store,
        make_training_run("t1", adapter_id="000001", settings={"data": {"failures": 30, "successes": 8, "replay": 96}}),
        make_evaluation("e1", training_run_id="t1", adapter_id="", agreement=0.4),
        make_evaluation("e2", training_run_id="t1", adapter_id="", subject="regression", agreement=0.38),
        make_evaluation("e3", training_run_id="t1", agreement=0.6, details={"low": 0.1, "high": 0.31}),
        make_evaluation("e4", training_run_id="t1", subject="regression", agreement=0.379),
        make_activation("a1"),
        make_activation("a2", reason="restart", note="restart"),
        make_activation("a3", reason="by_hand", note="by hand"),
        make_activation("a4", event="rolled_back", reason="live_acceptance", note="live acceptance 0.1 ..."),
    )
    (row,) = store.adapter_runs()
    assert (row["failures"], row["successes"], row["replay"], row["activations"]) == (30, 8, 96, 3)
    assert (row["gain_low"], row["gain_high"], row["heldout_generations"]) == (0.1, 0.31, 10)
    assert (row["regression_before"], row["regression_after"]) == (0.38, 0.379)
    assert [a["who"] for a in ask(path, "SELECT who FROM adapter_activations")] == [
        "promoted",
        "restart",
        "by hand",
        "monitor",
    ]


# ---------------------------------------------------------------------------------------------------- opening
def test_a_newer_schema_is_refused_and_left_alone(store, path):
    store.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    for read_only in (False, True):
        with pytest.raises(StoreError, match="99"):
            Store(path, read_only)
    assert ask(path, "PRAGMA user_version")[0]["user_version"] == 99


def test_reading_needs_a_store_and_makes_none(path):
    with pytest.raises(StoreError, match="no store"):
        Store(path, read_only=True)
    assert not path.exists()


def test_a_reader_cannot_write(store, path):
    add(store, make_generation("g"))
    reader = Store(path, read_only=True)
    with pytest.raises(StoreError):
        add(reader, make_generation("h"))
    assert reader.summary().generations == 1


def test_reader_works_beside_the_writer(store, path):
    add(store, make_generation("g"))
    reader = Store(path, read_only=True)
    assert reader.summary().generations == 1
    add(store, make_generation("h"))
    assert reader.summary().generations == 2
    reader.close()
    store.close()
    assert Store(path, read_only=True).summary().generations == 2


def test_damaged_store_is_an_error_with_its_name(path):
    path.write_bytes(b"this is no database, whatever its name may say." * 100)
    for read_only in (False, True):
        with pytest.raises(StoreError, match="store.db"):
            Store(path, read_only)


@pytest.mark.parametrize("name", ["with space", "100%", "what?mode=memory", "a#b", "ünïcode"])
def test_any_folder_name_will_do(tmp_path, name):
    path = tmp_path / name / "store.db"
    store = Store(path)
    add(store, make_generation("g"))
    store.close()
    assert path.is_file()
    assert Store(path, read_only=True).summary().generations == 1


def test_only_its_owner_may_read_it(store, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# ---------------------------------------------------------------------------------------------------- forgetting
def test_purged_text_is_nowhere_on_the_disk(store, path):
    secret = "S3CR3T-WORDS"
    message = [{"role": "user", "content": secret}]
    line = make_disagreement(draft_text=secret)
    long = secret * 2000
    add(
        store,
        make_generation("g1", prompt=long, output=long, messages=message, disagreements=[line], conversation_id=secret),
    )
    add(store, make_generation("g2"), make_evaluation("e1", subject="generation", generation_id="g1"))
    assert store.purge(store.matching([], None, "S3CR3T")) == 1
    for file in path.parent.iterdir():
        assert secret.encode() not in file.read_bytes(), file
    assert [row["id"] for row in ask(path, "SELECT id FROM generations ORDER BY n")] == ["g2"]
    assert ask(path, "SELECT * FROM evaluations") == []
    assert {row["generation_id"] for row in ask(path, "SELECT * FROM disagreements")} == {"g2"}


def test_a_purge_by_id_reaches_quarantine_too(store, path):
    store.add_rows([Envelope("p", "Generation", b"half a record with S3CR3T-WORDS")])
    store.purge(["p"])
    assert ask(path, "SELECT * FROM quarantine") == []
    for file in path.parent.iterdir():
        assert b"S3CR3T-WORDS" not in file.read_bytes(), file


def test_purge_selects_by_id_age_and_pattern(store):
    add(
        store,
        make_generation("old", created_at=10.0),
        make_generation("new", created_at=1000.0, output="100% sure_thing"),
        make_generation("other", created_at=1000.0, output="100 sureXthing"),
    )
    assert store.matching(["old"], None, "") == ["old"]
    assert store.matching([], 500.0, "") == ["old"]
    assert store.matching([], None, "100% sure_") == ["new"]
    assert store.matching([], None, "") == []
    assert store.matching(["nobody"], None, "") == []
    assert set(store.matching(["old"], None, "sure")) == {"old", "new", "other"}


def test_pattern_matches_a_hash_id_only_whole(store):
    hash = "0badc0de" * 4
    add(store, make_generation("g1", conversation_id=hash), make_generation("g2", conversation_id="the bad talk"))
    assert store.matching([], None, "bad") == ["g2"]
    assert store.matching([], None, hash.upper()) == ["g1"]
    assert store.matching([], None, "question") == ["g1", "g2"]


def test_outlines_and_full_rows_are_ordered(store):
    add(
        store,
        make_generation("g1", acceptance_rate=None),
        make_generation("fast", top_k=None, mode="fast"),
        make_generation("g2"),
        make_evaluation("e1", subject="generation", generation_id="g1", agreement=0.25),
    )
    found = store.generation_summaries(10)
    assert [(row.id, row.score, row.output_count) for row in found] == [("g2", 0.4, 5), ("g1", 0.25, 5)]
    assert [row.id for row in store.generation_summaries(1)] == ["g2"]
    whole = store.generations(["g2", "gone", "g1"])
    assert [row.id for row in whole] == ["g2", "g1"] and len(whole[0].disagreements) == 1
    assert whole[1].output_tokens == tokens_blob([1, 2, 3, 4, 5])
    assert list(store.tokens(["g1", "gone"])) == [tokens_blob([5, 6, 7, 1, 2, 3, 4, 5])]


# ---------------------------------------------------------------------------------------------------- reading
def test_export_has_the_documented_shape(store):
    add(store, make_generation("g1"), make_generation("g2", messages=[], prompt="raw", acceptance_rate=None))
    first, second = store.export()
    assert list(first) == ["id", "prompt", "target_output", "acceptance_rate", "timestamp", "disagreements"]
    assert first["prompt"] == "question g1"
    assert (first["target_output"], first["acceptance_rate"]) == ("answer g1", 0.4)
    assert first["timestamp"] == "2026-09-21T14:13:20Z"
    assert first["disagreements"] == [
        {
            "position": 3,
            "draft_token": 11,
            "target_token": 12,
            "draft_confidence": 0.75,
            "target_confidence": 0.5,
            "context_tokens": [7, 8, 9],
        }
    ]
    assert (second["prompt"], second["acceptance_rate"]) == ("raw", None)


def test_export_pages_through_a_long_store_in_order(store):
    add(store, *[make_generation(f"g{number:03d}") for number in range(401)])
    assert [item["id"] for item in store.export()] == [f"g{number:03d}" for number in range(401)]


def test_pending_failures_are_stored_after_the_last_run(store):
    add(store, *[make_generation(f"g{number}", acceptance_rate=0.1) for number in range(3)])
    add(store, make_generation("fine", acceptance_rate=0.9))
    assert store.pending_failures() == 3
    add(store, make_training_run("nothing", verdict="no_data", last_generation=""))
    assert store.pending_failures() == 3
    add(store, make_training_run("used", last_generation="g1"))
    assert store.pending_failures() == 1
    add(store, make_generation("late", acceptance_rate=0.1, created_at=0.0))
    assert store.pending_failures() == 2
    add(store, make_training_run("older", last_generation="g0"))
    assert store.pending_failures() == 2


def test_a_summary_counts_and_rates(store):
    empty = store.summary()
    assert (empty.generations, empty.lifetime_acceptance, empty.rolling_acceptance, empty.last_verdict) == (
        0,
        None,
        None,
        None,
    )
    add(
        store,
        make_generation("a", model_drafted=10, model_accepted=10),
        make_generation("b", model_drafted=30, model_accepted=0, adapter_id="000001"),
        make_training_run("t", verdict="rejected"),
    )
    found = store.summary(rolling=1)
    assert (found.lifetime_acceptance, found.rolling_acceptance) == (0.25, 0.0)
    assert found.by_adapter == {"none": 1.0, "000001": 0.0}
    assert found.last_verdict.verdict == "rejected"
    assert (found.generations, found.disagreements, found.failures) == (2, 2, 2)


def test_a_generation_is_found_by_an_unambiguous_beginning(store):
    add(store, make_generation("abc1"), make_generation("abd2"))
    assert store.generation("abc").id == "abc1"
    assert len(store.generation("abc").disagreements) == 1
    assert store.generation("ab") is None
    assert store.generation("%") is None


def test_unscored_rows_have_something_to_score(store):
    add(
        store,
        make_generation("scored", acceptance_rate=0.3),
        make_generation("parked", acceptance_rate=None),
        make_generation("fast", acceptance_rate=None, top_k=None),
    )
    assert [item.id for item in store.unscored(10)] == ["parked"]
    add(store, make_evaluation("e", subject="generation", generation_id="parked"))
    assert store.unscored(10) == []
