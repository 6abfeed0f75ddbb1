"""What is foreign stays text on a terminal: no control character reaches it, and no letter that it lacks ends a command."""

import json
import os
import subprocess
import sys

import pytest

from specl.cli.chat.conversation import Conversation
from specl.cli.collect import AnswersFile
from specl.cli.terminal import json_line
from specl.shared.errors import SpecLoraError
from specl.shared.paths import find_paths
from specl.shared.runtime.terminal import all_visible, visible
from specl.shared.store import Store
from tests.fakes import make_disagreement, make_generation, to_row

EVIL = "\x1b]52;c;YQ==\x07\x1b[2Jfake\x9b1m\r\x7fend"
SHOWN = r"\x1b]52;c;YQ==\x07\x1b[2Jfake\x9b1m\r\x7fend"
CONTROL = set(EVIL) - set("]52;c;YQ==[2Jfake1mend")


def test_control_characters_become_visible_escapes():
    assert visible(EVIL) == SHOWN
    assert visible("a\tb\nc\r\nd é 🙂") == "a\tb\nc\nd é 🙂"
    assert all_visible({"a": [EVIL, (EVIL, 1)], "b": make_disagreement(draft_text=EVIL)}) == {
        "a": [SHOWN, (SHOWN, 1)],
        "b": make_disagreement(draft_text=SHOWN),
    }


@pytest.fixture
def stored():
    store = Store(find_paths().create().store)
    store.set_threshold(0.5)
    record = make_generation(
        "aaaa",
        messages=[{"role": "user", "content": f"question é → {EVIL}"}],
        output=f"answer {EVIL}",
        target_model=EVIL,
        acceptance_rate=0.1,
        disagreements=[make_disagreement(draft_text=EVIL)],
    )
    store.add_rows([to_row(record)])
    store.close()


@pytest.mark.parametrize("command", [("show", "aaaa"), ("failures",), ("summary",)])
@pytest.mark.parametrize("color", [False, True])
def test_stored_text_moves_no_terminal(specl, stored, command, color):
    outcome = specl("store", *command, color=color)
    assert outcome.exit_code == 0, outcome.stderr
    plain = outcome.stdout.replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert not CONTROL & set(plain)


def test_errors_move_no_terminal(specl, monkeypatch):
    from specl.cli import main

    def fails(*arguments, **named):
        raise SpecLoraError(f"a file named {EVIL}", EVIL)

    monkeypatch.setattr(main, "cli", fails)
    assert specl("status").stderr == f"specl-ctl: a file named {SHOWN}\n  {SHOWN}\n"


@pytest.mark.process
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize(
    "command",
    [("show", "aaaa"), ("failures",), ("export", "--jsonl"), ("failures", "--json"), ("show", "aaaa", "--json")],
)
def test_letters_that_a_terminal_lacks_end_nothing(stored, encoding, command):
    done = subprocess.run(
        [sys.executable, "-c", "from specl.cli.main import main; main()", "store", *command],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    if "export" in command:
        assert "→" in json.loads(done.stdout.decode())["prompt"]  # files are UTF-8
    elif "--json" in command:
        assert "→" in str(json.loads(done.stdout.decode(encoding)))
    else:
        assert "question" in done.stdout.decode("utf-8", "replace")  # click takes UTF-8 where a locale says ASCII


def test_json_needs_no_letters(monkeypatch):
    monkeypatch.setattr(sys, "stdout", type("Latin", (), {"encoding": "latin-1"})())
    assert json_line({"a": "é"}) == '{"a": "\\u00e9"}'


def test_exported_text_is_private(specl, stored, tmp_path):
    assert specl("store", "export", "--jsonl", "--out", tmp_path / "a.jsonl").exit_code == 0
    Conversation("be kind").save(tmp_path / "chat.md")
    AnswersFile(str(tmp_path / "answers.jsonl"), resume=False).__exit__()
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("*.*l*")} | {
        (tmp_path / "chat.md").stat().st_mode & 0o777
    } == {0o600}
