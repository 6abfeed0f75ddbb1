"""Estimates how often drafts are accepted: by depth in the draft, and by the drafter's confidence.

Recent rounds weigh most. Knows counts only: no models, costs or requests.
"""

from collections.abc import Sequence

import numpy as np

MEMORY = 48.0  # tested tokens that a depth remembers
PRIOR = 6.0  # tested tokens that the prior counts for
BUCKETS = 10  # of confidence
# Acceptance at confidence 0 and 1 before anything was verified, as measured with the shipped draft
# on held-out prompts. A drawn token is accepted by how far the two distributions overlap, so one of
# a flat distribution is accepted more often than the argmax of a flat one.
GREEDY_PRIOR, SAMPLED_PRIOR = (0.1, 1.0), (0.25, 0.8)
PROBE_EVERY = 8  # rounds without a draft before the first probe of a parked drafter


class AcceptanceEstimate:
    """The share of drafts accepted at each depth, given that all before were accepted.

    Also by the draft's confidence (the largest probability of the distribution it was drawn from),
    which predicts better than depth once it is known. For n-gram drafts "depth" counts how long the
    match already is: an accepted draft makes the match one longer.

    `pause` and `since_probe` count rounds of a parked drafter, whichever requests they belong to.
    """

    def __init__(
        self,
        depths: int = 16,
        prior: float | np.ndarray = 0.5,
        by_confidence: tuple[float, float] = GREEDY_PRIOR,
    ) -> None:
        self.tested = np.full(depths, PRIOR)
        self.accepted = np.full(depths, PRIOR * np.asarray(prior))
        self.pause, self.since_probe = PROBE_EVERY, 0
        self.confidence_tested = np.full(BUCKETS, PRIOR)
        least, most = by_confidence
        shares = least + (most - least) * (np.arange(BUCKETS) + 0.5) / BUCKETS
        self.confidence_accepted = PRIOR * shares

    def copy(self) -> "AcceptanceEstimate":
        """An independent copy with at most twice the prior's weight, so that it adapts quickly.

        For a new request, which starts from what all requests met.
        """
        other = AcceptanceEstimate(len(self.tested))
        weight = np.minimum(1.0, 2 * PRIOR / self.tested)
        other.tested, other.accepted = self.tested * weight, self.accepted * weight
        other.confidence_tested = self.confidence_tested.copy()
        other.confidence_accepted = self.confidence_accepted.copy()
        return other

    def update(self, drafted: int, accepted: int, start: int = 0) -> None:
        """A round accepted `accepted` of `drafted` tokens; `start` is the first draft's depth."""
        for i in range(min(drafted, accepted + 1)):
            depth = min(start + i, len(self.tested) - 1)
            _count(self.tested, self.accepted, depth, float(i < accepted))

    def update_confidence(self, confidences: Sequence[float], drafted: int, accepted: int) -> None:
        """Update by confidence with the same round.

        If drafting stopped early for low confidence, `confidences` has one entry more than there
        were drafts: the token not drafted is counted at its depth with its estimated acceptance;
        otherwise deep positions would be judged by confident drafts only.
        """
        for i in range(min(drafted, accepted + 1)):
            _count(
                self.confidence_tested,
                self.confidence_accepted,
                _bucket(confidences[i]),
                float(i < accepted),
            )
        if accepted == drafted < min(len(confidences), len(self.tested)):
            _count(self.tested, self.accepted, drafted, self.at_confidence(confidences[drafted]))

    def at(self, depth: int) -> float:
        """Estimated acceptance at a depth counted from 0."""
        depth = min(depth, len(self.tested) - 1)
        return float(self.accepted[depth] / self.tested[depth])

    def at_confidence(self, confidence: float) -> float:
        """Estimated acceptance of a draft from a distribution with this largest probability."""
        bucket = _bucket(confidence)
        return float(self.confidence_accepted[bucket] / self.confidence_tested[bucket])

    def shifted(self, start: int) -> "AcceptanceEstimate":
        """A view from depth `start` on; the last depth stands for all beyond it."""
        other = AcceptanceEstimate(len(self.tested))
        depths = np.minimum(np.arange(len(self.tested)) + start, len(self.tested) - 1)
        other.tested, other.accepted = self.tested[depths], self.accepted[depths]
        return other

    def expected_tokens(self, k: int) -> float:
        """Expected output tokens of a round with k drafts.

        That is 1 + the sum over depths of the chance that all drafts up to there are accepted.
        """
        if not k:
            return 1.0
        return 1.0 + float(np.cumprod(self.accepted[:k] / self.tested[:k]).sum())


def _count(tested: np.ndarray, accepted: np.ndarray, index: int, outcome: float) -> None:
    decay = min(1.0, MEMORY / (tested[index] + 1))
    tested[index] = tested[index] * decay + 1
    accepted[index] = accepted[index] * decay + outcome


def _bucket(confidence: float) -> int:
    return min(int(confidence * BUCKETS), BUCKETS - 1)
