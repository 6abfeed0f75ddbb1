"""What a round costs on this machine in seconds, and the tokens a second that a draft length
promises.

Seconds of a target step by its rows and of a draft by its depth, as engine/calibration.py measures
them. With acceptance estimates by depth they give the expected tokens a second of each draft length
k; 0 is one of them. DISCO (arXiv 2405.04304) and SpecDec++ (arXiv 2405.19715) choose by estimates
too; the measured cost makes it a rate.
"""

from dataclasses import dataclass, replace

import numpy as np

from specl.shared.engine.acceptance_estimate import AcceptanceEstimate


@dataclass(frozen=True, slots=True)
class Costs:
    """verify[rows]: seconds of a target step; draft[k]: seconds of k drafted tokens; ngram: seconds
    of an n-gram look-up.

    `batch_rows` counts rows of other requests in the same step: they share its cost, and each of
    those requests gets a token from it.
    """

    verify: dict[int, float]
    draft: dict[int, float]
    ngram: float = 2e-4
    batch_rows: int = 0

    def with_batch_rows(self, rows: int) -> "Costs":
        """These costs for a request whose steps also hold `rows` rows of other requests."""
        return self if rows == self.batch_rows else replace(self, batch_rows=rows)

    def verify_s(self, rows: int) -> float:
        """Seconds of a target step with `rows` rows of this request.

        Interpolated between measured widths; beyond the widest, along the last slope.
        """
        return _interpolate(self.verify, rows + self.batch_rows)

    def next_row_s(self, rows: int) -> float:
        """Seconds that one more row adds to a step of `rows` rows; at least 0, despite noise."""
        return max(0.0, self.verify_s(rows + 1) - self.verify_s(rows))

    def draft_s(self, k: int) -> float:
        """Seconds of a draft of k tokens, interpolated between measured depths; 0 for k = 0."""
        return _interpolate(self.draft, k) if k and self.draft else 0.0

    def next_draft_s(self, k: int) -> float:
        """Seconds that one more token adds to a draft of k >= 1."""
        return max(0.0, self.draft_s(k + 1) - self.draft_s(k))

    def rate(
        self,
        k: int,
        acceptance: AcceptanceEstimate,
        draft_s: float | None = None,
        draft_slowdown: float = 1.0,
    ) -> float:
        """Expected tokens a second when k tokens are drafted, in `draft_s` seconds if given.

        A round with a draft takes `draft_slowdown` times the measured seconds
        (timing_correction.py).
        """
        seconds = self.verify_s(k + 1) + (self.draft_s(k) if draft_s is None else draft_s)
        return (self.batch_rows + acceptance.expected_tokens(k)) / (seconds * (draft_slowdown if k else 1.0))

    def best_k(
        self,
        acceptance: AcceptanceEstimate,
        most: int,
        draft_s: float | None = None,
        draft_slowdown: float = 1.0,
    ) -> tuple[int, float]:
        """The k in 0..most with the highest expected rate, and that rate."""
        rates = [self.rate(k, acceptance, draft_s if k else None, draft_slowdown) for k in range(most + 1)]
        best = int(np.argmax(rates))
        return best, rates[best]


def _interpolate(table: dict[int, float], at: int) -> float:
    sizes = sorted(table)
    if at > sizes[-1] and len(sizes) > 1:
        a, b = sizes[-2:]
        return table[b] + (at - b) * max(0.0, table[b] - table[a]) / (b - a)
    return float(np.interp(at, sizes, [table[size] for size in sizes]))
