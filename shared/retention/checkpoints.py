"""Where an unfinished training run is on the disk, which generations it learned from, how to remove it.

Knows files, nothing of models.

var/training/checkpoint/            the last complete one: weights, optimizer, state.json
var/training/.checkpoint.partial/   being written
var/training/.checkpoint.old/       the previous one, until the new one is renamed
"""

import json
import shutil
from pathlib import Path

from specl.shared.runtime.atomic_files import copies_of

NAME = "checkpoint"


def checkpoint_folder(training: Path) -> Path:
    """The folder of the last complete checkpoint under `var/training`."""
    return training / NAME


def all_of(checkpoint: Path) -> list[Path]:
    """The folder of a checkpoint, and the partial folders that a kill while saving can leave beside
    it, under the names of this version and of earlier ones.
    """
    return [*copies_of(checkpoint), *(checkpoint.with_name(checkpoint.name + end) for end in (".partial", ".old"))]


def forget(checkpoint: Path) -> None:
    """Remove a checkpoint and all partial folders of it."""
    for folder in all_of(checkpoint):
        shutil.rmtree(folder, ignore_errors=True)


def generations_in(checkpoint: Path) -> set[str]:
    """Ids of the generations that a checkpoint, or any partial folder of it, learned from."""
    ids: set[str] = set()
    for folder in all_of(checkpoint):
        try:
            ids |= set(json.loads((folder / "state.json").read_text()).get("ids", []))
        except (OSError, ValueError, AttributeError, TypeError):
            continue
    return ids
