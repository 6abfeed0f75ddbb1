"""What was decided about adapters after they were promoted, in one small file beside them:
MARKS.json.

Inference and the trainer both write it, under a lock on the folder. An adapter without a mark has
not been reevaluated yet. The files ROLLED_BACK.json and SECOND_LOOKS.json of earlier versions are
read, and never written. Knows nothing of why somebody decides.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from specl.shared.runtime.atomic_files import write_file

MARKS = "MARKS.json"
OLD_ROLLED_BACK, OLD_REEVALUATIONS = "ROLLED_BACK.json", "SECOND_LOOKS.json"


class MarkState(StrEnum):
    """What was decided last. The values are in the file."""

    ROLLED_BACK = "rolled_back"  # live counts stopped it; the trainer has still to reevaluate it
    CONFIRMED = "confirmed"  # rolled back for good
    REINSTATING = "reinstating"  # its rollback was wrong; CURRENT may not have moved yet
    REINSTATED = "reinstated"
    KEPT = "kept"  # reevaluated and still in force, or a user wants it whatever was decided


AWAY = (MarkState.ROLLED_BACK, MarkState.CONFIRMED)
UNDECIDED = (MarkState.ROLLED_BACK, MarkState.REINSTATING)


@dataclass(frozen=True, slots=True)
class Mark:
    """A decision and its sentence for people."""

    state: MarkState
    reason: str = ""


class AdapterMarks:
    """The marks of one adapters folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last_read: dict[str, dict[str, Any]] = {}

    def all(self) -> dict[str, Mark]:
        """Marks by adapter id."""
        rolled_back, states = self._read(OLD_ROLLED_BACK), self._read(OLD_REEVALUATIONS)
        old: dict[str, Any] = {id: [MarkState.KEPT] for id in states}  # forgiven by a user where it is in no other file
        old |= {id: [states.get(id, MarkState.ROLLED_BACK), reason] for id, reason in rolled_back.items()}
        marks = {}
        for id, value in (old | self._read(MARKS)).items():
            match value:
                case [state, *reason] if state in list(MarkState):
                    marks[id] = Mark(MarkState(state), str(*reason[:1]))
        return marks

    def rolled_back(self) -> dict[str, str]:
        """Adapters that were rolled back and not reinstated since, with the reason."""
        return {id: mark.reason for id, mark in self.all().items() if mark.state in AWAY}

    def set(self, id: str, state: MarkState, reason: str = "") -> None:
        """Mark `id`. Marks of adapters that are gone are dropped. Raises OSError."""
        with self._locked():
            marks = {other: mark for other, mark in self.all().items() if (self.folder / other).is_dir()}
            marks[id] = Mark(state, reason)
            document = {other: [mark.state, mark.reason] for other, mark in sorted(marks.items())}
            write_file(self.folder / MARKS, json.dumps(document, indent=1), sync=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process writes marks within the block."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _read(self, name: str) -> dict[str, Any]:
        """A file's object; what was read before where it cannot be read just now, nothing where it
        is damaged.
        """
        try:
            document = json.loads((self.folder / name).read_text())
        except (FileNotFoundError, ValueError):
            document = {}
        except OSError:
            return self._last_read.get(name, {})
        self._last_read[name] = document if isinstance(document, dict) else {}
        return self._last_read[name]
