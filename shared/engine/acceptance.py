"""Which drafted tokens stand, and what replaces the first that does not. Pure: laws and tokens in, a count and a token out.

Whatever the drafts are, the tokens that come out follow the target's law exactly: greedy emits its argmax; `rejection` is
Leviathan et al. 2023 (arXiv 2211.17192, algorithm 1); `block` judges all drafts of a round together and accepts at least
as many (Sun et al. 2024, arXiv 2403.10444, algorithm 2); `coupled` emits argmax(log p + noise), a draw by the Gumbel-max trick
whose noise belongs to the position, so that the text of a seed does not depend on the drafts at all.

`target` is called with a row number only as far as rows are needed: a row after the first rejection is never looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from specl.shared.engine.sampling import Distribution

TargetRow = Callable[[int], Distribution]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first `accepted` drafts stand and `token` follows them: a correction, or the bonus after all of them."""

    accepted: int
    token: int


def greedy(target_argmax: Sequence[int], drafts: Sequence[int]) -> Verdict:
    """Accept while the draft is the target's argmax. `target_argmax` has one row more than there are drafts."""
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == target_argmax[accepted]:
        accepted += 1
    return Verdict(accepted, int(target_argmax[accepted]))


def left_over(target_p: Distribution, draft_p: Distribution, weight: float = 1.0) -> np.ndarray:
    """max(weight * target_p - draft_p, 0) over the target's tokens."""
    left = weight * target_p.p
    place = np.searchsorted(target_p.ids, draft_p.ids)
    place = np.minimum(place, len(target_p.ids) - 1)
    shared = target_p.ids[place] == draft_p.ids
    left[place[shared]] -= draft_p.p[shared]
    return np.maximum(left, 0.0)


def residual(target_p: Distribution, draft_p: Distribution, weight: float = 1.0) -> Distribution:
    """norm(max(weight * target_p - draft_p, 0)): what a rejection draws from. The target's own law where nothing is left."""
    left = left_over(target_p, draft_p, weight)
    mass = left.sum()
    return Distribution(target_p.ids, left / mass) if mass > 0 else target_p


def rejection(
    target: TargetRow, drafts: Sequence[int], draft_probs: Sequence[Distribution], uniform: Callable[[], float]
) -> Verdict:
    """Accept draft x with probability min(1, target_p(x) / draft_p(x)); on rejection draw from the residual."""
    for i, (token, draft_p) in enumerate(zip(drafts, draft_probs, strict=True)):
        target_p = target(i)
        if uniform() * draft_p.of(token) >= target_p.of(token):
            return Verdict(i, residual(target_p, draft_p).draw(uniform()))
    return Verdict(len(drafts), target(len(drafts)).draw(uniform()))


def run_weights(target: TargetRow, drafts: Sequence[int], draft_probs: Sequence[Distribution]) -> list[float]:
    """The chance that the first i drafts stand, given them, for i = 0 ..: min(previous * target_p / draft_p, 1)."""
    weights = [1.0]
    for i, (token, draft_p) in enumerate(zip(drafts, draft_probs, strict=True)):
        weights.append(min(1.0, weights[-1] * target(i).of(token) / draft_p.of(token)))
    return weights


def run_chance(weight: float, target_p: Distribution, draft_p: Distribution | None) -> float:
    """The chance to stop after a run of this weight, given that no longer one stood. `draft_p` is what the next draft was
    drawn from, None after the last.
    """
    if draft_p is None:
        return weight
    mass = float(left_over(target_p, draft_p, weight).sum())
    return mass / (mass + 1.0 - weight) if mass > 0 else 0.0


def block(
    target: TargetRow, drafts: Sequence[int], draft_probs: Sequence[Distribution], uniform: Callable[[], float]
) -> Verdict:
    """Accept the longest run of drafts that a draw of its own lets stand; what follows comes from the run's residual.

    Whether a draft goes on may depend on the tokens before, never on the one drawn next: then the runs' chances add up to
    their weights, whatever the lengths (the paper's proof, by induction from the last draft back).
    """
    weights = run_weights(target, drafts, draft_probs)
    for i in range(len(drafts), 0, -1):
        draft_p = draft_probs[i] if i < len(drafts) else None
        if uniform() < run_chance(weights[i], target(i), draft_p):
            probs = residual(target(i), draft_p, weights[i]) if draft_p is not None else target(i)
            return Verdict(i, probs.draw(uniform()))
    return Verdict(0, residual(target(0), draft_probs[0]).draw(uniform()))


def coupled(target: TargetRow, drafts: Sequence[int], noise: Callable[[int], np.ndarray]) -> Verdict:
    """Emit argmax(log target_p + noise) at every row and accept while the draft is that token."""
    for i, token in enumerate(drafts):
        chosen = target(i).argmax_with(noise(i))
        if chosen != token:
            return Verdict(i, chosen)
    return Verdict(len(drafts), target(len(drafts)).argmax_with(noise(len(drafts))))
