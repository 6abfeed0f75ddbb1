"""Where text may be left when a purge has done its work, and the proof that none is: copies of the store, logs, what was typed.

Knows files and texts, nothing of daemons.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from specl.shared.errors import SpecLoraError
from specl.shared.messaging.outbox import Outbox
from specl.shared.paths import Paths
from specl.shared.retention.byte_search import (
    Pieces,
    count,
    files_with,
    heads,
    holds,
    leave_out,
    leave_out_of,
    portions_of,
)
from specl.shared.retention.chat_history import FENCE, HISTORY
from specl.shared.store import Store

PRODUCERS = ("inference", "trainer")
Texts = Callable[[], Iterable[str]]  # they may be many: read anew each time


@contextmanager
def rooms(paths: Paths) -> Iterator[tuple[Store | None, list[Outbox]]]:
    """The store (to read) and the outboxes, as far as they exist."""
    store = Store(paths.store, read_only=True) if paths.store.exists() else None
    outboxes = [Outbox(paths.outbox(name)) for name in PRODUCERS if paths.outbox(name).exists()]
    try:
        yield store, outboxes
    finally:
        if store is not None:
            store.close()
        for outbox in outboxes:
            outbox.close()


def remove_backups(paths: Paths, texts: Texts, everything: bool) -> list[str]:
    """Remove the copies of the store from before an upgrade that hold any of `texts`, one that was cut short included; which."""
    copies = sorted([*paths.root.glob("store.db.backup-*"), *paths.root.glob(".store.db.backup-*")])
    left = [] if everything else copies
    if left:
        for pieces in portions_of(texts()):
            held = files_with(left, pieces)
            left = [path for path in left if path not in held]
    gone = [path for path in copies if path not in left]
    for path in gone:
        path.unlink()
    return [path.name for path in gone]


def forget_typed(logs: Path, typed: Iterable[str], everything: bool) -> None:
    """Take messages out of what the chat remembers of its prompts, however short, by comparing them whole.

    A message between fences is remembered line by line, so a line of one counts as a message.
    """
    path = logs / HISTORY
    if not path.is_file():
        return
    gone = {_bare(part) for text in typed for part in (text, *text.splitlines())}
    with open(path, "rb+") as file:
        entries = [] if everything else messages_in(file.read())
        file.seek(0)
        file.writelines([entry for entry in entries if _bare(_said(entry)) not in gone])
        file.truncate()


def messages_in(history: bytes) -> list[bytes]:
    """prompt-toolkit's history file as messages, each with its time: `\\n# time\\n+line\\n+line\\n`."""
    return [part for part in re.split(rb"(?m)(?=^\n# )", history) if part]


def _said(entry: bytes) -> str:
    lines = entry.decode("utf-8", "replace").split("\n")
    return "\n".join(line[1:] for line in lines if line.startswith("+"))


def _bare(text: str) -> str:
    return text.strip().removeprefix(FENCE).removesuffix(FENCE).strip()


def prove(paths: Paths, texts: Texts) -> tuple[int, int]:
    """Search for every piece of `texts`: how many were searched for, and how many were not, because other generations say the
    same (a template's own words, say): theirs to keep. Raises SpecLoraError naming the files that still hold any.
    """
    searched = shared = 0
    for pieces in portions_of(texts()):
        wanted = count(pieces)
        _leave_out_spoken(paths, pieces)
        _scrub_logs(paths.logs, pieces)
        if found := files_with(_own_files(paths), pieces):
            names = ", ".join(str(path.relative_to(paths.root)) for path in found)
            raise SpecLoraError(f"purged text is still found in {names}", "a request with the same text may be running")
        searched += count(pieces)
        shared += wanted - count(pieces)
    return searched, shared


def _leave_out_spoken(paths: Paths, pieces: Pieces) -> None:
    """Look for nothing that the generations which stay say too."""
    with rooms(paths) as (store, outboxes):
        if store is not None:
            leave_out((text.encode() for text in store.written()), pieces)
        first = heads(pieces)
        for outbox in outboxes:
            outbox.matching(lambda row: leave_out_of(row.body, first, pieces))


def _own_files(paths: Paths) -> Iterator[Path]:
    """Everything under the run directory but models, sockets and the purge's own note."""
    for folder, names, files in os.walk(paths.root):
        names[:] = [name for name in names if Path(folder) / name != paths.models]
        for name in files:
            path = Path(folder) / name
            if path.is_file() and not path.is_symlink() and path != paths.pending_purge:
                yield path


def _scrub_logs(folder: Path, pieces: Pieces) -> None:
    """Take entries with purged text out of the logs, in place: the daemons hold them open to append. An entry is a line, and
    of what was typed in a chat a whole message.
    """
    for path in files_with(sorted(folder.glob("*")), pieces):
        with open(path, "rb+") as file:
            entries = messages_in(file.read()) if path.name == HISTORY else file.readlines()
            file.seek(0)
            file.writelines([entry for entry in entries if not holds(entry, pieces)])
            file.truncate()
