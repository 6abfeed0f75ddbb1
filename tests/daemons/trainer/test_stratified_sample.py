"""The choice of generations keeps what stratified_sample.py guarantees, on traffic made at random."""

import random
from collections import Counter

import pytest

from specl.daemons.trainer.stratified_sample import STRATA, fair_share, stratified_sample
from specl.shared.store import GenerationSummary


def row(n, conversation):
    return GenerationSummary(f"g{n}", conversation, 1000.0 - n, 0.1, 20, "t0")


def traffic(rng):
    """Newest first: single questions, chats and one that goes on for ever, in any mixture."""
    talks = [f"talk-{i}" for i in range(rng.randint(1, 60))]
    weights = [rng.choice([1, 1, 1, 5, 80]) for _ in talks]
    rows = rng.choices(talks, weights, k=rng.randint(1, 600))
    return [row(n, f"single-{n}" if rng.random() < 0.3 else talk) for n, talk in enumerate(rows)]


@pytest.fixture(params=range(40))
def case(request):
    rng = random.Random(request.param)
    rows = traffic(rng)
    return rows, rng.choice([1, 2, 7, len(rows) // 2 + 1, rng.randint(1, 700)])


def counts(rows):
    return Counter(item.conversation_id for item in rows)


def test_sample_is_full_ordered_and_without_repeats(case):
    rows, most = case
    chosen = stratified_sample(rows, most)
    assert len(chosen) == min(most, len(rows))
    assert chosen == [item for item in rows if item in set(chosen)]
    assert chosen == stratified_sample(rows, most)


def test_largest_conversation_is_as_small_as_possible(case):
    rows, most = case
    largest = max(counts(stratified_sample(rows, most)).values())
    if len(rows) > most:
        assert sum(min(count, largest - 1) for count in counts(rows).values()) < most


def test_fair_share_is_the_least_that_fills(case):
    rows, most = case
    every = list(counts(rows).values())
    by_trial = next(c for c in range(1, len(rows) + 1) if c == max(every) or sum(min(n, c) for n in every) >= most)
    assert fair_share(every, most) == by_trial


@pytest.mark.parametrize(
    ("total", "most"), [(1000, 100), (1000, 333), (1000, 999), (50, 20), (12, 11), (101, 100), (3, 2)]
)
def test_newest_stay_and_older_are_thinned_evenly(total, most):
    rows = [row(n, f"single-{n}") for n in range(total)]
    chosen = {int(item.id[1:]) for item in stratified_sample(rows, most)}
    newest = most - most // 2
    assert set(range(newest)) <= chosen
    older = total - newest
    for stretch in range(STRATA):
        start, end = (newest + older * i // STRATA for i in (stretch, stretch + 1))
        expected = (end - start) * (most // 2) / older
        assert abs(len(chosen & set(range(start, end))) - expected) < 1


def test_long_conversation_gives_up_old_turns_first():
    rows = [row(n, "endless" if n % 2 else f"single-{n}") for n in range(400)]
    endless = list(range(1, 400, 2))
    chosen = {int(item.id[1:]) for item in stratified_sample(rows, 240)}
    sampled = [n for n in endless if n in chosen]
    assert len(sampled) == 40 and all(n in chosen for n in range(0, 400, 2))
    assert sampled[:20] == endless[:20] and sampled[-1] > 350


def test_few_new_rows_change_little():
    rows = [row(n, f"talk-{n % 700}") for n in range(20, 3020)]
    before = {item.id for item in stratified_sample(rows, 1000)}
    after = {item.id for item in stratified_sample([row(n, f"single-{n}") for n in range(20)] + rows, 1000)}
    assert len(before & after) > 0.85 * len(before | after)
