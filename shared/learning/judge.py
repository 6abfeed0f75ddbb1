"""The judge of adapters: a paired comparison of two draft states on the same answers, and the rules
that decide from it.

Pure: scores in, a verdict with its numbers out; knows no file and no model. `judge` decides whether
a candidate is promoted, `reevaluate` decides again on answers that came after the promotion. Both
read one `Comparison`: the difference of pooled agreement with its 95% interval, from a percentile
bootstrap over generations (tokens of one answer are not independent).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specl.shared.engine.acceptance_estimate import PRIOR, AcceptanceEstimate
from specl.shared.engine.costs import Costs
from specl.shared.messaging.codes import RunVerdict

RESAMPLES = 2000
CONFIDENCE = 0.95
MAX_FALL = 0.005  # of agreement on the regression slice, against the active adapter
MAX_DRIFT = 0.02  # of the same, against the draft without any adapter: it bounds what a year of promotions costs
CHUNK = 200  # resamples at once: 200 x 100 generations are 20,000 indices

Counts = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often a draft says what the target says. Arrays have one entry a generation, for
    resampling.

    hits / positions: at depth 1, the draft's top token = the text's (greedy), or sum of min(p, q)
    over the stored top-k (sampled: a lower bound). by_depth: the same at each depth, given that all
    shallower tokens were accepted; no deeper than any draft got.
    """

    hits: Counts
    positions: Counts
    by_depth: tuple[float, ...] = ()

    @property
    def value(self) -> float:
        """Pooled over all positions; 0 where there are none."""
        return float(self.hits.sum() / max(self.positions.sum(), 1))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Pooled agreement of two draft states on the same generations; `low` and `high` bound the
    difference, after less before.
    """

    generations: int
    before: float
    after: float
    low: float
    high: float

    @property
    def gain(self) -> float:
        """Agreement after less before."""
        return self.after - self.before

    def __str__(self) -> str:
        return (
            f"agreement {self.before:.4f} -> {self.after:.4f} on {self.generations} generations, "
            f"95% interval of the gain {self.low:+.4f} to {self.high:+.4f}"
        )


@dataclass(frozen=True, slots=True)
class Lineage:
    """What an adapter was made for and from: fingerprints of the draft and of the tokenizer, the id
    of its parent.
    """

    base: str
    tokenizer: str
    parent: str


@dataclass(frozen=True, slots=True)
class Regression:
    """Agreement on the regression slice (general text, no user data): before, after, and without
    any adapter.
    """

    before: float
    after: float
    pristine: float | None = None

    @property
    def drifted(self) -> bool:
        """Whether the draft without any adapter is better by `MAX_DRIFT` or more."""
        return self.pristine is not None and self.pristine - self.after >= MAX_DRIFT

    @property
    def rejection_reason(self) -> str:
        """How general text regresses; empty where it does not."""
        if not self.before - self.after < MAX_FALL:
            return f"general text fell by {MAX_FALL} or more"
        if self.drifted and self.after < self.before:
            return f"general text is {MAX_DRIFT} or more below the {self.pristine:.4f} of the draft without any adapter"
        return ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision about an adapter, the sentence for people and the numbers. `rates`: tokens a
    second that the cost model expects before and after, None where no costs are known.
    `interpolation_alpha`: how far from the old weights to the trained ones.
    """

    verdict: RunVerdict
    reason: str
    comparison: Comparison
    regression: Regression | None = None
    rates: tuple[float | None, float | None] = (None, None)
    interpolation_alpha: float = 1.0

    @property
    def fails_only_regression(self) -> bool:
        """Whether general text is all that stands against it, so that a part of the change may
        pass.
        """
        regresses = self.regression is not None and bool(self.regression.rejection_reason)
        return self.verdict == RunVerdict.REJECTED and self.comparison.low > 0 and regresses

    def at_alpha(self, alpha: float) -> "Verdict":
        """This verdict, about weights interpolated with `alpha`."""
        return replace(self, interpolation_alpha=alpha, reason=f"{self.reason}; interpolation alpha {alpha:g}")

    def numbers(self) -> dict[str, Any]:
        """All numbers, rounded, as a record has them. The names are those of stored records."""
        regression = {f"regression_{name}": v for name, v in asdict(self.regression).items()} if self.regression else {}
        values: dict[str, Any] = {
            "verdict": str(self.verdict),
            "reason": self.reason,
            **asdict(self.comparison),
            "gain": self.comparison.gain,
            **regression,
            "rate_before": self.rates[0],
            "rate_after": self.rates[1],
            "interpolation_alpha": self.interpolation_alpha,
        }
        return {name: round(v, 6) if isinstance(v, float) else v for name, v in values.items()}


