"""Which conversation an answer belongs to, and that the id that says so gives nothing away."""

from dataclasses import replace

import pytest

from specl.shared.conversations import conversation_of, is_hash_shaped
from specl.shared.messaging.messages import Purge
from specl.shared.retention.purge_matching import purge_matches
from specl.shared.retention.redaction import Redactor
from specl.shared.settings.schema import Records
from tests.fakes import make_generation, to_row

SYSTEM = {"role": "system", "content": "You are brief."}
FIRST = {"role": "user", "content": "What is a lighthouse?"}
ANSWER = {"role": "assistant", "content": "A tower with a lamp."}
SECOND = {"role": "user", "content": "And a lightship?"}


def test_all_turns_of_a_chat_are_one_conversation():
    first = conversation_of([SYSTEM, FIRST])
    assert first == conversation_of([SYSTEM, FIRST, ANSWER, SECOND])
    assert first == conversation_of([SYSTEM, FIRST, {**ANSWER, "content": "sampled anew"}, SECOND, ANSWER, FIRST])
    assert len(first) == 32 and is_hash_shaped(first)


def test_another_beginning_is_another_conversation():
    found = [
        conversation_of([SYSTEM, FIRST]),
        conversation_of([FIRST]),
        conversation_of([{**SYSTEM, "content": "You are long."}, FIRST]),
        conversation_of([SYSTEM, SECOND]),
        conversation_of([], FIRST["content"]),
        conversation_of([{"role": "user", "content": SYSTEM["content"]}, FIRST]),
    ]
    assert len(set(found)) == len(found)


def test_greeting_and_extra_keys_make_no_difference():
    assert conversation_of([SYSTEM, ANSWER, {**FIRST, "name": "me"}]) == conversation_of([SYSTEM, FIRST])


def test_a_plain_prompt_goes_by_its_beginning():
    page = "x" * 2000
    assert conversation_of([], page + "one") == conversation_of([], page + "another")
    assert conversation_of([], "one") != conversation_of([], "another")


@pytest.mark.parametrize("content", ["\ud800", None, [{"type": "text", "text": "ü"}], b"\xff", {1: 2}])
def test_whatever_a_message_holds_it_has_an_id(content):
    messages = [{"role": "user", "content": content}]
    assert conversation_of(messages) == conversation_of([*messages, ANSWER]) and is_hash_shaped(
        conversation_of(messages)
    )
    assert is_hash_shaped(conversation_of([], "\ud800"))


def purge(pattern):
    return Purge([], None, pattern)


def of(text, **changes):
    messages = [{"role": "user", "content": text}]
    return make_generation("g1", messages=messages, conversation_id=conversation_of(messages), **changes)


def test_redacted_records_drop_the_conversation_hash():
    record = of("my number is 12345678")
    for records in (Records(redact=[r"\d{8}"]), Records(keep="statistics")):
        assert Redactor(records).apply(record).record.conversation_id == record.id


def test_pattern_that_matches_only_the_hash_redacts_nothing():
    record = of("a harmless question", prompt="a harmless question", output="an answer")
    assert any(digit.isdigit() for digit in record.conversation_id)
    assert Redactor(Records(redact=[r"\d"])).apply(record).whole


def test_purge_matches_a_hash_only_whole():
    record = of("a harmless question")
    hash = record.conversation_id
    assert not purge_matches(purge(hash[:3]), to_row(record))
    assert not purge_matches(purge(hash[:-1]), to_row(record))
    assert purge_matches(purge(hash.upper()), to_row(record))
    assert purge_matches(purge("harmless"), to_row(record))
    assert purge_matches(purge("harbour"), to_row(replace(record, conversation_id="the Harbour talk")))
