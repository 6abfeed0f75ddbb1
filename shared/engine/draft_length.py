"""How many tokens the model drafter proposes.

Before a round, the length with the highest expected tokens a second decides whether to draft at all
(costs.py). During the draft, the drafter's confidence decides after each token whether to go on. A
drafter that does not pay is parked and probed now and then. Knows costs and estimates, neither models nor tokens.
"""

from specl.shared.engine.acceptance_estimate import AcceptanceEstimate
from specl.shared.engine.costs import Costs
from specl.shared.engine.timing_correction import TimingCorrection

DEFAULT_K = 4  # where no costs are known
MIN_PAUSE, MAX_PAUSE = 4, 384  # rounds between probes; a probe costs one to three target steps
EXPLORE_EVERY = 16  # after this many early stops in a row one is ignored, to unlearn a bad start
ENTER_GAIN = 1.04  # expected rate, as a multiple of plain decoding, from which a parked drafter starts again
STAY_GAIN = 1.0  # expected rate, as a multiple of plain decoding, below which an active drafter is parked


class DraftStopPolicy:
    """Stops a draft early: after each token, whether the next pays for its row and its own seconds.

    It sees distributions, never the tokens drawn from them: a stop that depended on the drawn token
    would change the distribution of the output. Another token is worth it while probability / seconds
    beats the rate that the round reaches anyway (Dinkelbach's rule for ratios).
    """

    def __init__(
        self,
        costs: Costs,
        estimate: AcceptanceEstimate,
        break_even_rate: float,
        explore: bool,
        draft_slowdown: float = 1.0,
    ) -> None:
        self.costs, self.estimate, self.explore = costs, estimate, explore
        # tokens that a second of drafting must bring; draft_slowdown turns calibrated seconds into measured ones
        self.break_even_rate = break_even_rate * draft_slowdown
        self.acceptance = 1.0  # probability that all drafts so far are accepted
        self.confidences: list[float] = []
        self.stopped = False

    def should_add(self, confidence: float) -> bool:
        """Whether a token of a distribution with this largest probability is worth its row."""
        self.confidences.append(confidence)
        self.acceptance *= self.estimate.at_confidence(confidence)
        worth = self.acceptance >= self.break_even_rate * self.costs.next_row_s(len(self.confidences))
        self.stopped = not worth
        return worth or self.explore

    def should_continue(self) -> bool:
        """Whether to compute the next token at all."""
        depth = len(self.confidences)
        seconds = self.costs.next_row_s(depth + 1) + self.costs.next_draft_s(depth)
        return self.acceptance * self.estimate.at(depth) >= self.break_even_rate * seconds


class DraftLengthPolicy:
    """Chooses k for each round of one request. `fixed` overrules everything; otherwise rates
    decide, with hysteresis, and with probes while drafting is off (parked).

    Rounds between probes: a probe whose draft is rejected doubles the pause, an accepted one
    divides it by 4. Pause and rounds since the last probe belong to the estimate, which requests
    share.
    """

    def __init__(
        self,
        costs: Costs | None,
        most: int,
        fixed: int | None,
        estimate: AcceptanceEstimate,
        timing: TimingCorrection | None = None,
    ) -> None:
        self.costs, self.most, self.fixed, self.estimate = costs, most, fixed, estimate
        self.timing = timing or TimingCorrection()
        self.parked_rounds = 0
        self.parked_reason = ""
        self._early_stops = 0
        self._rate = 0.0

    def set_batch_rows(self, rows: int) -> None:
        """The next step also holds `rows` rows of other requests."""
        if self.costs is not None:
            self.costs = self.costs.with_batch_rows(rows)

    def choose(self) -> int:
        """The length with the best expected rate for this round; 0: do not draft. The stop policy, where
        there is one, decides how long the draft becomes.
        """
        if self.fixed is not None:
            return self.fixed
        if self.costs is None:
            return min(DEFAULT_K, self.most)
        best, self._rate = self.costs.best_k(self.estimate, self.most, draft_slowdown=self.timing.draft_slowdown)
        plain = self.costs.rate(0, self.estimate)
        if best and self._rate >= (ENTER_GAIN if self.parked_rounds else STAY_GAIN) * plain:
            self.parked_rounds, self.parked_reason = 0, ""
            return best
        self.parked_rounds += 1
        self.parked_reason = (
            f"drafting promises {self._rate / plain:.2f}x of plain decoding at acceptance {self.estimate.at(0):.2f}"
        )
        self.estimate.since_probe += 1
        return 1 if self.estimate.since_probe >= self.estimate.pause else 0

    def force_probe(self) -> None:
        """Make the next round a probe if the drafter is parked."""
        self.estimate.since_probe = self.estimate.pause

    def stop_policy(self) -> DraftStopPolicy | None:
        """The policy that ends this round's draft, at `most` tokens at the latest.

        None where `choose` gave an exact length: fixed, a probe, or chosen without costs.
        """
        if self.fixed is not None or self.costs is None or self.parked_rounds:
            return None
        explore = self._early_stops >= EXPLORE_EVERY
        return DraftStopPolicy(self.costs, self.estimate, self._rate, explore, self.timing.draft_slowdown)

    def add_time(self, rows: int, drafted: int, seconds: float) -> None:
        """A round took `seconds`: it verified `rows` rows, the model drafter computed `drafted`
        tokens.

        Rounds that shared their step with other requests say nothing about this one and are
        ignored.
        """
        if self.costs is not None and not self.costs.batch_rows:
            expected_s = self.costs.verify_s(rows) + self.costs.draft_s(drafted)
            self.timing.add_round(drafted > 0, seconds, expected_s)

    def update(self, stop_policy: DraftStopPolicy | None, drafted: int, accepted: int) -> None:
        """A round accepted `accepted` of `drafted` tokens of the model drafter."""
        estimate = self.estimate
        estimate.update(drafted, accepted)
        if self.parked_rounds and self.fixed is None:
            pause = estimate.pause // 4 if accepted else estimate.pause * 2
            estimate.pause, estimate.since_probe = min(max(pause, MIN_PAUSE), MAX_PAUSE), 0
        if stop_policy is not None:
            estimate.update_confidence(stop_policy.confidences, drafted, accepted)
            self._early_stops = 0 if stop_policy.explore else self._early_stops + stop_policy.stopped
