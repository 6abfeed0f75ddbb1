"""`specl-ctl chat`: turns, commands, Ctrl-C, and what a terminal and a pipe each get."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from specl.cli.chat import chat_input
from specl.cli.chat.conversation import Conversation
from specl.cli.chat.view import coloured
from specl.shared.errors import SpecLoraError
from specl.shared.messaging.messages import Delta
from specl.shared.paths import find_paths
from specl.shared.retention.chat_history import history_file, history_is_kept
from specl.shared.settings.schema import Records

COMMAND = [sys.executable, "-c", "from specl.cli.main import main; main()"]


# --------------------------------------------------------------------------------- without a daemon
def test_without_a_daemon_one_sentence_and_exit_3(specl):
    outcome = specl("chat", input="hello\n")
    assert outcome.exit_code == 3 and "honcho start" in outcome.stderr and "Traceback" not in outcome.stderr


def test_messages_are_lines_and_fenced_blocks():
    text = 'one\n"""two\nthree"""\n\n"""\nfour\n"""\n"""never closed\nfive\n'
    assert list(chat_input.messages(chat_input.from_pipe(text.splitlines()))) == [
        "one", "two\nthree", "", "four", "never closed\nfive",
    ]  # fmt: skip


def test_a_question_without_an_answer_is_taken_back():
    talk = Conversation("be brief")
    talk.add_question("a")
    talk.add_answer("b")
    talk.add_question("c")
    talk.add_answer("")
    assert [m["content"] for m in talk.messages()] == ["be brief", "a", "b"]
    old = talk.id
    talk.reset()
    assert talk.messages() == [{"role": "system", "content": "be brief"}] and talk.id != old


def test_saving_as_messages_and_as_markdown(tmp_path):
    talk = Conversation("s", [{"role": "user", "content": "ä"}])
    for name in ("a.json", "a.jsonl", "a.md"):
        talk.save(tmp_path / name)
    assert json.loads((tmp_path / "a.json").read_text()) == talk.messages()
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"messages": talk.messages()}
    assert (tmp_path / "a.md").read_text() == "## system\n\ns\n\n## user\n\nä\n"
    with pytest.raises(SpecLoraError, match="cannot be written"):
        talk.save(tmp_path / "none" / "a.md")


def test_each_token_has_the_colour_of_its_source():
    assert (
        coloured(Delta("r", "abcdef", [1, 2, 3], bytes([0, 1, 2]), [1, 2, 2])) == "a\x1b[32mbc\x1b[0m\x1b[36mde\x1b[0mf"
    )
    assert coloured(Delta("r", "abc", [1], bytes([1]))) == "abc"


@pytest.mark.parametrize("records", [{"keep": "statistics"}, {"redact": ["x"]}, {"retention_days": 3}])
def test_no_history_on_disk_where_text_is_forbidden(records):
    assert history_is_kept(Records())
    assert not history_is_kept(Records(**records))


def test_the_history_file_is_private():
    paths = find_paths().create()
    history = chat_input.open_history(paths, Records(), remember=True)
    history.store_string("said in the chat")
    file = history_file(paths)
    assert file.stat().st_mode & 0o077 == 0 and b"said in the chat" in file.read_bytes()
    chat_input.open_history(paths, Records(), remember=False).store_string("not kept")
    assert b"not kept" not in file.read_bytes()


# -------------------------------------------------------------------------------------------- piped
def test_turns_share_a_conversation_and_its_cache(instance, specl):
    outcome = specl("chat", "--json", "--max-tokens", 6, input="hello there\nand again\n")
    first, second = outcome.lines
    assert first["tokens"] == second["tokens"] == 6 and first["recorded"]
    assert second["stats"]["reused_prompt_tokens"] >= first["stats"]["prompt_tokens"]
    instance.settle()
    rows = [specl("store", "show", answer["id"], "--json").json for answer in (first, second)]
    assert rows[0]["conversation_id"] == rows[1]["conversation_id"]
    assert [m["role"] for m in rows[1]["messages"]] == ["user", "assistant", "user"]
    assert rows[1]["messages"][1]["content"] == first["text"]


