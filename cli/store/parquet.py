"""The store as a Parquet file: one row a generation, lists for tokens, the target's
top-k and disagreements.
"""

from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from typing import Any, BinaryIO

import numpy as np

from specl.shared.errors import ConfigError
from specl.shared.store import StoredGeneration

GROUP = 200  # generations of one row group
_TEXT = (
    "id", "conversation_id", "created", "mode", "prompt", "output", "messages", "finish_reason", "adapter_id", "target_model",
    "draft_model", "target_fingerprint", "draft_fingerprint", "sampling", "stats",
)  # fmt: skip
_REAL = ("created_at", "acceptance_rate", "agreement", "tokens_per_second", "ttft_ms", "temperature")
_INT = ("drafted", "accepted", "model_drafted", "model_accepted", "rounds", "output_count")
_ARRAYS = {"prompt_tokens": "<u4", "output_tokens": "<u4", "sources": "u1", "tail": "<f2", "entropy": "<f2"}
_TABLES = {"top_ids": "<u4", "top_logprobs": "<f2"}


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet needs pyarrow, which is not installed", "pip install 'speclora[parquet]'") from None
    return pyarrow


def write(file: BinaryIO, rows: Iterable[StoredGeneration]) -> int:
    """Write all of `rows`; how many they were. Raises ConfigError without pyarrow."""
    pa = _pyarrow()
    schema, count, source = _schema(pa), 0, iter(rows)
    with pa.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        while group := [to_row(row) for row in islice(source, GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count


def _schema(pa: Any) -> Any:
    line = pa.struct(
        [
            ("position", pa.int64()), ("draft_token", pa.int64()), ("target_token", pa.int64()), ("draft_text", pa.string()),
            ("target_text", pa.string()), ("draft_confidence", pa.float64()), ("target_confidence", pa.float64()),
            ("drafter", pa.string()), ("depth", pa.int64()), ("context_tokens", pa.list_(pa.int64())),
        ]
    )  # fmt: skip
    kinds = {"<u4": pa.uint32(), "u1": pa.uint8(), "<f2": pa.float32()}
    return pa.schema(
        [(name, pa.string()) for name in _TEXT]
        + [(name, pa.float64()) for name in _REAL]
        + [(name, pa.int64()) for name in _INT]
        + [(name, pa.list_(kinds[kind])) for name, kind in _ARRAYS.items()]
        + [(name, pa.list_(pa.list_(kinds[kind]))) for name, kind in _TABLES.items()]
        + [("disagreements", pa.list_(line))]
    )


def to_row(row: StoredGeneration) -> dict[str, Any]:
    """One generation as plain values; blobs become lists, log-probabilities of a position one list
    each.
    """
    values: dict[str, Any] = {name: getattr(row, name) for name in (*_TEXT, *_REAL, *_INT)}
    values |= {name: _numbers(getattr(row, name), kind) for name, kind in _ARRAYS.items()}
    values |= {name: _table(getattr(row, name), kind, row.top_k) for name, kind in _TABLES.items()}
    return values | {"disagreements": [asdict(item) for item in row.disagreements]}


def _numbers(blob: bytes | None, kind: str) -> list[Any] | None:
    return None if blob is None else np.frombuffer(blob, kind).tolist()


def _table(blob: bytes | None, kind: str, k: int | None) -> list[list[Any]] | None:
    return np.frombuffer(blob, kind).reshape(-1, k).tolist() if blob and k else None
