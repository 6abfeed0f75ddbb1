"""The acceptance rules: how many drafted tokens stand, and which token follows them.

Pure: distributions and tokens in, a count and a token out. Whatever the drafts are, the output has
exactly the target's distribution. `greedy` emits the target's argmax. `rejection` is Leviathan et
al. 2023 (arXiv 2211.17192, algorithm 1). `block` verifies all drafts of a round together and
accepts at least as many (Sun et al. 2024, arXiv 2403.10444, algorithm 2). `gumbel_coupled` emits
argmax(log p + noise), a draw by the Gumbel-max trick whose noise belongs to the position, so that
the text of a seed does not depend on the drafts at all.

`target_row` is called with a row number only as far as rows are needed: `rejection` and
`gumbel_coupled` never read a row after the first rejection.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from specl.shared.engine.sampling import Distribution

TargetRow = Callable[[int], Distribution]


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The first `accepted` drafts stand and `token` follows them: a correction after a rejection,
    or the bonus token after all drafts.
    """

    accepted: int
    token: int


def greedy(target_argmax: Sequence[int], drafts: Sequence[int]) -> VerifyResult:
    """Accept while the draft is the target's argmax, which has one row more than `drafts`."""
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == target_argmax[accepted]:
        accepted += 1
    return VerifyResult(accepted, int(target_argmax[accepted]))


def left_over(target_p: Distribution, draft_p: Distribution, weight: float = 1.0) -> np.ndarray:
    """max(weight * target_p - draft_p, 0) over the target's tokens."""
    left = weight * target_p.p
    index = np.searchsorted(target_p.ids, draft_p.ids)
    index = np.minimum(index, len(target_p.ids) - 1)
    shared = target_p.ids[index] == draft_p.ids
    left[index[shared]] -= draft_p.p[shared]
    return np.maximum(left, 0.0)


def residual(target_p: Distribution, draft_p: Distribution, weight: float = 1.0) -> Distribution:
    """norm(max(weight * target_p - draft_p, 0)): the distribution to draw from after a rejection.

    `target_p` itself where nothing is left.
    """
    left = left_over(target_p, draft_p, weight)
    mass = left.sum()
    return Distribution(target_p.ids, left / mass) if mass > 0 else target_p


def rejection(
    target_row: TargetRow,
    drafts: Sequence[int],
    draft_probs: Sequence[Distribution],
    uniform: Callable[[], float],
) -> VerifyResult:
    """Accept x with probability min(1, target_p(x) / draft_p(x)); then draw from the residual."""
    for i, (token, draft_p) in enumerate(zip(drafts, draft_probs, strict=True)):
        target_p = target_row(i)
        if uniform() * draft_p.of(token) >= target_p.of(token):
            return VerifyResult(i, residual(target_p, draft_p).draw(uniform()))
    return VerifyResult(len(drafts), target_row(len(drafts)).draw(uniform()))


def prefix_weights(target_row: TargetRow, drafts: Sequence[int], draft_probs: Sequence[Distribution]) -> list[float]:
    """Probability that the first i drafts stand, given these drafts, for i = 0..k.

    Each is min(previous * target_p / draft_p, 1).
    """
    weights = [1.0]
    for i, (token, draft_p) in enumerate(zip(drafts, draft_probs, strict=True)):
        weights.append(min(1.0, weights[-1] * target_row(i).of(token) / draft_p.of(token)))
    return weights


def prefix_stop_probability(weight: float, target_p: Distribution, draft_p: Distribution | None) -> float:
    """Probability that exactly i drafts are accepted, given that no more than i are, for the prefix
    of i drafts with this weight.

    `draft_p`: the distribution that the next draft was drawn from; None after the last draft.
    """
    if draft_p is None:
        return weight
    mass = float(left_over(target_p, draft_p, weight).sum())
    return mass / (mass + 1.0 - weight) if mass > 0 else 0.0


def block(
    target_row: TargetRow,
    drafts: Sequence[int],
    draft_probs: Sequence[Distribution],
    uniform: Callable[[], float],
) -> VerifyResult:
    """Accept the longest prefix of the drafts whose own random draw lets it stand; then draw from
    its residual.

    Whether a draft goes on may depend on the tokens before it, never on the token drawn next. The
    probabilities of the prefixes then add up to their weights, whatever their lengths (proved in
    the paper by induction from the last draft back).
    """
    weights = prefix_weights(target_row, drafts, draft_probs)
    for i in range(len(drafts), 0, -1):
        draft_p = draft_probs[i] if i < len(drafts) else None
        if uniform() < prefix_stop_probability(weights[i], target_row(i), draft_p):
            probs = residual(target_row(i), draft_p, weights[i]) if draft_p is not None else target_row(i)
            return VerifyResult(i, probs.draw(uniform()))
    return VerifyResult(0, residual(target_row(0), draft_probs[0]).draw(uniform()))


def gumbel_coupled(target_row: TargetRow, drafts: Sequence[int], noise: Callable[[int], np.ndarray]) -> VerifyResult:
    """Emit argmax(log target_p + noise) at every row and accept while the draft is that token."""
    for i, token in enumerate(drafts):
        chosen = target_row(i).argmax_with(noise(i))
        if chosen != token:
            return VerifyResult(i, chosen)
    return VerifyResult(len(drafts), target_row(len(drafts)).argmax_with(noise(len(drafts))))