def test_text_goes_to_stdout_and_statistics_to_stderr(instance, specl):
    outcome = specl("chat", input="hello\n")
    assert outcome.exit_code == 0 and len(outcome.stdout.rstrip("\n")) == 8
    assert "tok/s" in outcome.stderr and "prompt tokens reused" in outcome.stderr
    assert specl("chat", "--no-stats", input="hello\n").stderr == ""


def test_drafted_tokens_are_coloured(instance, specl):
    plain = specl("chat", "--no-stats", input="hello\n").stdout
    assert specl("chat", "--no-stats", "--show-draft", input="hello\n").stdout == plain  # a pipe
    shown = specl("chat", "--no-stats", "--show-draft", input="hello\n", color=True).stdout
    assert "\x1b[32m" in shown and re.sub(r"\x1b\[\d+m", "", shown) == plain


def test_commands(instance, specl, tmp_path):
    script = f"/system be brief\nhello\n/stats\n/adapters\n/eval\n/save {tmp_path}/talk.json\n/reset\n/save {tmp_path}/new.json\n/quit\nnever\n"
    outcome = specl("chat", input=script)
    assert outcome.exit_code == 0, outcome.stderr
    for part in ("be brief", "1 answers, 8 tokens", "no adapters yet", "nothing was trained yet"):
        assert part in outcome.stdout
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in saved] == ["system", "user", "assistant"]
    assert json.loads((tmp_path / "new.json").read_text()) == saved[:1]


def test_wrong_command_in_a_pipe_exits_with_2(instance, specl):
    outcome = specl("chat", input="/nonsense\n")
    assert outcome.exit_code == 2 and "there is no command /nonsense" in outcome.stderr
    assert specl("chat", input="/save\n").exit_code == 2
    assert specl("chat", "--json", input="//etc is a folder\n").exit_code == 0


def test_train_without_a_trainer_says_so(instance, specl):
    outcome = specl("chat", input="/train\n")
    assert outcome.exit_code == 3 and "the trainer does not run" in outcome.stderr


# --------------------------------------------------------------------------------------- a terminal
class Screen:
    """`specl-ctl chat` on a pseudo-terminal."""

    def __init__(self, *options):
        self.pid, self.file = pty.fork()
        if not self.pid:
            os.environ["TERM"] = "xterm"
            os.execv(COMMAND[0], [*COMMAND, "chat", *options])
        self.seen = ""

    def type(self, text):
        os.write(self.file, text.encode())

    def until(self, text, timeout_s=20):
        """Read until `text` appears after what was waited for before; everything since then."""
        end, start = time.monotonic() + timeout_s, len(self.seen)
        while text not in self.seen[start:]:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.file], [], [], 0.1)[0]:
                try:
                    new = os.read(self.file, 65536).decode(errors="replace")
                except OSError:
                    break
                self.seen += new
                if "\x1b[6n" in new:  # asked where the cursor is
                    os.write(self.file, b"\x1b[1;1R")
        assert text in self.seen[start:], self.seen
        return self.seen[start:]

    def close(self):
        end, again = time.monotonic() + 10, 0.0
        while time.monotonic() < end:
            if time.monotonic() >= again:  # between two prompts nobody reads the key
                again = time.monotonic() + 1
                with suppress(OSError):
                    self.type("\x04")
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if select.select([self.file], [], [], 0.05)[0]:
                with suppress(OSError):
                    os.read(self.file, 65536)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("it did not leave")


def test_ctrl_c_stops_the_answer_not_the_chat(instance):
    screen = Screen("--max-tokens", "3000")
    screen.until("/help lists commands")
    screen.type("tell me a long story\r")
    screen.until("\x1b[?2004l")  # the line is taken
    screen.until("...")
    screen.type("\x03")
    screen.until("stopped; the conversation keeps the text so far")
    screen.type("/stats\r")
    screen.until("failures until training")
    screen.type("/nonsense\r")
    screen.until("there is no command /nonsense")
    screen.type("half a line\x03")
    screen.until("Ctrl-D or /quit leaves")
    assert screen.close() == 0


def test_a_pipe_ends_at_ctrl_c(instance):
    process = subprocess.Popen(
        [*COMMAND, "chat", "--max-tokens", "3000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.write("a long story\nanother\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130 and "stopped" in err and "Traceback" not in err