# ------------------------------------------------------------------------------------------------ the comparison
def compare(before: Agreement, after: Agreement, seed: int = 0) -> Comparison:
    """The paired comparison. Raises ValueError where the two were not scored on the same positions."""
    low, high = paired_interval(before, after, seed)
    return Comparison(int((before.positions > 0).sum()), before.value, after.value, low, high)


def paired_interval(before: Agreement, after: Agreement, seed: int = 0) -> tuple[float, float]:
    """Bounds of the gain in pooled agreement when generations are drawn again, both scores of one
    together.

    Raises ValueError where the two were not scored on the same positions.
    """
    if not np.array_equal(before.positions, after.positions):
        raise ValueError("the two states were not scored on the same positions")
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


# ------------------------------------------------------------------------------------------------ the rules
def judge(
    before: Agreement,
    after: Agreement,
    minimum: int,
    regression: Regression | None = None,
    rates: tuple[float | None, float | None] = (None, None),
    problems: Sequence[str] = (),
) -> Verdict:
    """Whether a candidate (`after`) replaces the active adapter (`before`), by their scores on
    held-out generations.

    It must be better by more than chance, and general text must not regress. Fewer than `minimum`
    generations: no verdict. `problems` are reasons that no score can outweigh. Raises ValueError
    where the scores are not paired.
    """
    comparison = compare(before, after)
    figures = f"held-out {comparison}"
    if regression is not None:
        figures += f"; regression slice {regression.before:.4f} -> {regression.after:.4f}"
    verdict, reason = RunVerdict.REJECTED, ""
    if problems:
        figures, reason = "; ".join(problems), ""
    elif comparison.generations < minimum:
        verdict, reason = (
            RunVerdict.NO_VERDICT,
            f"{minimum} generations are needed for a verdict, so collecting goes on",
        )
    elif not comparison.low > 0:
        reason = "the interval does not lie above zero"
    elif regression is not None and regression.rejection_reason:
        reason = regression.rejection_reason
    else:
        verdict = RunVerdict.PROMOTED
    return Verdict(verdict, f"{figures}: {reason}" if reason else figures, comparison, regression, rates)


def reevaluate(predecessor: Agreement, adapter: Agreement, minimum: int, was_rolled_back: bool) -> Verdict:
    """The second decision about a promoted adapter, by both scores on the same answers since its
    promotion.

    Nothing changes unless the other adapter is better by more than chance: an active adapter is
    KEPT or ROLLED_BACK. One that the collapse check has rolled back is REINSTATED, or its rollback
    stays (CONFIRMED). Fewer than `minimum` answers: no verdict.
    """
    comparison = compare(predecessor, adapter)
    if comparison.generations < minimum:
        return Verdict(RunVerdict.NO_VERDICT, f"{comparison}: {minimum} answers are needed", comparison)
    if was_rolled_back:
        verdict = RunVerdict.REINSTATED if comparison.low > 0 else RunVerdict.CONFIRMED
    else:
        verdict = RunVerdict.ROLLED_BACK if comparison.high < 0 else RunVerdict.KEPT
    return Verdict(verdict, f"answers since its promotion: {comparison}", comparison)


def lineage_problems(candidate: Lineage, current: Lineage) -> list[str]:
    """Why a candidate cannot be compared with the active adapter: another base, tokenizer or parent."""
    problems = []
    if candidate.base != current.base:
        problems.append(f"it was trained on draft {candidate.base}, this one is {current.base}")
    if candidate.tokenizer != current.tokenizer:
        problems.append("its tokenizer is another one")
    if candidate.parent != current.parent:
        problems.append(
            f"it was trained from adapter {candidate.parent or 'none'}, the active one is {current.parent or 'none'} by now"
        )
    return problems


def expected_rate(costs: Costs | None, by_depth: Sequence[float], most: int) -> float | None:
    """Tokens a second that the cost model expects at the best k for this agreement by depth; None
    where nothing is measured.
    """
    if costs is None or not by_depth:
        return None
    estimate = AcceptanceEstimate()
    rates = np.array([*by_depth, *[by_depth[-1]] * (len(estimate.tested) - len(by_depth))])
    estimate.accepted = PRIOR * rates[: len(estimate.tested)]
    return costs.best_k(estimate, most)[1]
