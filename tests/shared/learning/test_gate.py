"""The gate by itself: a clear gain passes, noise does not, and nothing outweighs a wrong lineage or a fall elsewhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specl.shared.engine.costs import Costs
from specl.shared.learning.gate import Agreement, Lineage, expected_rate, judge, lineage_problems, paired_interval


def scores(hits, positions=40):
    hits = np.asarray(hits, float)
    return Agreement(hits, np.full(len(hits), positions), ())


def drawn(share, count=60, seed=0):
    return scores(np.random.default_rng(seed).binomial(40, share, count))


def test_clear_gain_is_promoted_with_its_numbers():
    before = drawn(0.5)
    after = scores(before.hits + 4)
    verdict = judge(before, after, 30)
    assert verdict.verdict == "promoted" and verdict.generations == 60
    assert verdict.gain == pytest.approx(0.1) and verdict.low == pytest.approx(0.1)
    assert {"low", "high", "before", "after", "generations"} <= verdict.numbers().keys()


def test_a_loss_is_rejected_and_no_change_too():
    before = drawn(0.5)
    assert judge(before, scores(before.hits - 2), 30).verdict == "rejected"
    assert judge(before, before, 30).verdict == "rejected"


def test_few_generations_give_no_verdict():
    before = drawn(0.5, count=29)
    after = scores(before.hits + 4)
    verdict = judge(before, after, 30)
    assert verdict.verdict == "no_verdict" and "29 generations" in verdict.reason and "30" in verdict.reason
    assert judge(before, after, 29).verdict == "promoted"


def test_one_lucky_generation_does_not_promote():
    before = drawn(0.5)
    hits = before.hits.copy()
    hits[0] = 40
    assert judge(before, scores(hits), 30).verdict == "rejected"


@pytest.mark.parametrize(("fall", "verdict"), [(0.0049, "promoted"), (0.0051, "rejected"), (-0.1, "promoted")])
def test_general_text_may_fall_half_a_point(fall, verdict):
    before = drawn(0.5)
    general = scores([50_000.0], 100_000), scores([50_000.0 - fall * 100_000], 100_000)
    assert judge(before, scores(before.hits + 4), 30, general).verdict == verdict


@pytest.mark.parametrize(
    ("before_general", "after_general", "verdict"),
    [(0.482, 0.4801, "promoted"), (0.482, 0.4799, "rejected"), (0.450, 0.455, "promoted"), (0.450, 0.449, "rejected")],
)
def test_chain_of_adapters_may_not_erode_general_text(before_general, after_general, verdict):
    """The draft alone has 0.5 there. What is far below that already may only get better."""
    before = drawn(0.5)
    general = scores([1e5 * before_general], 100_000), scores([1e5 * after_general], 100_000)
    told = judge(before, scores(before.hits + 4), 30, general, 0.5)
    assert told.verdict == verdict and told.only_spoils == (verdict == "rejected")
    assert ("without any adapter" in told.reason) == (verdict == "rejected")


def test_only_a_proven_regressing_gain_is_interpolated():
    before, flat = drawn(0.5), scores([50.0], 100)
    spoiled, gained = (flat, scores([40.0], 100)), scores(before.hits + 4)
    assert judge(before, gained, 30, spoiled).only_spoils
    assert not judge(before, gained, 30, (flat, flat)).only_spoils  # promoted
    assert not judge(before, before, 30, spoiled).only_spoils  # nothing was learned
    assert not judge(before, gained, 30).only_spoils
    half = judge(before, gained, 30, spoiled).of(0.5)
    assert half.reason.endswith("0.5 of the way") and half.numbers()["share"] == 0.5


@pytest.mark.parametrize("field", ["base", "tokenizer", "parent"])
def test_other_base_tokenizer_or_parent_is_refused(field):
    current = Lineage("a", "b", "000001")
    other = Lineage(**({name: getattr(current, name) for name in Lineage.__slots__} | {field: "x"}))
    problems = lineage_problems(other, current)
    assert len(problems) == 1 and lineage_problems(current, current) == []
    before = drawn(0.5)
    assert judge(before, scores(before.hits + 4), 30, problems=problems).verdict == "rejected"


def test_scores_of_different_positions_are_refused():
    with pytest.raises(ValueError, match="same positions"):
        paired_interval(drawn(0.5), scores(np.ones(60), 41))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=50))
def test_interval_lies_within_extremes_and_is_deterministic(rows):
    positions = np.array([n for n, _, _ in rows])
    before = Agreement(positions * np.array([a for _, a, _ in rows]), positions)
    after = Agreement(positions * np.array([b for _, _, b in rows]), positions)
    low, high = paired_interval(before, after)
    gains = (after.hits - before.hits) / positions
    assert gains.min() - 1e-9 <= low <= high <= gains.max() + 1e-9
    assert (low, high) == paired_interval(before, after)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_swapping_candidate_and_current_mirrors_the_interval(seed):
    a, b = drawn(0.5, seed=seed), drawn(0.55, seed=seed + 1)
    low, high = paired_interval(a, b)
    other = paired_interval(b, a)
    assert low == pytest.approx(-other[1]) and high == pytest.approx(-other[0])


def test_noise_is_seldom_promoted():
    rng = np.random.default_rng(3)
    promoted = 0
    for _ in range(200):
        share = rng.beta(4, 4, 60)
        promoted += judge(scores(rng.binomial(40, share)), scores(rng.binomial(40, share)), 30).verdict == "promoted"
    # one side of a 95% interval: 2.5% expected, 5 of 200
    assert promoted <= 14


def test_the_cost_model_promises_more_for_more_agreement():
    costs = Costs({1: 1.0, 2: 1.05, 4: 1.2, 8: 1.4}, {1: 0.1, 2: 0.2, 4: 0.4})
    rates = [expected_rate(costs, (share, share), 4) for share in (0.05, 0.5, 0.9)]
    assert rates == sorted(rates) and rates[0] == pytest.approx(1.0) and rates[2] > 2
    assert expected_rate(None, (0.5,), 4) is None
