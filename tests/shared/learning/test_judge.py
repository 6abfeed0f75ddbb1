"""The judge by itself: a clear gain passes, noise does not, and nothing outweighs a wrong lineage or a regression."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specl.shared.engine.costs import Costs
from specl.shared.learning.judge import (
    Agreement,
    Lineage,
    Regression,
    expected_rate,
    judge,
    lineage_problems,
    paired_interval,
    reevaluate,
)
from specl.shared.messaging.codes import RunVerdict


def scores(hits, positions=40):
    hits = np.asarray(hits, float)
    return Agreement(hits, np.full(len(hits), positions), ())


def drawn(share, count=60, seed=0):
    return scores(np.random.default_rng(seed).binomial(40, share, count))


def test_clear_gain_is_promoted_with_its_numbers():
    before = drawn(0.5)
    verdict = judge(before, scores(before.hits + 4), 30)
    assert verdict.verdict == RunVerdict.PROMOTED and verdict.comparison.generations == 60
    assert verdict.comparison.gain == pytest.approx(0.1) and verdict.comparison.low == pytest.approx(0.1)
    assert {"low", "high", "before", "after", "generations", "gain"} <= verdict.numbers().keys()


@pytest.mark.parametrize("change", [-2, 0])
def test_no_gain_is_rejected(change):
    before = drawn(0.5)
    assert judge(before, scores(before.hits + change), 30).verdict == RunVerdict.REJECTED


def test_few_generations_give_no_verdict():
    before = drawn(0.5, count=29)
    after = scores(before.hits + 4)
    verdict = judge(before, after, 30)
    assert verdict.verdict == RunVerdict.NO_VERDICT and "29 generations" in verdict.reason and "30" in verdict.reason
    assert judge(before, after, 29).verdict == RunVerdict.PROMOTED


def test_one_lucky_generation_does_not_promote():
    before = drawn(0.5)
    hits = before.hits.copy()
    hits[0] = 40
    assert judge(before, scores(hits), 30).verdict == RunVerdict.REJECTED


@pytest.mark.parametrize(("fall", "verdict"), [(0.0049, "promoted"), (0.0051, "rejected"), (-0.1, "promoted")])
def test_general_text_may_fall_by_half_a_point(fall, verdict):
    before = drawn(0.5)
    assert judge(before, scores(before.hits + 4), 30, Regression(0.5, 0.5 - fall)).verdict == verdict


@pytest.mark.parametrize(
    ("before_general", "after_general", "verdict"),
    [(0.482, 0.4801, "promoted"), (0.482, 0.4799, "rejected"), (0.450, 0.455, "promoted"), (0.450, 0.449, "rejected")],
)
def test_drift_of_all_adapters_together_is_bounded(before_general, after_general, verdict):
    """The draft alone has 0.5 there. What is far below that already may only get better."""
    before = drawn(0.5)
    decision = judge(before, scores(before.hits + 4), 30, Regression(before_general, after_general, 0.5))
    assert decision.verdict == verdict and decision.fails_only_regression == (verdict == "rejected")
    assert ("without any adapter" in decision.reason) == (verdict == "rejected")


def test_proven_gain_may_fail_only_on_regression():
    before, gained = drawn(0.5), scores(drawn(0.5).hits + 4)
    regressed = Regression(0.5, 0.4)
    assert judge(before, gained, 30, regressed).fails_only_regression
    assert not judge(before, gained, 30, Regression(0.5, 0.5)).fails_only_regression  # promoted
    assert not judge(before, before, 30, regressed).fails_only_regression  # nothing was learned
    assert not judge(before, gained, 30).fails_only_regression
    half = judge(before, gained, 30, regressed).at_alpha(0.5)
    assert half.reason.endswith("alpha 0.5") and half.numbers()["interpolation_alpha"] == 0.5


@pytest.mark.parametrize("field", ["base", "tokenizer", "parent"])
def test_another_lineage_is_refused_whatever_it_scores(field):
    current = Lineage("a", "b", "000001")
    other = Lineage(**({name: getattr(current, name) for name in Lineage.__slots__} | {field: "x"}))
    problems = lineage_problems(other, current)
    assert len(problems) == 1 and lineage_problems(current, current) == []
    before = drawn(0.5)
    assert judge(before, scores(before.hits + 4), 30, problems=problems).verdict == RunVerdict.REJECTED


def test_scores_of_different_positions_are_refused():
    with pytest.raises(ValueError, match="same positions"):
        paired_interval(drawn(0.5), scores(np.ones(60), 41))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=50))
def test_interval_lies_within_extremes_and_is_reproducible(rows):
    positions = np.array([n for n, _, _ in rows])
    before = Agreement(positions * np.array([a for _, a, _ in rows]), positions)
    after = Agreement(positions * np.array([b for _, _, b in rows]), positions)
    low, high = paired_interval(before, after)
    gains = (after.hits - before.hits) / positions
    assert gains.min() - 1e-9 <= low <= high <= gains.max() + 1e-9
    assert (low, high) == paired_interval(before, after)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_swapping_both_sides_mirrors_the_interval(seed):
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


# ------------------------------------------------------------------------------------------------ the second decision
def same_answers(rng, count, before, after):
    """Scores of two states on the same answers; answers differ much, states on one answer less."""
    shift = rng.normal(0, 0.1, count)
    return tuple(scores(rng.binomial(40, np.clip(share + shift, 0, 1))) for share in (before, after))


@pytest.mark.parametrize(
    ("before", "after", "was_rolled_back", "verdict"),
    [
        (0.3, 0.6, False, RunVerdict.KEPT),
        (0.6, 0.3, False, RunVerdict.ROLLED_BACK),
        (0.3, 0.6, True, RunVerdict.REINSTATED),
        (0.6, 0.3, True, RunVerdict.CONFIRMED),
        (0.5, 0.5, False, RunVerdict.KEPT),
        (0.5, 0.5, True, RunVerdict.CONFIRMED),
    ],
)
def test_reevaluation_changes_only_what_is_proven(before, after, was_rolled_back, verdict):
    pair = same_answers(np.random.default_rng(5), 20, before, after)
    decision = reevaluate(*pair, minimum=8, was_rolled_back=was_rolled_back)
    assert decision.verdict == verdict and "answers since its promotion" in decision.reason


def test_reevaluation_needs_its_minimum_of_answers():
    pair = same_answers(np.random.default_rng(0), 7, 0.8, 0.1)
    assert reevaluate(*pair, minimum=8, was_rolled_back=False).verdict == RunVerdict.NO_VERDICT


@pytest.mark.parametrize(("answers", "most"), [(8, 30), (40, 20)])
def test_equal_adapters_are_seldom_rolled_back(answers, most):
    rng = np.random.default_rng(11)
    rolled_back = 0
    for _ in range(300):
        pair = same_answers(rng, answers, 0.5, 0.5)
        rolled_back += reevaluate(*pair, minimum=8, was_rolled_back=False).verdict == RunVerdict.ROLLED_BACK
    # 2.5% expected of many answers; the bootstrap of eight is too narrow
    assert rolled_back <= most


def test_cost_model_expects_more_of_more_agreement():
    costs = Costs({1: 1.0, 2: 1.05, 4: 1.2, 8: 1.4}, {1: 0.1, 2: 0.2, 4: 0.4})
    rates = [expected_rate(costs, (share, share), 4) for share in (0.05, 0.5, 0.9)]
    assert rates == sorted(rates) and rates[0] == pytest.approx(1.0) and rates[2] > 2
    assert expected_rate(None, (0.5,), 4) is None
