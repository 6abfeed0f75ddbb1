"""Laws and acceptance rules against slow references."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specl.shared.engine.acceptance import coupled, greedy, rejection, residual
from specl.shared.engine.sampling import (
    Distribution,
    distribution,
    log_sum_exp,
    point_mass,
    position_noise,
    top_indices,
)
from specl.shared.engine.text_output import TextStream
from specl.shared.sampling_params import SamplingParams

rows = st.integers(2, 700).flatmap(
    lambda n: st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(0, 3, n).astype(np.float32))
)
laws = (
    st.integers(2, 8)
    .flatmap(lambda n: st.lists(st.floats(0.01, 1), min_size=n, max_size=n))
    .map(lambda w: Distribution(np.arange(len(w)), np.array(w) / sum(w)))
)


@given(rows, st.integers(1, 40))
def test_top_indices_are_the_largest_in_order(row, k):
    assert np.array_equal(row[top_indices(row, k)], np.sort(row)[::-1][: min(k, len(row))])


@given(rows, st.floats(0.05, 1), st.integers(0, 20), st.floats(0, 0.5), st.floats(0.2, 2))
def test_filters_keep_what_a_naive_reference_keeps(row, top_p, top_k, min_p, temperature):
    p = np.exp(row.astype(np.float64) - log_sum_exp(row))
    order = np.argsort(-row, kind="stable")
    keep = set(order.tolist())
    if top_p < 1:
        keep &= set(order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1].tolist())
    if top_k:
        keep &= set(order[:top_k].tolist())
    if min_p > 0:
        keep &= {i for i in keep if p[i] >= min_p * p.max() * (1 - 1e-6)}
    found = distribution(row, SamplingParams(temperature, top_p, top_k, min_p))
    assert abs(found.p.sum() - 1) < 1e-9
    assert abs(len(set(found.ids.tolist()) ^ keep)) <= 1  # the last of a nucleus may tie within rounding


@given(laws, laws)
def test_rejection_rule_emits_exactly_the_target_distribution(target, draft):
    """One draft token: P(out = x) = min(p, q) + (1 - sum min(p, q)) * residual(x) = p."""
    size = max(len(target.ids), len(draft.ids))
    p, q = np.zeros(size), np.zeros(size)
    p[target.ids], q[draft.ids] = target.p, draft.p
    accepted = np.minimum(p, q)
    left = residual(target, draft)
    r = np.zeros(size)
    r[left.ids] = left.p
    assert abs(left.p.sum() - 1) < 1e-9
    assert np.allclose(accepted + (1 - accepted.sum()) * r, p, atol=1e-9)


@given(laws, st.integers(0, 7))
def test_sampled_point_mass_keeps_its_target_probability(target, token):
    for uniform, stands in ((target.of(token) * 0.999, True), (target.of(token) * 1.001 + 1e-12, False)):
        draws = iter([uniform, 0.5])
        verdict = rejection(lambda i: target, [token], [point_mass(token)], lambda d=draws: next(d))
        assert (verdict.accepted == 1) == (stands and target.of(token) > 0)
        assert verdict.accepted or verdict.token != token or target.of(token) == 1


def test_sampled_rows_after_a_rejection_are_not_read():
    seen = []

    def row(i):
        seen.append(i)
        return point_mass(4)

    assert rejection(row, [4, 9, 4], [point_mass(t) for t in (4, 9, 4)], lambda: 0.5).accepted == 1
    assert seen == [0, 1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 5))
def test_greedy_accepts_the_common_beginning(target, k):
    drafts = target[: min(k, len(target) - 1)]
    assert greedy(target, drafts).accepted == len(drafts)
    assert greedy(target, [t + 10 for t in drafts]).accepted == 0


@settings(max_examples=30)
@given(st.integers(0, 2**40), st.integers(0, 5000))
def test_noise_belongs_to_seed_and_position(seed, position):
    assert np.array_equal(position_noise(seed, position, 50), position_noise(seed, position, 50))
    assert not np.array_equal(position_noise(seed, position, 50), position_noise(seed, position + 1, 50))
    sampling = Distribution(np.arange(50), np.full(50, 0.02))
    token = coupled(lambda i: sampling, [], lambda i: position_noise(seed, position + i, 50)).token
    assert coupled(lambda i: sampling, [token], lambda i: position_noise(seed, position + i, 50)).accepted == 1


class Bytes:
    """A tokenizer of single bytes: every character beyond ASCII is split."""

    def decode(self, tokens, **more):
        return bytes(tokens).decode("utf-8", "replace")


@given(st.text(max_size=30), st.sampled_from([(), ("ab",), ("\n\n", "é")]))
def test_stream_shows_no_partial_character_or_stop(text, stop):
    stream, data = TextStream(Bytes(), stop), text.encode()
    pieces = [stream.add(byte) for byte in data] + [stream.finish()]
    cut = min((text.find(s) for s in stop if s in text), default=len(text))
    assert "".join(pieces) == stream.text == text[:cut]
    assert stream.stopped == (cut < len(text) or any(s in text for s in stop))


def test_unfinished_character_becomes_a_replacement():
    stream = TextStream(Bytes())
    assert stream.add(ord("a")) == "a"
    assert stream.add("é".encode()[0]) == ""
    assert stream.finish() == "\ufffd"
