"""Which requests wait, start, end and how, and what becomes of their caches."""

import numpy as np
import pytest

from specl.shared.messaging.messages import Failed, PrefillProgress
from tests.harness.decoding import CLIENT, request

LONG = "x" * 600  # more than one part of a prefill


def text_of(running):
    return "".join(map(chr, running.session.output))


def test_cancel_and_deadline_together_end_a_request_once(decoding):
    first, second = decoding.start("a", LONG), decoding.start("b", LONG, deadline_s=60)
    prefill = first.session.prefill

    def slow():
        second.job.arrived -= 61
        decoding.thread.cancel("b", "no longer needed", CLIENT)
        return prefill()

    first.session.prefill = slow
    decoding.turn()
    assert [outcome for outcome in decoding.outcomes() if outcome[0] == "Failed"] == [("Failed", "b", "cancelled")]
    assert decoding.scheduler.running == [first]


def test_request_waiting_past_its_deadline_never_starts(new_decoding):
    decoding = new_decoding("serving: {max_active: 1}")
    decoding.ask("a", LONG)
    late = decoding.ask("b", "hello", deadline_s=60)
    decoding.turn()
    late.arrived -= 61
    decoding.turn()
    assert [outcome for outcome in decoding.outcomes() if outcome[0] == "Failed"] == [("Failed", "b", "deadline")]
    assert not decoding.scheduler.waiting


@pytest.mark.parametrize("values, word", [
    ({"max_tokens": 0}, "max_tokens"), ({"num_draft_tokens": 17}, "num_draft_tokens"), ({"logprobs": 21}, "logprobs"),
    ({"sampling": {"temperature": -1}}, "temperature"),
])  # fmt: skip
def test_value_out_of_range_is_refused_by_name(decoding, values, word):
    decoding.ask("good", "hello")
    decoding.scheduler.add(CLIENT, request("bad", "hello", **values), 0.0)
    decoding.turn(3)
    (failed,) = [message for message in decoding.sent if isinstance(message, Failed)]
    assert failed.request_id == "bad" and failed.code == "rejected" and word in failed.message


def test_only_its_client_cancels_a_request(decoding):
    running = decoding.start("a", LONG)
    decoding.scheduler.cancel("a", "a stranger says so", b"stranger")
    assert decoding.scheduler.running == [running]
    decoding.scheduler.cancel("a", "the client is gone", None)
    assert not decoding.scheduler.running


def test_waiting_clients_hear_their_positions(new_decoding):
    decoding = new_decoding("serving: {max_active: 1}")
    decoding.ask("a", LONG)
    decoding.turn()
    decoding.ask("b", "hello")
    decoding.ask("c", "hello")
    decoding.scheduler.cancel("b", "no longer needed", CLIENT)
    positions = [(message.request_id, message.position) for message in decoding.sent if hasattr(message, "position")]
    assert positions == [("b", 0), ("c", 1), ("c", 0)]


def test_each_part_of_a_prompt_is_reported(decoding):
    decoding.start("a", "x" * 1200)
    decoding.turn(3)
    parts = [message for message in decoding.sent if isinstance(message, PrefillProgress)]
    assert parts == [PrefillProgress("a", 512, 1200), PrefillProgress("a", 1024, 1200)]


def test_long_chat_continues_from_its_own_caches(new_decoding):
    decoding = new_decoding("memory: {max_kv_cache_tokens: 1024}")
    first = decoding.serve("a", LONG)
    again = decoding.start("b", LONG + text_of(first) + "and then?", max_tokens=500)
    assert again.session.stats.reused_tokens >= 600
    assert decoding.engine.prefixes.tokens == 0


def test_request_reserves_at_most_the_context(decoding):
    assert decoding.ask("a", "hello", max_tokens=100_000).reserved == decoding.engine.target.context_length


def test_answer_ends_where_its_cache_outgrows_the_budget(new_decoding):
    running = new_decoding("{memory: {max_kv_cache_tokens: 64}}").serve("long", "abc" * 18, max_tokens=1000)
    assert running.job.reserved == 64 and len(running.session.output) == 64 - len(running.job.prompt)
    assert running.session.finish_reason == "length"


def test_request_cancelled_in_its_prompt_leaves_its_cache(decoding):
    decoding.ask("a", LONG + LONG)
    decoding.turn()
    decoding.thread.cancel("a", "no longer needed", CLIENT)
    decoding.turn()
    assert decoding.outcomes()[-1] == ("Failed", "a", "cancelled")
    assert decoding.serve("b", LONG + LONG).session.stats.reused_tokens == 512


@pytest.mark.parametrize("cancelled", [False, True])
def test_unrecorded_request_returns_only_the_caches_it_took(decoding, cancelled):
    first = decoding.serve("a", LONG)
    known = list(first.session.state.tokens)
    prompt = LONG + text_of(first) + "my private words"
    running = decoding.start("b", prompt, record=False)
    taken = running.session.stats.reused_tokens
    assert taken > 500
    if cancelled:
        decoding.scheduler.cancel("b", "no longer needed", CLIENT)
    while decoding.thread.busy:
        decoding.turn()
    (entry,) = decoding.engine.prefixes._entries
    state = entry.state
    assert state.tokens == known[: taken + 1] and state.cached == taken and state.drafter is None
    for layer, used in zip(state.cache, running.session.state.cache, strict=True):
        assert not np.shares_memory(np.array(layer.keys, copy=False), np.array(used.keys, copy=False))
        assert layer.keys.shape[2] == layer.values.shape[2] == layer.offset == taken, "no space that could hold more"
    assert decoding.serve("c", prompt).session.stats.reused_tokens == taken


def test_seeded_request_has_the_tokens_of_its_text(decoding):
    reused, encode = [], decoding.engine.encode_chat
    decoding.engine.encode_chat = lambda messages, reuse_tokens, owner: (
        reused.append(reuse_tokens) or encode(messages, reuse_tokens, owner)
    )
    for sampling in ({}, {"seed": 4}):
        decoding.ask("a", messages=[{"role": "user", "content": "hi"}], sampling=sampling)
    assert reused == [True, False]
