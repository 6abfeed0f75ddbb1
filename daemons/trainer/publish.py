"""A promoted adapter becomes a directory that CURRENT names: tensors, and a manifest with what it
was measured on and made from.
"""

import shutil
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specl.daemons.trainer.scoring import Scores
from specl.shared.adapters.manifest import Manifest
from specl.shared.adapters.registry import Adapters
from specl.shared.adapters.tensors import write_tensors
from specl.shared.engine.core import EngineCore
from specl.shared.errors import SpecLoraError
from specl.shared.learning.judge import Verdict
from specl.shared.models.lora import LoraShape, Weights, change_norm_steps
from specl.shared.runtime.incremental import run_all


@dataclass(frozen=True, slots=True)
class Tensors:
    """What an adapter's files hold. `hot`: token ids of the hot vocabulary, None where the draft
    has no or its usual one.
    """

    shape: LoraShape
    weights: Weights
    hot: NDArray[Any] | None


def held_out_metrics(before: Scores, after: Scores, verdict: Verdict) -> dict[str, Any]:
    """The manifest's `metrics`."""
    return {
        "heldout_before": round(before.held_out.value, 5),
        "heldout_after": round(after.held_out.value, 5),
        "heldout_before_by_depth": [round(value, 5) for value in before.held_out.by_depth],
        "heldout_after_by_depth": [round(value, 5) for value in after.held_out.by_depth],
        "heldout_generations": len(after.held_out.hits),
        "heldout_positions": int(np.sum(after.held_out.positions)),
        "gate": verdict.numbers(),
    }


def publish_adapter(
    adapters: Adapters,
    engine: EngineCore,
    run_id: str,
    parent_id: str,
    tensors: Tensors,
    metrics: dict[str, Any],
    training: dict[str, Any],
) -> str:
    """Write a new adapter; CURRENT names it. Its id. Raises OSError where the disk refuses: then
    there is no such adapter.
    """
    if engine.draft is None:
        raise SpecLoraError("there is no draft model to publish an adapter for", "set models.draft.name")
    id = adapters.next_id()
    manifest = Manifest(
        id=id,
        kind="lora",
        created_at=time.time(),
        base_model=engine.draft.name,
        base_fingerprint=engine.draft_fingerprint,
        target_fingerprint=engine.target.fingerprint,
        tokenizer_fingerprint=engine.target.tokenizer_fingerprint,
        parent_id=parent_id,
        training_run_id=run_id,
        rank=tensors.shape.rank,
        alpha=tensors.shape.alpha,
        modules=list(tensors.shape.keys),
        change_norm=round(run_all(change_norm_steps(tensors.shape, tensors.weights)), 6),
        metrics=metrics,
        training=training,
    )
    scratch = adapters.scratch(id)
    try:
        write_tensors(scratch, tensors.shape, tensors.weights, tensors.hot)
        adapters.publish(scratch, manifest)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # what a full disk has left; a published one has been renamed
    return id
