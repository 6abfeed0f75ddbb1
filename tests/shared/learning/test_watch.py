"""The watch by itself: it ends, a bad adapter goes within twenty requests, an equal one almost never does."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specl.shared.learning.live_check import ENOUGH_TOKENS, EVERY, MOST_REQUESTS, Depths, Watch


def watch(share=0.6, tokens=400):
    return Watch("000002", "000001", Depths([tokens], [tokens * share]))


def test_a_bad_adapter_disappoints_within_twenty_requests():
    observed = watch(0.6)
    rng = np.random.default_rng(0)
    while not (observed.over or observed.disappointment()):
        observed.add([15], [int(rng.binomial(15, 0.2))])
    assert observed.requests <= MOST_REQUESTS and "000" not in observed.disappointment()
    assert "0.600" in observed.disappointment()


def test_a_better_one_stays():
    observed = watch(0.4)
    for _ in range(MOST_REQUESTS):
        observed.add([15], [10])
        assert observed.disappointment() == ""
    assert observed.over


def test_an_equal_one_is_rolled_back_seldom():
    rng, gone = np.random.default_rng(1), 0
    for _ in range(300):
        observed = watch(0.5)
        while not observed.over and not observed.disappointment():
            observed.add([12], [int(rng.binomial(12, 0.5))])
        gone += bool(observed.disappointment())
    assert gone <= 18, "looked at after every request, and still under six in a hundred"


def test_deeper_drafts_are_compared_by_depth():
    baseline = Depths([400, 200], [320, 40])  # 0.8, then 0.2
    observed = Watch("2", "1", baseline)
    for _ in range(6):
        observed.add([20, 16], [16, 3])  # pooled 0.53 against a pooled baseline of 0.6: as good at each depth
    assert observed.disappointment() == ""


def test_without_a_baseline_nothing_is_claimed():
    observed = Watch("1", "", Depths())
    for _ in range(MOST_REQUESTS):
        observed.add([20], [0])
    assert observed.over and observed.disappointment() == ""


def test_one_round_in_eight_drafts_during_canary():
    observed = watch()
    assert sum(observed.forces() for _ in range(80)) == 80 // EVERY
    observed.add([ENOUGH_TOKENS], [100])
    assert not any(observed.forces() for _ in range(80)) and observed.over


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1)), min_size=1, max_size=25), st.floats(0, 1))
def test_shortfall_never_exceeds_the_baseline(rows, share):
    observed = watch(share)
    for tested, part in rows:
        observed.add([tested], [int(tested * part)])
    seen, expected, error = observed.shortfall()
    assert error >= 0 and 0 <= seen <= 1
    if observed.disappointment():
        assert seen < expected


def test_faded_keeps_shares():
    faded = Depths([1000, 500], [500, 100]).faded(300)
    assert sum(faded.tested) == 300 and faded.accepted[0] / faded.tested[0] == 0.5
