"""Prompt files of every form, and `specl-ctl collect` on real daemons."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specl.cli.files.prompts import read_prompts, to_messages
from specl.shared.errors import ConfigError
from tests.harness.waiting import wait_until


def contents(prompts):
    return [item.messages[-1]["content"] for item in prompts]


# -------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "one\n\n  two  \n"),
        ("a.jsonl", '"one"\n\n{"prompt": "two"}\n'),
        ("a.ndjson", '{"messages": [{"role": "user", "content": "one"}]}\n{"question": "two"}\n'),
        ("a.json", '["one", {"text": "two"}]'),
        ("a.csv", 'id,prompt\n1,one\n2,\n3,"two"\n'),
        ("b.csv", "whatever\none\ntwo\n"),
        ("a.tsv", "prompt\tn\none\t1\ntwo\t2\n"),
    ],
)
def test_every_form_gives_the_same_prompts(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert contents(read_prompts(str(tmp_path / name))) == ["one", "two"]
    assert contents(read_prompts(str(tmp_path / name), limit=1)) == ["one"]


def test_byte_order_mark_and_quoted_lines_are_read(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeffprompt,n\r\n"one\nline",1\r\n'.encode())
    assert contents(read_prompts(str(tmp_path / "a.csv"))) == ["one\nline"]


def test_messages_keep_history_and_drop_the_last_answer():
    talk = [{"role": r, "content": r[0]} for r in ("system", "user", "assistant", "user", "assistant")]
    assert to_messages({"messages": talk}) == talk[:4]
    assert to_messages({"instruction": "do", "input": "this", "system": "s"}) == [
        {"role": "system", "content": "s"}, {"role": "user", "content": "do\n\nthis"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '"fine"\n{bad\n{"a": 1}\n', "a.jsonl:2.*\n.*a.jsonl:3: no messages and no prompt"),
        ("a.jsonl", '{"messages": [{"role": "robot", "content": "x"}]}', "role"),
        ("a.json", '{"a": 1}', "no list"),
        ("a.csv", "a,b\n1,2\n", "has no column prompt"),
        ("a.txt", "\n\n", "has no prompts"),
        ("none.txt", None, "cannot be read"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_prompts(str(tmp_path / name))


def test_missing_column_error_lists_the_columns(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="has no column c") as error:
        read_prompts(str(tmp_path / "a.csv"), "c")
    assert "a, b" in error.value.hint
    assert contents(read_prompts(str(tmp_path / "a.csv"), "b")) == ["2"]


# -------------------------------------------------------------------------------------- the command
@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("".join(f"question {n}\n" for n in range(5)))
    return file


def test_answers_are_recorded_and_written(instance, specl, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    outcome = specl("collect", prompts, "--limit", 3, "--max-tokens", 20, "--output", out, "--json")
    assert outcome.exit_code == 0, outcome.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["question 0", "question 1", "question 2"]
    found = outcome.json
    assert found["answers"] == 3 and found["tokens"] == sum(row["tokens"] for row in rows)
    assert found["acceptance"] == pytest.approx(found["accepted"] / found["drafted"])
    instance.settle()
    assert {row["id"] for row in rows} <= set(instance.stored())


def test_resume_asks_what_is_missing(instance, specl, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    specl("collect", prompts, "--limit", 2, "--output", out)
    whole = out.read_text()
    out.write_text(whole + '{"id": "cut o')  # killed while writing
    assert specl("collect", prompts, "--output", out).exit_code == 2
    outcome = specl("collect", prompts, "--output", out, "--resume")
    assert outcome.exit_code == 0 and "2 of 5 are answered already" in outcome.stderr
    assert out.read_text().startswith(whole)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"question {n}" for n in range(5)]
    assert "0 prompts answered" in specl("collect", prompts, "--output", out, "--resume").stdout


def test_an_output_of_another_kind_is_left_alone(specl, prompts, tmp_path):
    out = tmp_path / "mine.txt"
    out.write_text("my notes\n")
    outcome = specl("collect", prompts, "--output", out, "--resume")
    assert outcome.exit_code == 2 and "left alone" in outcome.stderr
    assert out.read_text() == "my notes\n"


def test_resume_without_output_is_a_usage_error(specl, prompts):
    assert specl("collect", prompts, "--resume").exit_code == 2


def test_refused_prompt_is_reported_and_others_are_answered(instance, specl, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps("x" * 5000) + '\n"fine"\n')
    outcome = specl("collect", tmp_path / "p.jsonl")
    assert outcome.exit_code == 1 and "1 prompts answered" in outcome.stdout
    assert "prompt 1:" in outcome.stderr and "1 prompts were refused" in outcome.stderr


def test_without_a_daemon_exit_3(specl, prompts):
    outcome = specl("collect", prompts)
    assert outcome.exit_code == 3 and "Traceback" not in outcome.stderr


def test_what_was_collected_can_be_imported(instance, specl, prompts, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    specl("collect", prompts, "--output", out)
    monkeypatch.setenv("SPECL_VAR", str(tmp_path / "v2"))
    assert "5 generations stored" in specl("store", "import", "--jsonl", out, "--text-only").stdout


def test_import_goes_through_a_running_collector(instance, specl, tmp_path):
    line = {"id": "imported-live", "prompt": "Why?", "target_output": "So.", "acceptance_rate": 0.1}
    (tmp_path / "i.jsonl").write_text(json.dumps(line) + "\n")
    assert specl("store", "import", "--jsonl", tmp_path / "i.jsonl", "--text-only").exit_code == 0
    assert "imported-live" in instance.stored()
    assert "1 were there already" in specl("store", "import", "--jsonl", tmp_path / "i.jsonl", "--text-only").stdout


# ---------------------------------------------------------------------------------------- a restart
@pytest.fixture
def own_instance(new_instance):
    """One to break: inference takes a second an answer."""
    instance = new_instance()
    instance.start("inference", SPECL_TEST_TOKEN_MS="50")
    instance.ready("inference")
    return instance


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_collect_waits_through_a_restart(own_instance, prompts, tmp_path, number):
    out = tmp_path / "out.jsonl"
    running = subprocess.Popen(
        [str(Path(sys.executable).parent / "specl-ctl"), "collect", prompts, "--output", out, "--max-tokens", "20"],
        env=os.environ | own_instance.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: out.exists() and out.read_text().count("\n") >= 2, 30, "two answers came")
    time.sleep(0.3)
    own_instance.daemons[0].signal(number)
    wait_until(lambda: own_instance.daemons[0].code is not None, 10, "inference ends")
    own_instance.start("inference")
    output = running.communicate(timeout=60)
    assert running.returncode == 0, output
    rows = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert rows == [f"question {n}" for n in range(5)]
