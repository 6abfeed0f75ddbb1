"""The collapse check by itself: a broken adapter goes within twenty requests, a working one stays, however hard the work gets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specl.daemons.inference.collapse import ENOUGH_TOKENS, FLOOR, PROBE_EVERY, CollapseCheck, binomial_tail
from specl.shared.learning.judge import Agreement, reevaluate
from specl.shared.messaging.codes import RunVerdict

ANSWER_TOKENS = 24


def serve(rng, acceptance, probes=ANSWER_TOKENS // PROBE_EVERY, requests=200):
    """A check of an adapter that drafts `probes` first tokens a request, and why it ended."""
    check = CollapseCheck("000002")
    while check.requests < requests and not check.done:
        check.add(probes, int(rng.binomial(probes, acceptance)))
        if reason := check.collapse():
            return check, reason
    return check, ""


def stopped(acceptance, times=200, **more):
    rng = np.random.default_rng(0)
    return sum(bool(serve(rng, acceptance, **more)[1]) for _ in range(times)) / times


@pytest.mark.parametrize("acceptance", [0.0, 0.01, 0.02])
def test_broken_adapter_goes_within_twenty_requests(acceptance):
    assert stopped(acceptance, requests=20) >= 0.97


@pytest.mark.parametrize(("acceptance", "most"), [(0.2, 0.01), (0.3, 0.0), (0.6, 0.0)])
def test_working_adapter_stays(acceptance, most):
    assert stopped(acceptance) <= most


def test_reason_has_the_numbers():
    check, reason = serve(np.random.default_rng(0), 0.0)
    assert f"0.000 of {check.tested} first drafted tokens in {check.requests} requests" in reason


def test_few_drafts_decide_nothing():
    check = CollapseCheck("000001")
    for _ in range(30):
        check.add(1, 0)
        assert check.collapse() == "" or check.tested > 30
    for _ in range(100):
        check.add(0, 0)
    assert not check.done and check.collapse() == ""


def test_some_rounds_must_draft_until_enough():
    check = CollapseCheck("000001")
    assert sum(check.must_draft() for _ in range(80)) == 80 // PROBE_EVERY
    check.add(ENOUGH_TOKENS, 100)
    assert check.done and not any(check.must_draft() for _ in range(80))


@given(st.integers(1, 200), st.floats(0.01, 0.99))
def test_binomial_tail_is_a_distribution(trials, p):
    tails = [binomial_tail(successes, trials, p) for successes in range(trials + 1)]
    assert tails == sorted(tails) and tails[-1] == pytest.approx(1) and tails[0] == pytest.approx((1 - p) ** trials)


# ------------------------------------------------------------------------------------------------ work that changes
def on_the_same_answers(rng, before, after, count=8, positions=40):
    """Teacher-forced scores of two adapters; answers of one kind differ among themselves."""
    shift = rng.normal(0, 0.05, count)
    sides = [rng.binomial(positions, np.clip(share + shift, 0, 1)).astype(float) for share in (before, after)]
    return tuple(Agreement(side, np.full(count, positions)) for side in sides)


def test_harder_work_alone_rolls_nothing_back():
    """The draft had 0.64 live on one kind of record; then comes another kind, on which the new adapter has 0.32 and the old 0.3."""
    rng = np.random.default_rng(4)
    for _ in range(100):
        _, reason = serve(rng, 0.32)
        assert not reason
    decisions = [
        reevaluate(*on_the_same_answers(rng, 0.30, 0.37), minimum=8, was_rolled_back=False).verdict for _ in range(100)
    ]
    assert decisions.count(RunVerdict.ROLLED_BACK) <= 1


def test_better_adapter_stopped_by_mistake_comes_back():
    """Work so hard that hardly a token is accepted: live counts stop the new adapter, which is the better one on the same answers."""
    rng, back = np.random.default_rng(6), 0
    for _ in range(100):
        _, reason = serve(rng, FLOOR / 5)
        assert reason
        pair = on_the_same_answers(rng, 0.02, 0.12)
        back += reevaluate(*pair, minimum=8, was_rolled_back=True).verdict == RunVerdict.REINSTATED
    assert back >= 90
