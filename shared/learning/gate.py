"""Whether a candidate adapter may draft: paired scores in, a verdict with its numbers out. Pure; knows no file and no model.

Candidate and current are scored on the same generations, so the gain is resampled by generation (tokens of one answer are
not independent): the percentile bootstrap of the pooled agreement's difference. Promotion needs the whole interval above
zero, and the regression slice (general text, no user data) may fall by less than `MAX_FALL`, and all adapters in a row together by
less than `MAX_DRIFT`: what a year of promotions costs is bounded.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from specl.shared.engine.acceptance_estimate import PRIOR, AcceptanceEstimate
from specl.shared.engine.costs import Costs

RESAMPLES = 2000
CONFIDENCE = 0.95
MAX_FALL = 0.005  # of agreement on the regression slice
MAX_DRIFT = 0.02  # the same, against the draft without any adapter
CHUNK = 200  # resamples at once: 200 x 100 generations are 20,000 indices
VERDICTS = ("promoted", "rejected", "no_verdict")


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often a draft says what the target says. Arrays have one entry a generation, for resampling.

    hits / positions: at depth 1, own top token = the text's (greedy), or sum of min(p, q) over the stored top-k (sampled: a
    lower bound). by_depth: the same at each depth, given that all shallower tokens stood; no further than any draft got.
    """

    hits: np.ndarray
    positions: np.ndarray
    by_depth: tuple[float, ...] = ()

    @property
    def value(self) -> float:
        """Over all positions; 0 where there are none."""
        return float(self.hits.sum() / max(self.positions.sum(), 1))


@dataclass(frozen=True, slots=True)
class Lineage:
    """What an adapter was made for and from."""

    base: str
    tokenizer: str
    parent: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """`verdict` is one of VERDICTS; `low` and `high` bound the gain; the regression fields are null without a slice; `share` is
    how far of the way from the old weights to the learned ones was judged.
    """

    verdict: str
    reason: str
    generations: int
    before: float
    after: float
    low: float
    high: float
    regression_before: float | None = None
    regression_after: float | None = None
    regression_pristine: float | None = None
    rate_before: float | None = None
    rate_after: float | None = None
    share: float = 1.0

    @property
    def only_spoils(self) -> bool:
        """Whether all that stands against it is general text, so that less of it may do."""
        against = spoils(self.regression_before, self.regression_after, self.regression_pristine)
        return self.verdict == "rejected" and self.low > 0 and bool(against)

    @property
    def drifted(self) -> bool:
        """Whether general text is too far below what the draft has there without any adapter."""
        known = self.regression_pristine is not None and self.regression_after is not None
        return known and self.regression_pristine - self.regression_after >= MAX_DRIFT

    @property
    def gain(self) -> float:
        """Held-out agreement, after less before."""
        return self.after - self.before

    def of(self, share: float) -> "Verdict":
        """The same, about `share` of the way."""
        return replace(self, share=share, reason=self.reason + (f"; {share:g} of the way" if share < 1 else ""))

    def numbers(self) -> dict[str, Any]:
        """All fields, rounded, for a record."""
        values = asdict(self) | {"gain": self.gain}
        return {name: round(v, 6) if isinstance(v, float) else v for name, v in values.items()}


def paired_interval(before: Agreement, after: Agreement, seed: int = 0) -> tuple[float, float]:
    """Bounds of the gain in pooled agreement when generations are drawn again, both scores of one together.

    Raises ValueError where the two are not about the same generations.
    """
    _check_paired(before, after)
    count = len(before.hits)
    if count == 0:
        return 0.0, 0.0
    rng = np.random.default_rng(seed)
    gains = []
    for start in range(0, RESAMPLES, CHUNK):
        picks = rng.integers(0, count, (min(CHUNK, RESAMPLES - start), count))
        positions = np.maximum(before.positions[picks].sum(axis=1), 1)
        gains.append((after.hits - before.hits)[picks].sum(axis=1) / positions)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(gains), (tail, 100 - tail))
    return float(low), float(high)


