"""Summaries of a few rows of logits in one pass in C++: largest entry, log-sum-exp, the k largest.

Does not know tokens or sampling. Ties go to the lowest index, as in `mx.argmax`.
"""

from dataclasses import dataclass

import mlx.core as mx

from specl.shared.native.extension import native


@dataclass(frozen=True, slots=True, eq=False)
class RowStats:
    """One entry a row; `ids` and `logits` are [rows, k], largest first."""

    argmax: mx.array  # int32
    logsumexp: mx.array  # float32
    ids: mx.array  # int32
    logits: mx.array  # float32


def row_stats(logits: mx.array, k: int = 32) -> RowStats:
    """Summaries of fp32 logits [rows, vocabulary]; computed at once, not lazily."""
    return RowStats(*native().row_stats(logits, k))
