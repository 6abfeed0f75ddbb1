"""The file of what was typed into `specl-ctl chat`: where it is, whether it is written, and how a
purge edits it.

It is prompt-toolkit's history file. A message is an empty line, `# TIME`, and then each of its lines
behind a `+`. A message of several lines is typed between fences.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from specl.shared.conversations import folded
from specl.shared.paths import Paths
from specl.shared.retention.purged_text import PurgedText, remove_entries
from specl.shared.settings.schema import Records

FENCE = '"""'
HISTORY = "chat_history"  # in the folder of the logs


def history_file(paths: Paths) -> Path:
    """Where typed messages are written."""
    return paths.logs / HISTORY


def history_is_kept(records: Records) -> bool:
    """Whether the settings allow text to stay on disk unchanged and unlimited."""
    return records.keep == "content" and not records.redact and not records.retention_days


def erase_history(history: Path, typed: Iterable[str], purged: PurgedText, pattern: str) -> None:
    """Remove the messages that equal one of `typed`, however short, hold `pattern`, or repeat a
    passage of `purged`.

    The lines of a message between fences may each be an entry, so a line of a typed message counts
    as a message.
    """
    equal = {_unfenced(part) for text in typed for part in (text, *text.splitlines())}

    def is_purged(entry: bytes) -> bool:
        message = _message(entry)
        holds_pattern = bool(pattern) and folded(pattern) in folded(message)
        return holds_pattern or _unfenced(message) in equal or purged.is_repeated_in(message)

    remove_entries(history, _entries, is_purged)


def empty_history(history: Path) -> None:
    """Remove every message."""
    remove_entries(history, _entries, lambda entry: True)


def _entries(history: bytes) -> list[bytes]:
    return [part for part in re.split(rb"(?m)(?=^\n# )", history) if part]


def _message(entry: bytes) -> str:
    lines = entry.decode("utf-8", "replace").split("\n")
    return "\n".join(line[1:] for line in lines if line.startswith("+"))


def _unfenced(text: str) -> str:
    return text.strip().removeprefix(FENCE).removesuffix(FENCE).strip()
