"""How many tokens it pays to draft: rates by costs and estimates, prices as rounds really cost, parking and probes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specl.shared.engine.acceptance_estimate import GREEDY_PRIOR, PROBE_EVERY, SAMPLED_PRIOR, AcceptanceEstimate
from specl.shared.engine.costs import Costs
from specl.shared.engine.draft_length import DraftLengthPolicy
from specl.shared.engine.timing_correction import ENOUGH_ROUNDS, TimingCorrection

MOST = 6


def costs(row=0.1, draft=0.1):
    """A plain step is 1 s, each further row and each drafted token so much more."""
    return Costs({w: 1 + row * (w - 1) for w in range(1, 17)}, {k: draft * k for k in (1, 2, 4, 8)})


def sure(acceptance):
    return AcceptanceEstimate(prior=acceptance)


@given(st.floats(0, 1), st.floats(0, 1.5), st.floats(0, 1.5), st.floats(0.8, 2))
def test_the_best_k_is_the_best_of_all(acceptance, row, draft, slowdown):
    table, estimate = costs(row, draft), sure(acceptance)
    k, rate = table.best_k(estimate, MOST, draft_slowdown=slowdown)
    by_hand = [
        (1 + sum(acceptance**i for i in range(1, n + 1))) / ((1 + (row + draft) * n) * (slowdown if n else 1))
        for n in range(MOST + 1)
    ]
    assert rate == pytest.approx(max(by_hand)) and by_hand[k] == pytest.approx(max(by_hand))


def test_good_drafts_are_lengthened_and_bad_ones_left():
    assert costs().best_k(sure(0.05), MOST)[0] == 0
    assert costs().best_k(sure(0.5), MOST)[0] in (1, 2)
    assert costs().best_k(sure(0.95), MOST)[0] == MOST


def test_drawn_token_of_flat_probs_outlasts_the_argmax():
    greedy, sampled = (AcceptanceEstimate(by_confidence=prior) for prior in (GREEDY_PRIOR, SAMPLED_PRIOR))
    assert sampled.at_confidence(0.05) > greedy.at_confidence(0.05)
    assert sampled.at_confidence(0.95) < greedy.at_confidence(0.95)


def test_what_is_met_outweighs_the_prior():
    estimate = sure(0.9)
    for _ in range(40):
        estimate.update(2, 0)
    assert estimate.at(0) < 0.2 and estimate.at(1) == pytest.approx(0.9)  # nobody looked behind the first
    for _ in range(40):
        estimate.update_confidence([0.95], 1, 0)
    assert estimate.at_confidence(0.95) < 0.2


def test_slow_draft_rounds_make_drafting_dearer():
    timing = TimingCorrection()
    for _ in range(ENOUGH_ROUNDS - 1):
        timing.add_round(True, 1.5, 1.0)
        timing.add_round(False, 1.0, 1.0)
    assert timing.draft_slowdown == 1.0  # too few to say
    timing.add_round(True, 1.5, 1.0)
    timing.add_round(False, 1.0, 1.0)
    assert timing.draft_slowdown == pytest.approx(1.5)
    for _ in range(400):
        timing.add_round(True, 2.0, 1.0)
        timing.add_round(False, 2.0, 1.0)
    assert timing.draft_slowdown == pytest.approx(1.0, abs=0.02)  # all is slower alike
    timing.add_round(True, 1000.0, 1.0)
    assert timing.draft_slowdown < 1.05  # one round that was held up


def test_costly_draft_is_parked_and_probed():
    timing = TimingCorrection()
    for _ in range(ENOUGH_ROUNDS):
        timing.add_round(True, 1.9, 1.0)
        timing.add_round(False, 1.0, 1.0)
    assert DraftLengthPolicy(costs(), MOST, None, sure(0.5)).choose() > 0
    policy = DraftLengthPolicy(costs(), MOST, None, sure(0.5), timing)
    chosen = []
    for _ in range(3 * PROBE_EVERY):
        k = policy.choose()
        chosen.append(k)
        if k:
            policy.update(None, k, 0)
    assert "of plain decoding" in policy.parked_reason
    assert set(chosen) == {0, 1} and chosen.count(1) < 4 and chosen[0] == 0


def test_batched_and_uncosted_rounds_correct_no_timing():
    policy = DraftLengthPolicy(None, MOST, None, sure(0.5))
    policy.add_time(1, 0, 5.0)
    crowded = DraftLengthPolicy(costs().with_batch_rows(3), MOST, None, sure(0.5))
    crowded.add_time(2, 1, 50.0)
    assert policy.timing.rounds == crowded.timing.rounds == {True: 0, False: 0}
