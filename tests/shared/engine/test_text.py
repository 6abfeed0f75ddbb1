"""Text as it streams is the text of all tokens at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from specl.shared.engine.text import TextStream
from tests.fakes import write_tokenizer

HOLD = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def stream(tokenizer, tokens, stop=()):
    made = TextStream(tokenizer, stop)
    pieces = [made.add(token) for token in tokens]
    return [*pieces, made.finish()], made


def test_an_emoji_split_over_tokens_comes_whole(tokenizer):
    tokens = tokenizer.encode("a😀b", add_special_tokens=False)
    assert len(tokens) == 6
    pieces, made = stream(tokenizer, tokens)
    assert pieces == ["a", "", "", "", "😀", "b", ""]
    assert made.text == "a😀b"


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(0, 275), max_size=40))
def test_any_tokens_stream_to_what_decoding_them_at_once_gives(tokenizer, tokens):
    pieces, made = stream(tokenizer, tokens)
    assert "".join(pieces) == made.text == tokenizer.decode(tokens)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_streams_back_without_a_broken_character(tokenizer, text):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces, _ = stream(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens) == text
    if HOLD not in text:
        assert not any(HOLD in piece for piece in pieces)


def test_an_answer_that_ends_inside_a_character_shows_that(tokenizer):
    tokens = tokenizer.encode("ab€", add_special_tokens=False)[:-1]
    assert stream(tokenizer, tokens)[1].text == f"ab{HOLD}"


@settings(max_examples=200, deadline=None)
@given(text=st.text("abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_and_no_part_of_it_slips_out(tokenizer, text, stops):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    made = TextStream(tokenizer, tuple(stops))
    shown = ""
    for token in tokens:
        shown += made.add(token)
        if made.stopped:
            break
    shown += made.finish()
    ends = [text.find(stop) for stop in stops if stop in text]
    assert made.stopped == bool(ends)
    assert shown == made.text
    if not ends:
        assert shown == text
    else:
        assert not any(stop in shown for stop in stops)
        assert text.startswith(shown)
        assert any(text[len(shown) :].startswith(stop) for stop in stops)


def test_a_stop_string_split_over_tokens_is_found_and_nothing_comes_after(tokenizer):
    tokens = tokenizer.encode("one STOP two", add_special_tokens=False)
    pieces, made = stream(tokenizer, tokens, ("STOP",))
    assert made.text == "one "
    assert made.stopped
    assert "".join(pieces) == "one "


def test_what_only_began_like_a_stop_string_is_text(tokenizer):
    tokens = tokenizer.encode("one STO", add_special_tokens=False)
    assert stream(tokenizer, tokens, ("STOP",))[1].text == "one STO"


def test_an_empty_stop_string_stops_nothing(tokenizer):
    assert stream(tokenizer, tokenizer.encode("abc", add_special_tokens=False), ("",))[1].text == "abc"


def test_many_broken_bytes_before_a_character_do_not_lose_it(tokenizer):
    broken, euro = tokenizer.encode("é", add_special_tokens=False)[1:], tokenizer.encode("€", add_special_tokens=False)
    tokens = [*broken * 7, *euro, *tokenizer.encode("A", add_special_tokens=False)]
    assert stream(tokenizer, tokens)[1].text == f"{HOLD * 7}€A"
