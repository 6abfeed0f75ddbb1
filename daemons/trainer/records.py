"""What a run leaves in the store about an adapter: how it scored, and what was published."""

import time
import uuid
from dataclasses import asdict
from typing import Any

from specl.shared.adapters.manifest import Manifest
from specl.shared.adapters.registry import Adapters
from specl.shared.learning.judge import Agreement
from specl.shared.messaging.messages import Adapter, Evaluation

SCORE_IDS = uuid.UUID("5c0de5c0-0000-4000-8000-000000000000")  # namespace of their ids


def evaluations(
    run_id: str, adapter_id: str, held_out: Agreement, general: Agreement, details: dict[str, Any]
) -> list[Evaluation]:
    """One draft state as records: on held-out traffic, with the verdict's numbers, and on the
    regression slice.
    """
    records = []
    for subject, score in (("heldout", held_out), ("regression", general)):
        if len(score.hits):
            records.append(
                Evaluation(
                    id=uuid.uuid4().hex,
                    created_at=time.time(),
                    subject=subject,
                    generation_id="",
                    training_run_id=run_id,
                    adapter_id=adapter_id,
                    generations=len(score.hits),
                    positions=int(score.positions.sum()),
                    agreement=round(score.value, 6),
                    by_depth=[round(value, 6) for value in score.by_depth],
                    details=details if subject == "heldout" else {},
                )
            )
    return records


def scored(generation: str, adapter_id: str, score: Agreement) -> Evaluation:
    """The record of one generation's agreement under one adapter. Its id depends on both alone, so
    recording it again changes nothing (idempotent).
    """
    return Evaluation(
        id=uuid.uuid5(SCORE_IDS, f"{generation}/{adapter_id}").hex,
        created_at=time.time(),
        subject="generation",
        generation_id=generation,
        training_run_id="",
        adapter_id=adapter_id,
        generations=1,
        positions=int(score.positions.sum()),
        agreement=round(score.value, 6),
        by_depth=[round(value, 6) for value in score.by_depth],
        details={},
    )


def adapter_record(adapters: Adapters, manifest: Manifest) -> Adapter:
    """What the store keeps of a published adapter."""
    return Adapter(
        manifest.id,
        manifest.created_at,
        manifest.kind,
        manifest.parent_id,
        manifest.training_run_id,
        str(adapters.folder / manifest.id),
        manifest.files.get("adapters.safetensors", ""),
        manifest.base_fingerprint,
        asdict(manifest),
    )