def _check_paired(before: Agreement, after: Agreement) -> None:
    if before.positions.shape != after.positions.shape or not np.array_equal(before.positions, after.positions):
        raise ValueError("candidate and current were not scored on the same positions")


def lineage_problems(candidate: Lineage, current: Lineage) -> list[str]:
    """Why a candidate cannot be compared with what is in force: another base, tokenizer or parent."""
    problems = []
    if candidate.base != current.base:
        problems.append(f"it was trained on draft {candidate.base}, this one is {current.base}")
    if candidate.tokenizer != current.tokenizer:
        problems.append("its tokenizer is another one")
    if candidate.parent != current.parent:
        problems.append(
            f"it goes on from adapter {candidate.parent or 'none'}, in force is {current.parent or 'none'} by now"
        )
    return problems


def expected_rate(costs: Costs | None, by_depth: Sequence[float], most: int) -> float | None:
    """Tokens a second that the cost model promises at the best k for this agreement by depth; null where nothing is measured."""
    if costs is None or not by_depth:
        return None
    estimate = AcceptanceEstimate()
    known = np.array([*by_depth, *[by_depth[-1]] * (len(estimate.tested) - len(by_depth))])
    estimate.accepted = PRIOR * known[: len(estimate.tested)]
    return costs.best_k(estimate, most)[1]


def judge(
    before: Agreement,
    after: Agreement,
    minimum: int,
    regression: tuple[Agreement, Agreement] | None = None,
    pristine: float | None = None,
    rates: tuple[float | None, float | None] = (None, None),
    problems: Sequence[str] = (),
    seed: int = 0,
) -> Verdict:
    """The verdict on a candidate (`after`) against what is in force (`before`), on held-out generations.

    `regression` has the same two on the regression slice, `pristine` is the draft's agreement there without any adapter;
    `problems` are reasons that no score can outweigh. Fewer than `minimum` generations: no verdict. Raises ValueError where the
    scores are not paired.
    """
    low, high = paired_interval(before, after, seed)
    general = (regression[0].value, regression[1].value, pristine) if regression is not None else (None, None, None)
    if regression is not None:
        _check_paired(*regression)
    count = int((before.positions > 0).sum())
    verdict, reason = _decide(before, after, low, high, count, minimum, general, problems)
    return Verdict(verdict, reason, count, before.value, after.value, low, high, *general, *rates)


def _decide(
    before: Agreement,
    after: Agreement,
    low: float,
    high: float,
    count: int,
    minimum: int,
    general: tuple[float | None, float | None, float | None],
    problems: Sequence[str],
) -> tuple[str, str]:
    figures = (
        f"held-out agreement {before.value:.4f} -> {after.value:.4f} on {count} generations, "
        f"95% interval of the gain {low:+.4f} to {high:+.4f}"
    )
    if general[0] is not None:
        figures += f"; regression slice {general[0]:.4f} -> {general[1]:.4f}"
    if problems:
        return "rejected", "; ".join(problems)
    if count < minimum:
        return "no_verdict", f"{figures}: {minimum} generations are needed for a verdict, so collecting goes on"
    if not low > 0:
        return "rejected", f"{figures}: the interval does not lie above zero"
    if against := spoils(*general):
        return "rejected", f"{figures}: {against}"
    return "promoted", figures


def spoils(before: float | None, after: float | None, pristine: float | None) -> str:
    """What is wrong with general text; empty where nothing is."""
    if before is None or after is None:
        return ""
    if not before - after < MAX_FALL:
        return f"general text fell by {MAX_FALL} or more"
    if pristine is not None and after < before and not pristine - after < MAX_DRIFT:
        return f"general text is {MAX_DRIFT} or more below the {pristine:.4f} of the draft without any adapter"
    return ""
