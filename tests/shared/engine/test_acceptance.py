"""The acceptance rules, exactly: the output's distribution is summed up, not sampled."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from specl.shared.engine.acceptance import (
    VerifyResult,
    block,
    greedy,
    gumbel_coupled,
    prefix_stop_probability,
    prefix_weights,
    rejection,
    residual,
)
from specl.shared.engine.sampling import Distribution, point_mass, position_noise

SIZE = 12


@st.composite
def distributions(draw):
    """Sparse distributions over SIZE tokens; filters leave some tokens out."""
    ids = sorted(draw(st.sets(st.integers(0, SIZE - 1), min_size=1)))
    weights = np.array(draw(st.lists(st.floats(1e-3, 1.0), min_size=len(ids), max_size=len(ids))))
    return Distribution(np.array(ids), weights / weights.sum())


def dense(sampling):
    full = np.zeros(SIZE)
    full[sampling.ids] = sampling.p
    return full


@given(distributions(), distributions())
def test_residual_is_the_normed_positive_difference(target_p, draft_p):
    left = np.maximum(dense(target_p) - dense(draft_p), 0)
    result = dense(residual(target_p, draft_p))
    assert result.sum() == pytest.approx(1)
    if left.sum() > 1e-12:
        assert np.allclose(result, left / left.sum())
        assert not result[dense(draft_p) >= dense(target_p)].any()


@given(distributions())
def test_empty_residual_is_the_target(sampling):
    assert np.allclose(dense(residual(sampling, sampling)), dense(sampling))


@given(distributions(), distributions())
def test_single_draft_keeps_the_target_distribution(target_p, draft_p):
    """P(out) = sum over drafts x of q(x) * (P(accept x) [out = x] + P(reject x) * residual(out)), P(accept) measured."""
    p, q = dense(target_p), dense(draft_p)
    out = np.zeros(SIZE)
    left = dense(residual(target_p, draft_p))
    for token in draft_p.ids:
        accept = min(1.0, p[token] / q[token])
        # the rule itself, probed on both sides of the boundary that this says
        for uniform, stands in ((accept * 0.999, True), (accept * 1.001 + 1e-12, False)):
            if 0 <= uniform < 1 and not (stands and accept == 0):
                result = rejection(lambda i: target_p, [int(token)], [draft_p], lambda u=uniform: u)
                assert result.accepted == stands
        out[token] += q[token] * accept
        out += q[token] * (1 - accept) * left
    assert np.allclose(out, p, atol=1e-9)


SMALL = 3


@st.composite
def trees(draw):
    """Distributions over three tokens after every text of up to three tokens: the target's and a
    draft's, and the texts after which the draft stops.
    """
    paths = [path for length in range(4) for path in itertools.product(range(SMALL), repeat=length)]

    def sampling():
        weights = np.array(draw(st.lists(st.sampled_from([0.0, 0.01, 0.2, 1.0]), min_size=SMALL, max_size=SMALL)))
        weights = weights if weights.sum() else np.ones(SMALL)
        ids = np.flatnonzero(weights)
        return Distribution(ids, weights[ids] / weights.sum())

    stops = draw(st.sets(st.sampled_from(paths[1:])))
    return {path: sampling() for path in paths}, {path: sampling() for path in paths}, stops


def drafted(draft, stops, path=(), chance=1.0):
    """Every text that may be drafted, and how likely it is."""
    if path and (len(path) == 3 or path in stops):
        yield path, chance
        return
    for token, q in zip(draft[path].ids.tolist(), draft[path].p.tolist(), strict=True):
        yield from drafted(draft, stops, (*path, token), chance * q)


@settings(deadline=None, max_examples=60)
@given(trees())
def test_block_verification_keeps_the_target_distribution(tree):
    """The distribution of the first two tokens, summed over every draft, every run that may be
    accepted and every token after it; where the rule gave only one, the target goes on.
    """
    target, draft, stops = tree
    out = np.zeros((SMALL, SMALL))
    for path, chance in drafted(draft, stops):
        draft_probs = [draft[path[:i]] for i in range(len(path))]
        weights = prefix_weights(lambda i, path=path: target[path[:i]], path, draft_probs)
        for i in range(len(path), -1, -1):
            target_p, next_p = target[path[:i]], draft_probs[i] if i < len(path) else None
            stop = prefix_stop_probability(weights[i], target_p, next_p) if i else 1.0
            follows = target_p if next_p is None else residual(target_p, next_p, weights[i])
            for token, p in zip(follows.ids.tolist(), follows.p.tolist(), strict=True):
                text = (*path[:i], token)
                if len(text) >= 2:
                    out[text[0], text[1]] += chance * stop * p
                else:
                    out[text[0], target[text].ids] += chance * stop * p * target[text].p
            chance *= 1 - stop
    expected = np.zeros((SMALL, SMALL))
    for token, p in zip(target[()].ids.tolist(), target[()].p.tolist(), strict=True):
        expected[token, target[(token,)].ids] = p * target[(token,)].p
    assert np.allclose(out, expected, atol=1e-9)


@given(distributions(), distributions(), st.integers(0, 99))
def test_a_run_of_one_is_judged_as_alone(target_p, draft_p, seed):
    rng = np.random.default_rng(seed)
    token, uniforms = int(rng.choice(draft_p.ids, p=draft_p.p)), rng.random(2)
    assume(abs(uniforms[0] * draft_p.of(token) - target_p.of(token)) > 1e-12)
    results = [rule(lambda i: target_p, [token], [draft_p], iter(uniforms).__next__) for rule in (block, rejection)]
    assert results[0] == results[1]


@given(distributions(), st.integers(0, SIZE - 1))
def test_point_mass_is_accepted_with_target_probability(target_p, token):
    accept = target_p.of(token)
    left = dense(residual(target_p, point_mass(token)))
    out = (1 - accept) * left
    out[token] += accept
    assert np.allclose(out, dense(target_p), atol=1e-9)


@given(distributions(), st.floats(0, 1, exclude_max=True))
def test_a_draw_is_the_quantile(sampling, uniform):
    token = sampling.draw(uniform)
    index = sampling.ids.tolist().index(token)
    below = sampling.p[:index].sum()
    assert below - 1e-9 <= uniform <= below + sampling.p[index] + 1e-9


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_greedy_accepts_the_common_beginning_and_adds_one(drafts, argmax):
    result = greedy(argmax, drafts)
    common = 0
    while common < len(drafts) and drafts[common] == argmax[common]:
        common += 1
    assert result == VerifyResult(common, argmax[common])


def test_rows_after_the_first_rejection_are_not_read():
    asked = []

    def target(i):
        asked.append(i)
        return point_mass(5)

    assert rejection(target, [5, 1, 5, 5], [point_mass(t) for t in (5, 1, 5, 5)], lambda: 0.5) == VerifyResult(1, 5)
    assert asked == [0, 1]
    asked.clear()
    assert gumbel_coupled(target, [5, 1, 5, 5], lambda i: np.zeros(SIZE)) == VerifyResult(1, 5)
    assert asked == [0, 1]


@given(distributions(), st.lists(st.integers(0, SIZE - 1), max_size=4), st.integers(0, 1000))
def test_coupled_tokens_do_not_depend_on_the_drafts(target_p, drafts, seed):
    def noise(i):
        return position_noise(seed, i, SIZE)

    result = gumbel_coupled(lambda i: target_p, drafts, noise)
    emitted = [*drafts[: result.accepted], result.token]
    assert emitted == [target_p.argmax_with(noise(i)) for i in range(len(emitted))]


def test_missing_draft_probs_are_an_error():
    with pytest.raises(ValueError, match="shorter"):
        rejection(lambda i: point_mass(1), [1, 1], [point_mass(1)], lambda: 0.1)
