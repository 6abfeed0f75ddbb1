"""The messages of a chat: from a terminal with line editing and history, or from standard input,
one message a line.

In both, the lines from one that begins with `\"\"\"` to one that ends with it are one message.
Knows lines, not commands.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import click

from specl.shared.paths import Paths
from specl.shared.retention.chat_history import FENCE, history_file, history_is_kept
from specl.shared.runtime.atomic_files import erase_file
from specl.shared.settings.schema import Records

PROMPT, CONTINUATION = "> ", ". "


def messages(lines: Callable[[str], str]) -> Iterator[str]:
    """The messages in the lines that `lines(prompt)` returns; it raises EOFError at the end."""
    while True:
        try:
            line = lines(PROMPT)
        except EOFError:
            return
        yield _fenced(line, lines) if line.lstrip().startswith(FENCE) else line


def _fenced(first: str, lines: Callable[[str], str]) -> str:
    text = first.lstrip()[len(FENCE) :]
    while not text.rstrip().endswith(FENCE):
        try:
            text += "\n" + lines(CONTINUATION)
        except EOFError:
            return text.strip("\n")
    return text.rstrip()[: -len(FENCE)].strip("\n")


def from_pipe(source: Iterable[str]) -> Callable[[str], str]:
    """A reader of the lines of a pipe or file, without their ends. It shows no prompt."""
    iterator = iter(source)

    def read(prompt: str) -> str:
        for line in iterator:
            return line
        raise EOFError

    return read


def from_terminal(paths: Paths, records: Records, remember: bool, commands: list[str]) -> Callable[[str], str]:
    """A reader of lines from a terminal. Enter sends, Alt-Enter begins a new line, arrows move in
    the history, Tab completes commands. With `remember` the history is kept on disk, where the
    settings allow it.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.shortcuts import CompleteStyle

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    completer = WordCompleter(commands, sentence=True)
    session: Any = PromptSession(
        history=open_history(paths, records, remember),
        key_bindings=keys,
        completer=completer,
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        enable_open_in_editor=True,
    )
    return lambda prompt: session.prompt(prompt)


def open_history(paths: Paths, records: Records, remember: bool) -> Any:
    """The history of messages: a file, which a purge erases too, only where the settings keep text
    complete and without limit.
    """
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_file(paths)
    if not history_is_kept(records):
        with suppress(OSError):
            erase_file(path)  # of a time when the settings allowed it
    if not remember or not history_is_kept(records):
        return InMemoryHistory()
    try:
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError:  # no run directory yet, or a full disk: the chat matters more
        return InMemoryHistory()

    class History(FileHistory):
        """The file as long as the disk accepts it, after that memory alone."""

        full = False

        def store_string(self, string: str) -> None:
            """Append. A failure is reported once, because prompt_toolkit would show a traceback for
            every message.
            """
            try:
                if not self.full:
                    super().store_string(string)
            except OSError as error:
                self.full = True
                click.echo(f"messages are not remembered any more: {path}: {error.strerror}", err=True)

    return History(str(path))


def is_interactive() -> bool:
    """Whether a person types: standard input and output are terminals."""
    return sys.stdin.isatty() and sys.stdout.isatty()
