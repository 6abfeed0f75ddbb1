"""Caches for the next turn: the same tokens for the same text, nobody's caches taken for a common beginning, a budget."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import AutoTokenizer

from specl.shared.engine.core import EngineCore
from specl.shared.engine.prefix_cache import Entry, PrefixCache
from specl.shared.engine.request_options import RequestOptions
from specl.shared.models.head import new_head
from tests.conftest import tiny_model
from tests.fakes import END, write_tokenizer

ASK = [{"role": "user", "content": "What then?"}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    target = tiny_model(vocabulary=300)
    target.tokenizer = TokenizerWrapper(AutoTokenizer.from_pretrained(folder), eos_token_ids=[END])
    return EngineCore(target, new_head(target, np.arange(0, 300, 2)))


def say(engine, prompt, ids, output, owner=""):
    """A finished request whose answer was these tokens."""
    session = engine.session(ids, RequestOptions(max_tokens=100, num_draft_tokens=0, cache_owner=owner))
    while not session.prefill():
        pass
    state = session.state
    state.tokens.extend(output)
    rows = engine.target.hidden_states(mx.array([state.tokens[state.cached : -1]]), state.cache)[0]
    state.cached = len(state.tokens) - 1
    state.append_states(rows)
    session.output.extend(output)
    session.finish_reason = "stop" if output[-1] == END else "length"
    return session


@pytest.mark.parametrize(
    "answer", [" therefore", "  two spaces", "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{GRINNING FACE}"]
)
@pytest.mark.parametrize("ended", [True, False])
def test_next_turn_has_the_generated_tokens(engine, answer, ended):
    engine.prefixes.purge()
    tokenizer = engine.target.tokenizer
    text, ids = engine.encode_chat(ASK)
    # one token a byte: not how the tokenizer would cut it
    output = [i for c in answer for i in tokenizer.encode(c, add_special_tokens=False)] + [END] * ended
    session = say(engine, text, ids, output)
    engine.save_to_prefix_cache(session, "", text + answer)
    messages = [*ASK, {"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
    rendered, again = engine.encode_chat(messages)
    fed = [*ids, *output[: len(output) - ended]]
    assert again[: len(fed)] == fed
    assert tokenizer.decode(again) == rendered
    state = engine.prefixes.take(again, "")
    assert state is not None and state.cached >= len(fed) - 1


def test_merely_similar_text_is_encoded_afresh(engine):
    engine.prefixes.purge()
    text, ids = engine.encode_chat(ASK)
    output = engine.encode("the") + [END]
    engine.save_to_prefix_cache(say(engine, text, ids, output), "", text + "the")
    messages = [*ASK, {"role": "assistant", "content": "there"}, {"role": "user", "content": "And?"}]
    rendered, again = engine.encode_chat(messages)
    assert again == engine.encode(rendered)


def test_broken_bytes_and_cut_texts_are_not_spliced(engine):
    engine.prefixes.purge()
    text, ids = engine.encode_chat(ASK)
    session = say(engine, text, ids, [*engine.encode("so"), END])
    engine.save_to_prefix_cache(session, "", text + "so\N{REPLACEMENT CHARACTER}")
    cut = say(engine, text, ids, engine.encode("so it"))
    cut.finish_reason = "stop"
    engine.save_to_prefix_cache(cut, "", text + "so")
    assert not engine.prefixes.texts


def test_common_prefix_is_copied_and_the_original_stays(engine):
    engine.prefixes.purge()
    text = list(range(4, 104))
    engine.save_to_prefix_cache(say(engine, "", text[:60], text[60:]), "")
    state = engine.prefixes.take([*text[:30], 200, 201], "")
    assert state.cached == 29 and state.tokens == text[:29]
    assert engine.prefixes.tokens == 100, "the long one is still there"
    fresh = engine.target.new_cache()
    mx.eval(engine.target.hidden_states(mx.array([text[:29]]), fresh))
    for copy, layer in zip(state.cache, fresh, strict=True):
        assert mx.allclose(copy.keys[..., :29, :], layer.keys[..., :29, :], atol=1e-5).item()
    engine.prefixes.put(Entry(state, ""))
    session = engine.session([*text, 5], RequestOptions(max_tokens=8, num_draft_tokens=2))
    assert session.stats.reused_tokens == 99
    while not session.prefill():
        pass
    while session.finish_reason is None:
        session.round()
        session.check_in_step()


def test_least_recently_used_goes_first_within_budget(engine):
    cache = PrefixCache(budget=100)
    states = [say(engine, "", list(range(i, i + 30)), [7] * 10).state for i in (4, 40, 80)]
    for state in states:
        cache.put(Entry(state, ""))
        assert cache.tokens <= 100
    assert cache.take([*range(4, 34), 7, 7], "") is None
    assert cache.take([*range(80, 110), 7, 7], "") is not None
    cache.shrink(90)
    assert cache.tokens == 0


def test_short_texts_stay_within_the_memory_budget(engine):
    cache = PrefixCache(budget=1024)
    rng = np.random.default_rng(0)
    for _ in range(40):
        ids = rng.integers(4, 290, 24).tolist()
        cache.put(Entry(say(engine, "", ids, [7] * 8).state, ""))
        held = sum(entry.state.cache[0].keys.shape[2] for entry in cache._entries)
        assert held <= cache.tokens <= 1024
    assert len(cache) == 32, "room is used, too"


def test_trimmed_state_continues_as_if_untrimmed(engine):
    def turn(prompt):
        session = engine.session(prompt, RequestOptions(max_tokens=8, num_draft_tokens=2))
        while not session.prefill():
            pass
        while session.finish_reason is None:
            session.round()
            session.check_in_step()
        return session

    engine.prefixes.purge()
    first = turn(list(range(4, 64)))
    assert first.state.cache[0].keys.shape[2] == 256
    engine.save_to_prefix_cache(first, "")
    assert first.state.cache[0].keys.shape[2] == first.state.cached < 80
    prompt = [*first.state.tokens, 5, 6]
    again = turn(prompt)
    assert again.stats.reused_tokens == len(prompt) - 3
    engine.prefixes.purge()
    assert again.output == turn(prompt).output


def test_seeded_prompt_ignores_cached_tokenization(engine):
    engine.prefixes.purge()
    text, ids = engine.encode_chat(ASK)
    output = [i for c in " therefore" for i in engine.target.tokenizer.encode(c, add_special_tokens=False)] + [END]
    engine.save_to_prefix_cache(say(engine, text, ids, output), "", text + " therefore")
    messages = [*ASK, {"role": "assistant", "content": " therefore"}, {"role": "user", "content": "And?"}]
    rendered, spliced = engine.encode_chat(messages)
    assert engine.encode_chat(messages, reuse_tokens=False) == (rendered, engine.encode(rendered))
    assert spliced != engine.encode(rendered), "or this test would say nothing"


def test_guesses_at_anothers_prompt_reuse_nothing(engine):
    engine.prefixes.purge()
    text, ids = engine.encode_chat(ASK)
    session = say(engine, text, [*ids, *range(100, 140)], [7, END], owner="ada")
    engine.save_to_prefix_cache(session, "", text + "x")
    for guesser in ("", "eve", "ada "):
        for length in (20, len(ids) + 10, len(ids) + 40):
            options = RequestOptions(max_tokens=4, cache_owner=guesser)
            guess = engine.session([*ids, *range(100, 140)][:length], options)
            assert guess.stats.reused_tokens == 0
    assert engine.session([*ids, *range(100, 140)], RequestOptions(cache_owner="ada")).stats.reused_tokens > 0


def test_unrecorded_request_returns_the_owners_entry(engine):
    engine.prefixes.purge()
    ids = list(range(60, 100))
    engine.save_to_prefix_cache(say(engine, "", ids, [7, END], owner="ada"), "", "")
    session = engine.session([*ids, 5, 5], RequestOptions(cache_owner="ada"))
    engine.return_to_prefix_cache(session)
    assert engine.prefixes.take([*ids, 5, 5], "") is None
    assert engine.prefixes.take([*ids, 5, 5], "", "ada") is not None


def test_anothers_tokens_are_not_spliced(engine):
    engine.prefixes.purge()
    text, ids = engine.encode_chat(ASK)
    output = [i for c in " therefore" for i in engine.target.tokenizer.encode(c, add_special_tokens=False)] + [END]
    engine.save_to_prefix_cache(say(engine, text, ids, output, owner="ada"), "", text + " therefore")
    messages = [*ASK, {"role": "assistant", "content": " therefore"}, {"role": "user", "content": "And then?"}]
    rendered, stranger = engine.encode_chat(messages, owner="eve")
    assert stranger == engine.encode(rendered) != engine.encode_chat(messages, owner="ada")[1]
