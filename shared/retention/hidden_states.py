"""The spool of hidden states that a `head` draft learns from: one fp16 file a generation, by record
id, size-capped.

A spooled file is a convenience, never a promise: the trainer recomputes what is missing. It says as
much about a prompt as the prompt itself, so it is private and purged with it.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from specl.shared.runtime.atomic_files import atomic_file, leftovers

ID = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z_.-]{0,127}")  # anything else is no record's id, and may point elsewhere


class HiddenSpool:
    """`folder` holds at most `limit_bytes`; the oldest go first. 0 keeps nothing."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit = folder, limit_bytes
        self._size = self._measure()

    def _measure(self) -> int:
        size = 0
        for path in self.folder.glob("*.npy"):
            with suppress(FileNotFoundError):  # a purge may be under way
                size += path.stat().st_size
        return size

    def _path(self, id: str) -> Path | None:
        """The file of a generation, or None for what is not an id."""
        return self.folder / f"{id}.npy" if ID.fullmatch(id) else None

    def write(self, id: str, states: np.ndarray) -> None:
        """Keep states [n, hidden] as fp16. Raises OSError where the disk refuses; nothing half
        written is left.
        """
        path = self._path(id)
        if path is None or states.nbytes > self.limit:
            return
        with atomic_file(path, sync=False) as file:
            np.save(file, states.astype(np.float16))
        self._size += path.stat().st_size
        self._shrink()

    def _shrink(self) -> None:
        if self._size <= self.limit:
            return
        self._size = self._measure()  # others purge here too
        for path in sorted(self.folder.glob("*.npy"), key=_age):
            if self._size <= 0.9 * self.limit:
                return
            with suppress(FileNotFoundError):
                self._size -= path.stat().st_size
                path.unlink()

    def read(self, id: str) -> np.ndarray | None:
        """The states of a generation, or None where they are not spooled (any more)."""
        path = self._path(id)
        if path is None:
            return None
        try:
            states: np.ndarray = np.load(path, allow_pickle=False)
            return states
        except (OSError, ValueError, EOFError):  # a power cut can leave it empty or torn
            return None

    def purge(self, ids: Iterable[str]) -> None:
        """Forget these generations; nothing outside the spool is touched, whatever an id says."""
        for id in ids:
            path = self._path(id)
            if path is None:
                continue
            with suppress(FileNotFoundError):
                self._size -= path.stat().st_size
                path.unlink()
            for scratch in [
                *leftovers(path),
                self.folder / f".{id}.partial",
            ]:  # the last: the name of earlier versions
                scratch.unlink(missing_ok=True)


def _age(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0
