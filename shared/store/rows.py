"""Records as rows and rows as records: which value of a delivered record goes into which column,
and what is no record at all.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from specl.shared.answer_stats import AnswerStats
from specl.shared.errors import WireError
from specl.shared.messaging.codec import decode, kind_of
from specl.shared.messaging.messages import Disagreement, Envelope, Generation, Record
from specl.shared.store.schema import TABLES, quarantine

LIMIT = 2**40  # of anything that a record counts or measures: a million such still have a sum in SQLite
REASON_CHARACTERS = 500

Row = dict[str, Any]  # column: value


@dataclass(frozen=True, slots=True)
class StoredGeneration:
    """A row of `generations`, column by column, with its disagreements. `messages`, `sampling` and
    `stats` are JSON texts.

    Arrays are little-endian: tokens u32, `sources` one byte a token, top_ids u32 [rows, top_k],
    top_logprobs f16 [rows, top_k].
    """

    id: str
    conversation_id: str
    created_at: float
    created: str
    mode: str
    prompt: str
    output: str
    messages: str
    acceptance_rate: float | None
    agreement: float | None
    drafted: int
    accepted: int
    model_drafted: int
    model_accepted: int
    rounds: int
    output_count: int
    tokens_per_second: float
    ttft_ms: float
    finish_reason: str
    adapter_id: str
    target_model: str
    draft_model: str
    target_fingerprint: str
    draft_fingerprint: str
    sampling: str
    temperature: float
    stats: str
    prompt_tokens: bytes
    output_tokens: bytes
    sources: bytes
    top_k: int | None
    top_ids: bytes | None
    top_logprobs: bytes | None
    tail: bytes | None
    entropy: bytes | None
    disagreements: list[Disagreement]


COLUMNS = tuple(field.name for field in fields(StoredGeneration) if field.name != "disagreements")


def stored_generation(row: Mapping[str, Any], disagreements: list[Disagreement]) -> StoredGeneration:
    """A row of `generations` as its type."""
    return StoredGeneration(**{name: row[name] for name in COLUMNS}, disagreements=disagreements)


def stored_disagreement(row: Mapping[str, Any]) -> Disagreement:
    """A row of `disagreements` as its record."""
    values = {field.name: row[field.name] for field in fields(Disagreement)}
    return Disagreement(**(values | {"context_tokens": json.loads(row["context_tokens"])}))


@dataclass(frozen=True, slots=True)
class GenerationSummary:
    """A generation without its texts, tokens and top-k: enough to choose which ones to read whole.

    `score` is that of failure.py, None where it is not known.
    """

    id: str
    conversation_id: str
    created_at: float
    score: float | None
    output_count: int
    target_fingerprint: str


def iso(timestamp: float) -> str:
    """A time as the store writes it beside the number: UTC, to the second."""
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class RowsToInsert:
    """A delivered record as rows: one of `table`, and those of its disagreements."""

    table: sa.Table
    columns: Row
    disagreements: Sequence[Row] = ()


def rows_to_insert(envelope: Envelope) -> RowsToInsert:
    """The rows of a delivered record. A body that is no record, or that no row can hold, becomes a
    row of the quarantine.
    """
    try:
        record = decode(envelope.body)
        if type(record) not in TABLES or kind_of(record) != envelope.kind or record.id != envelope.id:
            raise WireError(f"not the record it is labelled as ({envelope.kind})")
        columns = row_of(record)
        disagreements = _disagreement_rows(record) if isinstance(record, Generation) else []
        for values in (columns, *disagreements):
            _check(values)
    except Exception as error:  # free-form parts may hold anything, and one record must not stop those behind it
        return quarantined(envelope, error)
    return RowsToInsert(TABLES[type(record)], columns, disagreements)


def quarantined(envelope: Envelope, error: Exception) -> RowsToInsert:
    """The row of the quarantine: the bytes as they came, and why they could not be stored."""
    reason = f"{type(error).__name__}: {error}"[:REASON_CHARACTERS].encode("utf-8", "replace").decode()
    columns = {
        "id": envelope.id,
        "kind": envelope.kind,
        "created": iso(time.time()),
        "reason": reason,
        "raw": envelope.body,
    }
    return RowsToInsert(quarantine, columns)


def row_of(record: Record) -> Row:
    """A record's values under its table's column names."""
    row: Row = {field.name: getattr(record, field.name) for field in fields(record)}
    row["created"] = iso(record.created_at)
    if isinstance(record, Generation):
        row |= _generation_columns(record)
        del row["disagreements"]
    for name, value in row.items():
        if isinstance(value, (dict, list)):
            row[name] = json.dumps(value, ensure_ascii=False)
    return row


def _generation_columns(record: Generation) -> Row:
    top = record.top_k
    return {
        "agreement": None,
        "temperature": float(record.sampling.get("temperature", 0.0)),
        "stats": {} if record.stats is None else asdict(record.stats),
        # a record without its text still says how long it was
        "output_count": len(record.output_tokens) // 4 or _emitted(record.stats),
        "top_k": top.k if top else None,
        "top_ids": top.ids if top else None,
        "top_logprobs": top.logprobs if top else None,
        "tail": top.tail if top else None,
        "entropy": top.entropy if top else None,
    }


def _emitted(stats: AnswerStats | None) -> int:
    return 0 if stats is None else sum(stats.tokens_by_source.values())


def _disagreement_rows(record: Generation) -> list[Row]:
    return [
        {field.name: getattr(item, field.name) for field in fields(item)}
        | {"generation_id": record.id, "context_tokens": json.dumps(item.context_tokens)}
        for item in record.disagreements
    ]


def _check(row: Row) -> None:
    """Raises WireError for numbers that SQLite cannot hold (NaN would become NULL) or whose sums it
    could not: after one of 2**63 - 1 tokens no summary could be made any more.
    """
    for name, value in row.items():
        if isinstance(value, (int, float)) and not abs(value) < LIMIT:
            raise WireError(f"{name}: out of range")


def exported(generation: StoredGeneration) -> Row:
    """A generation in the documented JSONL shape."""
    last_message = (json.loads(generation.messages) or [{}])[-1].get("content")
    names = ("position", "draft_token", "target_token", "draft_confidence", "target_confidence", "context_tokens")
    return {
        "id": generation.id,
        "prompt": generation.prompt if last_message is None else last_message,
        "target_output": generation.output,
        "acceptance_rate": generation.acceptance_rate,
        "timestamp": generation.created,
        "disagreements": [{name: getattr(item, name) for name in names} for item in generation.disagreements],
    }
