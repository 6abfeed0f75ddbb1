"""What a purge set out to do and has found so far, kept in `var/purge.pending` until it has proved that all is gone.

Rows, outboxes and hidden states go one after the other, and each is known by what the ones before it held. So the wish is
written here first, then the ids and texts of every portion before it is deleted: a purge that a reader of the store, a dead
daemon or Ctrl-C has stopped is finished by the next one. JSON lines, private, removed last. Knows files, nothing of daemons.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specl.shared.errors import SpecLoraError


@dataclass(frozen=True, slots=True)
class Wish:
    """A purge as it was asked for at the time `begun`: full ids, everything older than `before`, everything with `pattern`."""

    begun: float
    ids: list[str]
    before: float | None
    pattern: str
    everything: bool = False
    drop_adapters: bool = False
    retrain: bool = False


class PendingPurge:
    """The file at `path`. Raises SpecLoraError where the disk refuses: nothing is deleted that is not noted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checked = False  # whether the last line is known to be whole: a kill may have cut it short

    def wish(self) -> Wish | None:
        """What was asked for, or None where no purge is unfinished (or it was stopped before it began)."""
        for line in self._lines():
            try:
                return Wish(**line["wish"])
            except (KeyError, TypeError) as error:
                raise SpecLoraError(
                    f"{self.path} is no note of a purge", "remove it, and purge again what was to be forgotten"
                ) from error
        return None

    def begin(self, wish: Wish) -> None:
        """Note a new wish in place of a finished one."""
        self.path.unlink(missing_ok=True)
        self._append({"wish": asdict(wish)})

    def note(self, ids: Iterable[str], texts: Iterable[str], typed: Iterable[str]) -> None:
        """What is deleted next: `texts` must be found nowhere afterwards; of those a user `typed` the chat may remember."""
        self._append({"ids": sorted(ids), "texts": sorted(texts), "typed": sorted(typed)})

    def noted(self, what: str) -> Iterator[str]:
        """All `ids`, `texts` or `typed` so far; the same may come more than once."""
        for line in self._lines():
            yield from line.get(what, ())

    def end(self) -> None:
        """All is gone; this goes last."""
        self.path.unlink(missing_ok=True)

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with open(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600), "rb+") as file:
                if not self._checked:
                    file.truncate(file.read().rfind(b"\n") + 1)
                    self._checked = True
                file.seek(0, os.SEEK_END)
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._checked = False
            raise SpecLoraError(
                f"what is to be forgotten could not be noted in {self.path}: {error.strerror}",
                "purge again once there is room",
            ) from error

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            with open(self.path, "rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        yield json.loads(line)
        except FileNotFoundError:
            return
        except ValueError as error:
            raise SpecLoraError(
                f"{self.path} is no note of a purge", "remove it, and purge again what was to be forgotten"
            ) from error
