"""Files that people have: odd line ends, marks, huge fields, broken characters. One reader, one
sentence for what is none.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specl.cli.draft.texts import prompts_of
from specl.cli.files.prompts import read_prompts
from specl.cli.files.text import read_text
from specl.cli.store.import_jsonl import read_texts
from specl.shared.errors import ConfigError

ODD = "one\u2028two\u0085three\x0cfour"
DEEP = "[" * 100_000 + "]" * 100_000


def contents(items):
    return [item.messages[-1]["content"] for item in items]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_only_a_newline_ends_a_line(tmp_path, name):
    line = json.dumps({"prompt": ODD}, ensure_ascii=False) if name == "a.jsonl" else ODD
    head = "prompt\r\n" if name == "a.csv" else ""
    (tmp_path / name).write_bytes(f"\ufeff{head}{line}\r\n{line}\r\n".encode())
    assert contents(read_prompts(str(tmp_path / name))) == [ODD, ODD]
    assert contents(prompts_of(str(tmp_path / name))[0]) == [ODD, ODD]


def test_what_the_export_writes_is_read_again(tmp_path):
    row = {"id": "a", "prompt": ODD, "target_output": "fine"}
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
    assert [item.prompt for item in read_texts(str(tmp_path / "a.jsonl"))] == [ODD]


def test_a_mark_before_json_hides_no_json(tmp_path):
    (tmp_path / "prompts").write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\ntwo\n')
    assert contents(prompts_of(str(tmp_path / "prompts"))[0]) == ["one", "two"]


def test_a_long_document_is_one_field(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,n\n" + "long " * 50_000 + ",1\n")
    assert len(contents(read_prompts(str(tmp_path / "a.csv")))[0]) == 249_999


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'"fine"\n"half \\ud800"\n', r"a.jsonl:2: it holds half a surrogate pair"),
        ("a.json", b'["half \\uD800"]', "a.json is not JSON: it holds half"),
        ("a.jsonl", b'"fine"\n' + DEEP.encode(), "a.jsonl:2: it is nested too deeply"),
        ("a.json", DEEP.encode(), "nested too deeply"),
        ("a.txt", b"fine\nna\xefve\n", r"a.txt:2: not UTF-8 text \(byte 3 of the line\)"),
        ("a.csv", b"prompt\nna\xefve\n", "a.csv:2: not UTF-8 text"),
    ],
)
def test_unreadable_input_is_named_with_its_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    for reader in (read_prompts, prompts_of):
        with pytest.raises(ConfigError, match=message):
            reader(str(tmp_path / name))


@pytest.mark.parametrize("line", [DEEP, '{"prompt": "\\ud800", "target_output": "x"}', "{}", "[1]"])
def test_an_import_names_the_line_that_it_refuses(specl, tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "target_output": "b"}\n' + line)
    outcome = specl("store", "import", "--jsonl", tmp_path / "a.jsonl", "--text-only")
    assert outcome.exit_code == 2 and "a.jsonl:2: " in outcome.stderr and len(outcome.stderr) < 500


def test_a_disagreement_at_no_place_is_refused(tmp_path):
    row = '{"prompt": "a", "target_output": "b", "disagreements": [{"position": 1e999}]}'
    (tmp_path / "a.jsonl").write_text(row)
    with pytest.raises(ConfigError, match="a.jsonl:1: a disagreement cannot be read"):
        read_texts(str(tmp_path / "a.jsonl"))


# ----------------------------------------------------------------------------------- standard input
def run(*arguments, input=b"", **environment):
    command = [str(Path(sys.executable).parent / "specl-ctl"), *arguments]
    return subprocess.run(command, input=input, env=os.environ | environment, capture_output=True, timeout=60)


@pytest.mark.process
@pytest.mark.parametrize("arguments", [("ask", "-"), ("chat",), ("collect", "-")])
def test_input_that_is_not_utf8_is_one_sentence(arguments):
    done = run(*arguments, input=b"na\xefve\n", LANG="de_DE.ISO-8859-1")
    assert done.returncode == 2
    assert done.stderr == b"specl-ctl: standard input:1: not UTF-8 text (byte 3 of the line)\n"


def test_argument_that_is_not_utf8_is_refused(instance, specl):
    outcome = specl("ask", "na\udcefve")
    assert outcome.exit_code == 2 and "the text is not Unicode" in outcome.stderr


def test_text_has_plain_newlines(tmp_path):
    (tmp_path / "a").write_bytes("a\r\nb\rc\u2028d\n".encode())
    assert read_text(str(tmp_path / "a")) == "a\nb\nc\u2028d\n"


# ------------------------------------------------------------------------------ options and colours
@pytest.mark.parametrize("command", [("ask", "hello"), ("chat",), ("collect", "-"), ("eval", "-")])
@pytest.mark.parametrize("value", ["nan", "-1", "11", "inf"])
def test_a_temperature_that_is_none_is_refused_everywhere(specl, command, value):
    outcome = specl(*command, "--temperature", value)
    assert outcome.exit_code == 2 and "--temperature" in outcome.stderr


def test_nobody_who_said_no_gets_colours(specl, monkeypatch):
    from specl.cli import options

    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b[" in specl("doctor", color=True).stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in specl("doctor", color=True).stdout
    monkeypatch.setattr(sys, "stdout", type("Terminal", (), {"isatty": lambda self: True})())
    assert not options.wants_colour()
    monkeypatch.delenv("NO_COLOR")
    assert options.wants_colour()


OPENAI = [
    ({"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "input_text", "text": "two"}]}, "one two"),
    ({"role": "user", "content": "plain", "name": "me", "refusal": None, "reasoning_content": "x"}, "plain"),
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(("message", "text"), OPENAI)
def test_files_take_what_the_api_takes(tmp_path, name, message, text):
    before = [{"role": "developer", "content": "be kind"}, {"role": "assistant", "content": None, "tool_calls": []}]
    item = json.dumps({"messages": [*before, message, {"role": "assistant", "content": "answer"}]})
    (tmp_path / name).write_text(f"[{item}]" if name == "a.json" else item + "\n")
    for messages in (read_prompts(str(tmp_path / name))[0].messages, prompts_of(str(tmp_path / name))[0][0].messages):
        assert [m["role"] for m in messages] == ["system", "assistant", "user"]
        assert [m["content"] for m in messages] == ["be kind", "", text]


def test_picture_in_a_message_names_its_place(tmp_path):
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [message]}))
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: messages\[0\]\.content: only text parts are supported"):
        read_prompts(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
def test_csv_of_spreadsheets_is_split(tmp_path, sign):
    (tmp_path / "a.csv").write_text(f'id{sign}prompt{sign}price\n1{sign}"why; and, how?"{sign}2\n')
    assert contents(read_prompts(str(tmp_path / "a.csv"))) == ["why; and, how?"]


def test_csv_of_one_column_keeps_its_signs(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\nfirst; then\tthat\n")
    assert contents(read_prompts(str(tmp_path / "a.csv"))) == ["first; then\tthat"]
