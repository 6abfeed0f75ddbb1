"""What was decided about adapters after they were promoted, in one small file
beside them: MARKS.json.

Inference and the trainer both write it, under a lock on the folder. An adapter without a mark has
not been reevaluated yet. The files ROLLED_BACK.json and SECOND_LOOKS.json of earlier versions are
read, and never written. Knows nothing of the reasons for a decision.
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

    ROLLBACK_PENDING = "rolled_back"  # the collapse check stopped it; the trainer has still to reevaluate it
    ROLLED_BACK_FINAL = "confirmed"  # the reevaluation agreed with the rollback
    REINSTATING = "reinstating"  # its rollback was wrong; CURRENT may not have moved yet
    REINSTATED = "reinstated"
    KEPT = "kept"  # reevaluated and still active, or a user wants it whatever was decided


ROLLED_BACK = (MarkState.ROLLBACK_PENDING, MarkState.ROLLED_BACK_FINAL)
UNDECIDED = (MarkState.ROLLBACK_PENDING, MarkState.REINSTATING)


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
        marks = {}
        for id, value in (self._read_version_1() | self._read(MARKS)).items():
            match value:
                case [state, *reason] if state in list(MarkState):
                    marks[id] = Mark(MarkState(state), str(*reason[:1]))
        return marks

    def rolled_back(self) -> dict[str, str]:
        """Adapters that were rolled back and not reinstated since, with the reason."""
        return {id: mark.reason for id, mark in self.all().items() if mark.state in ROLLED_BACK}

    def set(self, id: str, state: MarkState, reason: str = "") -> None:
        """Mark `id`. Marks of adapters that are gone are dropped. Raises OSError."""
        with self._locked():
            marks = {other: mark for other, mark in self.all().items() if (self.folder / other).is_dir()}
            marks[id] = Mark(state, reason)
            document = {other: [mark.state, mark.reason] for other, mark in sorted(marks.items())}
            write_file(self.folder / MARKS, json.dumps(document, indent=1), sync=True)

    def _read_version_1(self) -> dict[str, Any]:
        """The marks in the two files of earlier versions: rollbacks with reasons, and states.

        An adapter that has a state and no rollback was activated again by a user.
        """
        rollbacks, states = self._read(OLD_ROLLED_BACK), self._read(OLD_REEVALUATIONS)
        rolled_back = {id: [states.get(id, MarkState.ROLLBACK_PENDING), reason] for id, reason in rollbacks.items()}
        return {id: [MarkState.KEPT] for id in states} | rolled_back

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
        """The JSON object of a file; empty where the file is missing or damaged. Where the disk
        fails, the object that was read last.
        """
        try:
            document = json.loads((self.folder / name).read_text())
        except (FileNotFoundError, ValueError):
            document = {}
        except OSError:
            return self._last_read.get(name, {})
        self._last_read[name] = document if isinstance(document, dict) else {}
        return self._last_read[name]
