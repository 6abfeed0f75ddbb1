"""What a purge was asked for and which generations it has found so far, in `var/purge.pending`
until all are gone.

Rows, outboxes and hidden states are deleted one after the other, and each is found by what the
others held. So the request is written first, then the ids of every portion before it is deleted: a
purge that was stopped (by a reader of the store, a dead daemon, Ctrl-C) is finished by the next
one. JSON lines, private, removed last. Knows files, nothing of daemons.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specl.shared.errors import SpecLoraError
from specl.shared.runtime.atomic_files import erase_file


@dataclass(frozen=True, slots=True)
class PurgeRequest:
    """A purge as it was asked for at the time `begun`: full ids, everything older than `before`,
    everything with `pattern`.
    """

    begun: float
    ids: list[str]
    before: float | None
    pattern: str
    everything: bool = False
    drop_adapters: bool = False
    retrain: bool = False


class PurgeJournal:
    """The file at `path`. Raises SpecLoraError where the disk refuses: nothing is deleted that is
    not noted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_whole = False  # whether the last line is known to be complete: a kill may have cut it short

    def request(self) -> PurgeRequest | None:
        """What was asked for, or None where no purge is unfinished (or it was stopped before it
        began).
        """
        for line in self._lines():
            try:
                return PurgeRequest(**(line.get("request") or line["wish"]))  # "wish": earlier versions
            except (KeyError, TypeError) as error:
                raise self._unreadable() from error
        return None

    def begin(self, request: PurgeRequest) -> None:
        """Note a new request in place of a finished one."""
        erase_file(self.path)
        self._append({"request": asdict(request)})

    def note(self, ids: Iterable[str]) -> None:
        """The generations that are deleted next."""
        self._append({"ids": sorted(ids)})

    def noted(self, field: str = "ids") -> Iterator[str]:
        """All ids so far; the same may come more than once.

        Earlier versions noted texts as well ("texts", and "typed" for a user's), which were then
        still to be erased from logs.
        """
        for line in self._lines():
            yield from line.get(field, ())

    def end(self) -> None:
        """All is gone; this goes last, overwritten as well: it holds the pattern."""
        erase_file(self.path)

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with open(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600), "rb+") as file:
                if not self._is_whole:
                    file.truncate(file.read().rfind(b"\n") + 1)
                    self._is_whole = True
                file.seek(0, os.SEEK_END)
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._is_whole = False
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
            raise self._unreadable() from error

    def _unreadable(self) -> SpecLoraError:
        return SpecLoraError(
            f"{self.path} is no note of a purge", "remove it, and purge again what was to be forgotten"
        )
