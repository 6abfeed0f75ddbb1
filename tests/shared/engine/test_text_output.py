"""Text as it streams is the text of all tokens at once."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from specl.shared.engine.text_output import TextStream
from tests.fakes import write_tokenizer

HOLD = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


FIRST_BYTE, WORDS = 10, ["\u2581a", "b", "\u2581", "\u2581\u6f22", "\U0001f600"]


@pytest.fixture(scope="module")
def by_bytes():
    """What SentencePiece models have: a few words, and a token for each byte of what is none of them."""
    pieces = ["<unk>", *WORDS, *(f"<unused-{i}>" for i in range(FIRST_BYTE - 1 - len(WORDS)))]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    bpe = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(bpe)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def spelled(text):
    return [FIRST_BYTE + byte if byte != 0x20 else 3 for byte in text.encode()]  # a space has a piece of its own


def as_shown(tokens):
    """`tokens` as SentencePiece would decode them, but whole characters at the beginning of a broken run stand."""
    text, start = "", 0
    while start < len(tokens):
        end = start
        while end < len(tokens) and tokens[end] >= FIRST_BYTE:
            end += 1
        if end == start:
            text, start = text + (WORDS[tokens[start] - 1].replace("\u2581", " ")), start + 1
            continue
        run = bytes(token - FIRST_BYTE for token in tokens[start:end])
        try:
            text += run.decode()
        except UnicodeDecodeError as wrong:
            text += run[: wrong.start].decode() + HOLD * (len(run) - wrong.start)
        start = end
    return text.removeprefix(" ")


def stream_text(tokenizer, tokens, stop=()):
    stream = TextStream(tokenizer, stop)
    pieces = [stream.add(token) for token in tokens]
    return [*pieces, stream.finish()], stream


def test_an_emoji_split_over_tokens_comes_whole(tokenizer):
    tokens = tokenizer.encode("a😀b", add_special_tokens=False)
    assert len(tokens) == 6
    pieces, stream = stream_text(tokenizer, tokens)
    assert pieces == ["a", "", "", "", "😀", "b", ""]
    assert stream.text == "a😀b"


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 275), max_size=40))
def test_streamed_tokens_equal_decoding_at_once(tokenizer, tokens):
    pieces, stream = stream_text(tokenizer, tokens)
    assert "".join(pieces) == stream.text == tokenizer.decode(tokens)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_streams_back_without_a_broken_character(tokenizer, text):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces, _ = stream_text(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens) == text
    if HOLD not in text:
        assert not any(HOLD in piece for piece in pieces)


def test_unfinished_character_at_the_end_is_shown(tokenizer):
    tokens = tokenizer.encode("ab€", add_special_tokens=False)[:-1]
    assert stream_text(tokenizer, tokens)[1].text == f"ab{HOLD}"


@settings(max_examples=80, deadline=None)
@given(text=st.text("abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(tokenizer, text, stops):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, tuple(stops))
    shown = ""
    for token in tokens:
        shown += stream.add(token)
        if stream.stopped:
            break
    shown += stream.finish()
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(ends)
    assert shown == stream.text
    if not ends:
        assert shown == text
    else:
        assert not any(stop in shown for stop in stops)
        assert text.startswith(shown)
        assert any(text[len(shown) :].startswith(stop) for stop in stops)


def test_stop_string_split_over_tokens_is_found(tokenizer):
    tokens = tokenizer.encode("one STOP two", add_special_tokens=False)
    pieces, stream = stream_text(tokenizer, tokens, ("STOP",))
    assert stream.text == "one "
    assert stream.stopped
    assert "".join(pieces) == "one "


def test_partial_stop_string_is_text(tokenizer):
    tokens = tokenizer.encode("one STO", add_special_tokens=False)
    assert stream_text(tokenizer, tokens, ("STOP",))[1].text == "one STO"


def test_an_empty_stop_string_stops_nothing(tokenizer):
    assert stream_text(tokenizer, tokenizer.encode("abc", add_special_tokens=False), ("",))[1].text == "abc"


def test_broken_bytes_do_not_lose_the_next_character(tokenizer):
    broken, euro = tokenizer.encode("é", add_special_tokens=False)[1:], tokenizer.encode("€", add_special_tokens=False)
    tokens = [*broken * 7, *euro, *tokenizer.encode("A", add_special_tokens=False)]
    assert stream_text(tokenizer, tokens)[1].text == f"{HOLD * 7}€A"


words = st.integers(1, len(WORDS)).map(lambda token: [token])
bytes_of_words = st.text(min_size=1, max_size=3).filter(lambda text: HOLD not in text).map(spelled)
few_bytes = st.lists(st.sampled_from([0x41, 0x80, 0x98, 0x9F, 0xE2, 0xF0, 0xFF]), min_size=1, max_size=5)
broken = few_bytes.map(lambda values: [FIRST_BYTE + value for value in values])


@settings(max_examples=100, deadline=None)
@example(parts=[spelled("\N{GRINNING FACE}\N{GRINNING FACE}")])
@given(parts=st.lists(words | bytes_of_words, max_size=8))
def test_byte_fallback_text_is_whole_at_any_cut(by_bytes, parts):
    tokens = [token for part in parts for token in part]
    whole = by_bytes.decode(tokens, skip_special_tokens=False)
    pieces, stream = stream_text(by_bytes, tokens)
    assert stream.text == "".join(pieces) == whole == as_shown(tokens)
    assert all(whole.startswith("".join(pieces[:count])) for count in range(len(pieces)))


@settings(max_examples=120, deadline=None)
@given(parts=st.lists(words | bytes_of_words | broken, max_size=8))
def test_broken_bytes_never_retract_or_repeat_text(by_bytes, parts):
    tokens = [token for part in parts for token in part]
    pieces, stream = stream_text(by_bytes, tokens)
    assert stream.text == "".join(pieces) == as_shown(tokens)


def test_emoji_in_bytes_comes_with_its_last_byte(by_bytes):
    assert stream_text(by_bytes, [*spelled("\N{GRINNING FACE}"), 2])[0] == ["", "", "", "\N{GRINNING FACE}", "b", ""]


def test_replacement_characters_wait_three_tokens_at_most(by_bytes):
    pieces, _ = stream_text(by_bytes, [FIRST_BYTE + 0xFF] * 40)
    assert pieces == ["", "", "", *[HOLD] * 37, HOLD * 3]
