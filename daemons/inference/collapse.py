"""Whether a newly activated adapter has collapsed on live traffic. Pure counts; knows no request,
file or clock.

The check stops a draft that is plainly broken and decides nothing else. Which of two working
adapters is better is decided by learning/judge.py, on the same answers. The test is therefore
against a fixed floor, and not against the acceptance of the adapter before: that is of other
requests. Such a comparison once rolled back three better adapters because the work had become
harder (docs/learning.md). At the floor drafting costs about what it brings, so little is lost while
a rolled-back adapter waits for the judge.
"""

import math
from dataclasses import dataclass

FLOOR = 0.1  # acceptance of the first drafted token below which a draft counts as broken
ALPHA = 0.025  # significance: how probable so few accepted tokens may be for an adapter at the floor
ENOUGH_TOKENS = 200  # first drafted tokens that end the check
PROBE_EVERY = 4  # every 4th round drafts even while drafting is off: an answer of 24 tokens gives 6 of them


@dataclass(slots=True)
class CollapseCheck:
    """Counts of one adapter's first drafted tokens (depth 1 of each model draft), since it was
    activated.
    """

    adapter_id: str
    tested: int = 0
    accepted: int = 0
    requests: int = 0
    rounds: int = 0

    @property
    def acceptance(self) -> float:
        """Share of first drafted tokens that were accepted; 0 before there are any."""
        return self.accepted / max(self.tested, 1)

    @property
    def done(self) -> bool:
        """Whether enough was counted."""
        return self.tested >= ENOUGH_TOKENS

    def must_draft(self) -> bool:
        """Whether this round must draft at least one token. Call once a round."""
        self.rounds += 1
        return not self.done and self.rounds % PROBE_EVERY == 0

    def add(self, tested: int, accepted: int) -> None:
        """Count a finished request."""
        self.requests, self.tested, self.accepted = self.requests + 1, self.tested + tested, self.accepted + accepted

    def collapse(self) -> str:
        """Why the adapter counts as broken, with the numbers; empty where it does not."""
        if binomial_tail(self.accepted, self.tested, FLOOR) >= ALPHA:
            return ""
        return (
            f"live acceptance {self.acceptance:.3f} of {self.tested} first drafted tokens in {self.requests} requests "
            f"is below {FLOOR}"
        )


def binomial_tail(successes: int, trials: int, p: float) -> float:
    """P(X <= successes) for X ~ Binomial(trials, p)."""
    return sum(math.comb(trials, n) * p**n * (1 - p) ** (trials - n) for n in range(successes + 1))
