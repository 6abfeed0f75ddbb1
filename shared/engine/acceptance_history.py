"""What past requests met, for the next ones: acceptance of both drafters, and how long rounds took.

Greedy and sampled requests are kept apart, because a drawn token is accepted by another rule than
an argmax.
"""

from dataclasses import dataclass, field

import numpy as np

from specl.shared.engine.acceptance_estimate import GREEDY_PRIOR, SAMPLED_PRIOR, AcceptanceEstimate
from specl.shared.engine.timing_correction import TimingCorrection
from specl.shared.sampling_params import SamplingParams

# acceptance by length of the match, from 2 tokens on, before anything is known: long matches are
# copies
NGRAM_PRIOR = np.array([0.3, 0.45, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92] + [0.95] * 8)


@dataclass(frozen=True, slots=True)
class AcceptanceHistory:
    """Estimates of one kind of request; requests update them in place."""

    model: AcceptanceEstimate
    ngram: AcceptanceEstimate
    timing: TimingCorrection

    @classmethod
    def new(cls, by_confidence: tuple[float, float]) -> "AcceptanceHistory":
        """Nothing met yet: the priors."""
        return cls(
            AcceptanceEstimate(by_confidence=by_confidence),
            AcceptanceEstimate(prior=NGRAM_PRIOR),
            TimingCorrection(),
        )


@dataclass(frozen=True, slots=True)
class HistoryBySampling:
    """Two histories: that of greedy requests and that of sampled ones."""

    greedy: AcceptanceHistory = field(default_factory=lambda: AcceptanceHistory.new(GREEDY_PRIOR))
    sampled: AcceptanceHistory = field(default_factory=lambda: AcceptanceHistory.new(SAMPLED_PRIOR))

    def of(self, sampling: SamplingParams) -> AcceptanceHistory:
        """The history of requests that are sampled in this way."""
        return self.greedy if sampling.greedy else self.sampled

    def for_new_draft(self) -> "HistoryBySampling":
        """These histories without what was learned about the model draft, which has changed."""
        fresh = HistoryBySampling()
        pairs = ((fresh.greedy, self.greedy), (fresh.sampled, self.sampled))
        return HistoryBySampling(*(AcceptanceHistory(new.model, old.ngram, old.timing) for new, old in pairs))
