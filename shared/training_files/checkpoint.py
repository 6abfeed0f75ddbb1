"""A training run on disk: weights, optimizer state and the run's own notes, replaced whole, so that
a kill leaves the last one.

Where a run's checkpoint lies and when it is removed is `retention.checkpoints`'s.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from specl.shared.learning.steps import TrainingState
from specl.shared.runtime.atomic_files import atomic_dir
from specl.shared.runtime.failpoints import failpoint


def save_checkpoint(folder: Path, state: TrainingState, notes: Mapping[str, object]) -> None:
    """Replace the checkpoint in `folder`; `notes` must be JSON. Raises OSError where it cannot be
    written: the last one stays.
    """
    try:
        with atomic_dir(folder, sync=True) as scratch:
            mx.save_safetensors(str(scratch / "weights.safetensors"), state.weights)
            mx.save_safetensors(str(scratch / "optimizer.safetensors"), state.optimizer)
            (scratch / "state.json").write_text(json.dumps({"step": state.step, **notes}))
    except (OSError, RuntimeError) as error:  # mlx raises RuntimeError where a disk is full
        raise OSError(f"no checkpoint could be written to {folder}: {error}") from error
    failpoint("training.after_checkpoint")


def load_checkpoint(folder: Path) -> TrainingState:
    """The state that was saved. Raises OSError, RuntimeError, ValueError or KeyError for a damaged
    one.
    """
    weights = mx.load(str(folder / "weights.safetensors"))
    optimizer = mx.load(str(folder / "optimizer.safetensors"))
    assert isinstance(weights, dict) and isinstance(optimizer, dict)  # mx.load returns other types for other suffixes
    return TrainingState(weights, optimizer, int(json.loads((folder / "state.json").read_text())["step"]))


def read_notes(folder: Path) -> dict[str, Any] | None:
    """The notes that were saved with the checkpoint, and its `step`; None where there is no whole
    checkpoint.
    """
    try:
        notes: dict[str, Any] = json.loads((folder / "state.json").read_text())
        return notes
    except (OSError, ValueError):
        return None
