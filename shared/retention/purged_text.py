"""Removes what repeats purged text from files of entries: log lines, typed messages.

Knows texts and entries, nothing of daemons. Text is compared in passages: any entry that holds a
whole passage of a purged text goes, in upper or lower case. A copy of 47 characters holds at least
one. Texts under 12 characters (`Yes.`) stand everywhere and are not looked for.
"""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from specl.shared.conversations import folded, strings

PASSAGE = 24  # characters
SHORTEST = 12


class PurgedText:
    """The passages of some purged texts. A text of at most PASSAGE characters is one passage."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._passages: dict[int, set[str]] = {}  # by length
        for text in {folded(text) for text in texts if len(text) >= SHORTEST}:
            length = min(PASSAGE, len(text))
            starts = [*range(0, len(text) - length + 1, length), len(text) - length]
            self._passages.setdefault(length, set()).update(text[start : start + length] for start in starts)

    def is_repeated_in(self, text: str) -> bool:
        """Whether `text` holds a passage."""
        text = folded(text)
        return any(
            text[start : start + length] in passages
            for length, passages in self._passages.items()
            for start in range(len(text) - length + 1)
        )


def erase_from_logs(logs: Iterable[Path], purged: PurgedText) -> None:
    """Remove the lines that repeat purged text. A line is JSON; one that is not is compared as it
    is.
    """
    for path in logs:
        remove_entries(path, lambda data: data.splitlines(keepends=True), lambda line: _repeats(line, purged))


def _repeats(line: bytes, purged: PurgedText) -> bool:
    text = line.decode("utf-8", "replace")
    with suppress(ValueError, RecursionError):
        return any(purged.is_repeated_in(value) for value in strings(json.loads(text)))
    return purged.is_repeated_in(text)


def remove_entries(path: Path, split: Callable[[bytes], list[bytes]], remove: Callable[[bytes], bool]) -> None:
    """Rewrite `path` without the entries that `remove` is true of, in place: daemons hold their
    logs open to append.
    """
    try:
        with open(path, "rb+") as file:
            entries = split(file.read())
            remaining = [entry for entry in entries if not remove(entry)]
            if len(remaining) < len(entries):
                file.seek(0)
                file.writelines(remaining)
                end, size = file.tell(), sum(map(len, entries))
                file.write(bytes(size - end))  # overwrites what is cut off next
                file.flush()
                os.fsync(file.fileno())
                file.truncate(end)
    except FileNotFoundError:
        return
