"""Entries that repeat purged text leave logs and the chat's history; everything else stays as it was."""

import json

import pytest
from prompt_toolkit.history import FileHistory

from specl.shared.retention.chat_history import empty_history, erase_history
from specl.shared.retention.purged_text import PASSAGE, PurgedText, erase_from_logs

SECRET = "the purple heron of Aldersgate hums at noon, they say"


@pytest.mark.parametrize("start", range(0, len(SECRET) - 2 * PASSAGE + 2))
def test_any_copy_of_47_characters_is_found(start):
    assert PurgedText([SECRET]).is_repeated_in(f"... {SECRET[start : start + 2 * PASSAGE - 1].upper()} ...")


def test_short_texts_are_not_looked_for():
    assert not PurgedText(["Yes.", "", "a" * 11]).is_repeated_in("Yes. " + "a" * 30)
    assert PurgedText(["a secret one"]).is_repeated_in("not A SECRET ONE any more")


def test_other_texts_are_not_taken_for_it():
    assert not PurgedText([SECRET]).is_repeated_in("the purple heron of Canterbury hums at night")


@pytest.mark.parametrize(
    "text", [SECRET, "größer als das Übliche: ein „Geheimnis“", 'with "quotes"\nand lines\tand \\']
)
@pytest.mark.parametrize("ascii", [True, False])
def test_log_lines_with_escapes_are_recognised(tmp_path, text, ascii):
    path = tmp_path / "inference.log"
    kept = json.dumps({"event": "kept"}) + "\n"
    path.write_text(kept + json.dumps({"event": "x", "error": [f"so: {text}"]}, ensure_ascii=ascii) + "\n" + kept)
    erase_from_logs([path, tmp_path / "missing.log"], PurgedText([text]))
    assert path.read_text() == 2 * kept


def test_lines_that_are_no_json_are_recognised(tmp_path):
    path = tmp_path / "trainer.log"
    path.write_bytes(b"\xff\n" + f"Traceback {SECRET}\n".encode() + b"[" * 100_000 + b"\n")
    erase_from_logs([path], PurgedText([SECRET]))
    assert path.read_bytes() == b"\xff\n" + b"[" * 100_000 + b"\n"


@pytest.fixture
def history(tmp_path):
    history = FileHistory(tmp_path / "history")
    for message in ("PIN 4711", "PIN 47", '"""one', 'Key 9"""', f"I said {SECRET}\nand more\n# not a time", "stays"):
        history.store_string(message)
    return history


def messages(history):
    return list(FileHistory(history.filename).load_history_strings())[::-1]


def test_typed_messages_are_compared_whole(history, tmp_path):
    erase_history(tmp_path / "history", ["PIN 4711", "one\nKey 9"], PurgedText([]), "")
    assert [message[:6] for message in messages(history)] == ["PIN 47", "I said", "stays"]


def test_messages_that_repeat_a_passage_go(history, tmp_path):
    erase_history(tmp_path / "history", [], PurgedText([SECRET]), "")
    assert len(messages(history)) == 5 and not any("heron" in message for message in messages(history))


def test_messages_with_the_pattern_go(history, tmp_path):
    erase_history(tmp_path / "history", [], PurgedText([]), "pin")
    assert not any("PIN" in message for message in messages(history)) and len(messages(history)) == 4


def test_an_emptied_history_is_an_empty_file(history, tmp_path):
    empty_history(tmp_path / "history")
    assert (tmp_path / "history").read_bytes() == b""
