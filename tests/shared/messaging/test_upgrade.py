"""Records of version 1, as old outboxes hold them, in today's shape: codes instead of sentences, and the sentences beside them."""

import json
from pathlib import Path

import msgpack
import pytest

from specl.shared.answer_stats import AnswerStats
from specl.shared.errors import WireError
from specl.shared.messaging.codec import decode, encode
from specl.shared.messaging.outbox import Outbox
from specl.shared.messaging.upgrade import activation_reason_v1, run_trigger_v1
from tests.fakes import make_activation, make_generation

V1 = Path(__file__).parents[2] / "fixtures" / "v1"


@pytest.fixture
def records(tmp_path):
    """What the old outboxes hold, decoded, by id; and what was written into them."""
    decoded = {}
    for producer in ("inference", "trainer"):
        path = tmp_path / f"{producer}.db"
        path.write_bytes((V1 / "outbox" / f"{producer}.db").read_bytes())
        outbox = Outbox(path)
        decoded |= {row.id: decode(row.body) for row in outbox.oldest()}
        outbox.close()
    written = json.loads((V1 / "EXPECTED.json").read_text(encoding="utf-8"))["outbox"]["records"]
    return decoded, written


def test_old_statistics_become_typed(records):
    decoded, written = records
    for row in written["Generation"]:
        assert decoded[row["id"]].stats == (AnswerStats(**row["stats"]) if row["stats"] else None)


def test_old_reasons_become_codes_with_their_sentence(records):
    decoded, written = records
    for row in written["Activation"]:
        record = decoded[row["id"]]
        assert (record.event, record.note) == (row["event"], row["reason"])
        assert record.reason == activation_reason_v1(row["event"], row["reason"])
    for row in written["TrainingRun"]:
        record = decoded[row["id"]]
        assert (record.cause, record.verdict) == (row["trigger"], row["verdict"])
        assert record.trigger == run_trigger_v1(row["trigger"])


@pytest.mark.parametrize(
    ("event", "note", "reason"),
    [
        ("activated", "announced", "announced"),
        ("activated", "restart", "restart"),
        ("activated", "by hand", "by_hand"),
        ("activated", "by hand, once more", "by_hand_again"),
        ("activated", "rolled back by hand", "rolled_back_by_hand"),
        ("activated", "adapter 000002 was rolled back", "rollback"),
        ("unloaded", "adapter 000002 was rolled back", "rollback"),
        ("activated", "reinstated by a second look", "reinstated"),
        ("rejected", "adapter 000009: a file is missing", "verification"),
        ("rolled_back", "live acceptance 0.1 of 41 tokens", "live_acceptance"),
        ("activated", "for no reason", "other"),
    ],
)
def test_every_old_reason_has_its_code(event, note, reason):
    assert activation_reason_v1(event, note) == reason


@pytest.mark.parametrize(
    ("cause", "trigger"),
    [
        ("57 failures", "failures"),
        ("by hand", "by_hand"),
        ("by hand, now", "by_hand_now"),
        ("import their-adapter", "import"),
        ("second look at 000002", "reevaluation"),
        ("a full moon", "other"),
    ],
)
def test_every_old_trigger_has_its_code(cause, trigger):
    assert run_trigger_v1(cause) == trigger


def frame(version, record, **changes):
    _, kind, body = msgpack.unpackb(encode(record))
    return msgpack.packb([version, kind, body | changes])


def test_absent_old_statistics_have_defaults():
    old = frame(1, make_generation("g"), stats={"rounds": 7, "something": "else"})
    assert decode(old).stats == AnswerStats(rounds=7)


@pytest.mark.parametrize(
    "stats", [[], 5, "x", {"rounds": "7"}, {"k_histogram": {"1": "2"}}, {"acceptance_by_depth": [[]]}]
)
def test_senseless_old_statistics_are_refused(stats):
    with pytest.raises(WireError):
        decode(frame(1, make_generation("g"), stats=stats))


@pytest.mark.parametrize("changes", [{"event": "exploded"}, {"event": 5}, {"reason": "because"}, {"reason": None}])
def test_an_unknown_code_is_refused(changes):
    with pytest.raises(WireError):
        decode(frame(2, make_activation("a"), **changes))


def test_messages_of_version_1_are_refused():
    with pytest.raises(WireError, match="version"):
        decode(msgpack.packb([1, "Cancel", {"request_id": "r"}]))
