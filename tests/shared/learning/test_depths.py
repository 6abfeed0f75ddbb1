"""Rates by depth against drafting at every place in a plain loop: a deeper token counts only where all before it stood."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from specl.shared.learning.depths import DepthCounts, DepthScores
from specl.shared.learning.examples import Example, collate
from specl.shared.learning.learner import Learner, acceptance_by_depth, agreement, score_rows
from tests.conftest import tiny_model


def test_deeper_token_counts_only_after_accepted_ones():
    rng = np.random.default_rng(4)
    hits = [np.where(rng.random((6, 40)) < rate, 1.0, 0.0) for rate in (0.7, 0.6, 0.5)]
    for matrix in hits:
        matrix[:, :9] = np.nan  # the prompt
        matrix[2, 30:] = np.nan  # a shorter text
    stood, tried = [0, 0, 0], [0, 0, 0]
    for row in range(6):
        for place in range(9, 40):
            for depth in range(3):
                if place + depth >= 40 or np.isnan(hits[depth][row, place + depth]):
                    break
                tried[depth] += 1
                stood[depth] += hits[depth][row, place + depth]
                if not hits[depth][row, place + depth]:
                    break
    counts = DepthCounts(3)
    for rows in (slice(0, 2), slice(2, 6)):  # in two batches
        counts.add([DepthScores(matrix[rows], matrix[rows]) for matrix in hits])
    found = counts.rates()
    assert found.acceptance == pytest.approx([s / t for s, t in zip(stood, tried, strict=True)])
    assert found.agreement == pytest.approx([np.nanmean(matrix) for matrix in hits])


def test_unreached_depth_has_no_rate():
    counts = DepthCounts(3)
    counts.add([DepthScores(np.zeros((1, 5)), np.zeros((1, 5)))] * 3)
    assert counts.rates().acceptance == (0.0,) and counts.rates().agreement == (0.0, 0.0, 0.0)
    assert DepthCounts(2).rates().acceptance == ()


# ---------------------------------------------------------------------------------------------------- of a language model
def sampling(model, tokens):
    """Of one text [t] or several [n, t]: what follows each token."""
    logits = np.array(model.model(mx.array(np.atleast_2d(tokens).astype(np.int64)))).astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return p if np.ndim(tokens) == 2 else p[0]


def written(target, n, rows=24, greedy=True):
    """A text that the target wrote itself, with its whole distribution."""
    rng = np.random.default_rng(n)
    tokens = rng.integers(4, 97, 5).astype(np.uint32)
    for _ in range(rows):
        p = sampling(target, tokens)[-1]
        tokens = np.append(tokens, np.uint32(p.argmax() if greedy else rng.choice(97, p=p)))
    p = sampling(target, tokens)[4:-1]
    ids = np.tile(np.arange(97, dtype=np.uint32), (rows, 1))
    return Example(f"{n}", tokens, 5, ids, np.log(p).astype(np.float32), np.ones(rows, np.float32), None, greedy)


@pytest.fixture(scope="module")
def pair():
    """A target, and a draft that is it with a little noise: right about half of the time."""
    target, draft = tiny_model(seed=1), tiny_model(seed=1)
    for layer in draft.model.layers:
        up = layer.mlp.up_proj
        up.weight = up.weight + mx.random.normal(up.weight.shape, key=mx.random.key(5)) * 0.06
    return target, draft


def test_identical_draft_is_accepted_at_every_depth(pair):
    target, _ = pair
    for greedy in (True, False):
        score = agreement(Learner(target), [written(target, n, 8, greedy) for n in range(3)], 3)
        assert score.by_depth == pytest.approx((1, 1, 1), abs=1e-4)


def test_agreement_rates_are_those_of_drafting_everywhere(pair):
    target, draft = pair
    examples = [written(target, n) for n in range(4)]
    stood, tried = np.zeros(3), np.zeros(3)
    for example in examples:
        for place in range(5, len(example.tokens)):
            text = example.tokens[:place]
            for depth in range(min(3, len(example.tokens) - place)):
                token = sampling(draft, text)[-1].argmax()
                tried[depth] += 1
                stood[depth] += token == example.tokens[place + depth]
                if token != example.tokens[place + depth]:
                    break
                text = np.append(text, np.uint32(token))
    score = agreement(Learner(draft), examples, 3)
    assert score.by_depth == pytest.approx(stood / tried) and 0.2 < score.by_depth[0] < 0.9
    assert score.by_depth == acceptance_by_depth(Learner(draft), examples).acceptance
    alone = agreement(Learner(draft), examples)
    assert np.array_equal(alone.hits, score.hits) and np.array_equal(alone.positions, score.positions)
    assert alone.by_depth == score.by_depth[:1] and alone.value == pytest.approx(score.by_depth[0])


# ---------------------------------------------------------------------------------------------------- of sampled text
def test_sampled_texts_estimate_accepted_depth():
    """Two tokens of three letters, drafted and checked: exact by enumeration, estimated from texts that the target drew."""
    rng = np.random.default_rng(6)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.3, 0.6])
    second = np.array([0.9, 0.5, 0.1])  # overlap after each first letter: small where the first draft mostly falls
    kept = np.minimum(p, q)
    exact = (kept * second).sum() / kept.sum()
    drawn = rng.choice(3, 40_000, p=p)
    overlap = np.column_stack([np.full(40_000, kept.sum()), second[drawn]])
    stands = np.column_stack([np.minimum(1, q / p)[drawn], np.ones(40_000)])
    counts = DepthCounts(2)
    counts.add([DepthScores(overlap, stands)] * 2)
    first, then = counts.rates().acceptance
    assert then == pytest.approx(exact, abs=0.01) and abs(exact - second @ p) > 0.1  # every text alike would be far off
    assert first == pytest.approx(np.mean([*overlap[:, 0], *overlap[:, 1]]))


def test_mean_acceptance_of_drawn_tokens_is_the_overlap(pair):
    target, draft = pair
    text = written(target, 3, rows=1, greedy=False)
    p, q = np.exp(text.logprobs[0].astype(float)), sampling(draft, text.tokens)[4]
    texts = [replace(text, tokens=np.append(text.tokens[:5], np.uint32(token))) for token in range(97)]
    batch = collate(texts)
    (rows, pick), *_ = Learner(draft).outputs(batch, 1)
    score, stands = score_rows(Learner(draft), rows, batch, pick, np.ones(97, bool))
    assert stands == pytest.approx(np.minimum(1, q / p), rel=1e-3, abs=1e-6) and 0.1 < stands.min() < 0.9
    assert score == pytest.approx(np.full(97, np.minimum(p, q).sum()), rel=1e-4)
    assert (p * stands).sum() == pytest.approx(score[0], rel=1e-4)
    beyond = [
        replace(one, ids=one.ids[:, :40], logprobs=one.logprobs[:, :40]) for one in texts
    ]  # of the stored distribution
    batch = collate(beyond)
    _, stands = score_rows(Learner(draft), rows, batch, pick, np.ones(97, bool))
    assert (stands[:40] > 0).all() and (stands[40:] == 0).all()
