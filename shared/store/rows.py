"""Records as rows and rows as records: what of a delivered record goes into which column, and what is no record at all."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from specl.shared.answer_stats import AnswerStats
from specl.shared.errors import WireError
from specl.shared.messaging.codec import decode, kind_of
from specl.shared.messaging.messages import Envelope, Generation, Record
from specl.shared.store.schema import TABLES, quarantine

MOST = 2**40  # of anything that a record counts or measures; a million such still have a sum


@dataclass(frozen=True, slots=True)
class StoredGeneration:
    """A row as the trainer and the command line read it."""

    values: dict[str, Any]
    disagreements: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Outline:
    """What is asked of a generation before it is worth reading whole. `figure` is its acceptance, or agreement where that is
    null; None where neither is known.
    """

    id: str
    conversation_id: str
    created_at: float
    figure: float | None
    output_count: int
    target_fingerprint: str


def iso(moment: float) -> str:
    """A moment as the store writes it beside the number."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _row_of(record: Record) -> dict[str, Any]:
    """A record's values under its table's column names."""
    row = {name: getattr(record, name) for name in record.__slots__ if name not in ("disagreements", "top_k")}
    row["created"] = iso(record.created_at)
    for name, value in row.items():
        if isinstance(value, (dict, list)):
            row[name] = json.dumps(value, ensure_ascii=False)
    if isinstance(record, Generation):
        row["agreement"] = None
        row["temperature"] = float(record.sampling.get("temperature", 0.0))
        row["stats"] = json.dumps({} if record.stats is None else asdict(record.stats), ensure_ascii=False)
        # a record without its text still says how long it was
        row["output_count"] = len(record.output_tokens) // 4 or _emitted(record.stats)
        top = record.top_k
        row |= {
            "top_k": top.k if top else None,
            "top_ids": top.ids if top else None,
            "top_logprobs": top.logprobs if top else None,
            "tail": top.tail if top else None,
            "entropy": top.entropy if top else None,
        }
    return row


def _emitted(stats: AnswerStats | None) -> int:
    return 0 if stats is None else sum(stats.tokens_by_source.values())


@dataclass(frozen=True, slots=True)
class Incoming:
    """A delivered record as rows: one of `table`, and `lines` of disagreements."""

    table: sa.Table
    columns: dict[str, Any]
    lines: Sequence[dict[str, Any]] = ()


def read(row: Envelope) -> Incoming:
    """What `row` holds; what is no record, or none that a row can hold, is a row of the quarantine."""
    try:
        record = decode(row.body)
        if type(record) not in TABLES or kind_of(record) != row.kind or record.id != row.id:
            raise WireError(f"not the record it is labelled as ({row.kind})")
        columns = _row_of(record)
        lines = _lines_of(record) if isinstance(record, Generation) else ()
        for values in (columns, *lines):
            _check(values)
    except Exception as error:  # its free-form parts may hold anything, and one record must not stop those behind it
        return quarantined(row, error)
    return Incoming(TABLES[type(record)], columns, lines)


def quarantined(row: Envelope, error: Exception) -> Incoming:
    """`row` as it came, and why."""
    reason = f"{type(error).__name__}: {error}"[:500].encode("utf-8", "replace").decode()
    values = {"id": row.id, "kind": row.kind, "created": iso(time.time()), "reason": reason, "raw": row.body}
    return Incoming(quarantine, values)


def _check(values: dict[str, Any]) -> None:
    """Raises WireError for numbers that SQLite has no place for (NaN would become NULL), and for those whose sums it would
    not have: one of 2**63 - 1 tokens, and no summary could be made any more.
    """
    for name, value in values.items():
        if isinstance(value, (int, float)) and not abs(value) < MOST:
            raise WireError(f"{name}: out of range")


def _lines_of(record: Generation) -> list[dict[str, Any]]:
    return [
        {name: getattr(item, name) for name in item.__slots__ if name != "context_tokens"}
        | {"generation_id": record.id, "context_tokens": json.dumps(item.context_tokens)}
        for item in record.disagreements
    ]


def exported(row: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A generation in the sources' JSONL shape."""
    names = ("position", "draft_token", "target_token", "draft_confidence", "target_confidence")
    said = (json.loads(row["messages"]) or [{}])[-1].get("content")
    return {
        "id": row["id"],
        "prompt": row["prompt"] if said is None else said,
        "target_output": row["output"],
        "acceptance_rate": row["acceptance_rate"],
        "timestamp": row["created"],
        "disagreements": [
            {name: line[name] for name in names} | {"context_tokens": json.loads(line["context_tokens"])}
            for line in lines
        ],
    }
