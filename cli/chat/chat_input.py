"""Where a chat's messages come from: a terminal with line editing and history, or standard input, one message a line.

Both know `\"\"\"`: from a line that begins with it to one that ends with it is one message.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import click

from specl.shared.paths import Paths
from specl.shared.retention.chat_history import FENCE, history_file, history_is_kept
from specl.shared.settings.schema import Records

PROMPT, MORE = "> ", ". "


def messages(lines: Callable[[str], str]) -> Iterator[str]:
    """Messages out of `lines(prompt)`, which raises EOFError at the end."""
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
            text += "\n" + lines(MORE)
        except EOFError:
            return text.strip("\n")
    return text.rstrip()[: -len(FENCE)].strip("\n")


def piped(source: Iterable[str]) -> Callable[[str], str]:
    """Lines of a pipe or file, without their ends; the prompt is shown to nobody."""
    iterator = iter(source)

    def read(prompt: str) -> str:
        for line in iterator:
            return line
        raise EOFError

    return read


def terminal(paths: Paths, records: Records, remember: bool, commands: list[str]) -> Callable[[str], str]:
    """Lines from a terminal. Enter sends, Alt-Enter begins a new line, arrows walk the history, Tab completes commands."""
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
        history=_history(paths, records, remember),
        key_bindings=keys,
        completer=completer,
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        enable_open_in_editor=True,
    )
    return lambda prompt: session.prompt(prompt)


def _history(paths: Paths, records: Records, remember: bool) -> Any:
    """On disk only where the settings keep text whole and for ever; where a purge looks."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if not remember or not history_is_kept(records):
        return InMemoryHistory()
    path = history_file(paths)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError:  # no run directory yet, or a full disk: talking matters more
        return InMemoryHistory()

    class History(FileHistory):
        """The file, as long as the disk takes it; after that memory alone."""

        full = False

        def store_string(self, string: str) -> None:
            """Append; said once where that cannot be, since prompt_toolkit would show a traceback for every message."""
            try:
                if not self.full:
                    super().store_string(string)
            except OSError as error:
                self.full = True
                click.echo(f"messages are not remembered any more: {path}: {error.strerror}", err=True)

    return History(str(path))


def is_interactive() -> bool:
    """Whether somebody sits there."""
    return sys.stdin.isatty() and sys.stdout.isatty()
