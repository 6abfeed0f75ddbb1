"""Filters, top-k and position noise against slow references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specl.shared.engine.acceptance import gumbel_coupled
from specl.shared.engine.sampling import Distribution, distribution, log_sum_exp, position_noise, top_indices
from specl.shared.sampling_params import SamplingParams

rows = st.integers(2, 700).flatmap(
    lambda n: st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(0, 3, n).astype(np.float32))
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
    result = distribution(row, SamplingParams(temperature, top_p, top_k, min_p))
    assert abs(result.p.sum() - 1) < 1e-9
    assert abs(len(set(result.ids.tolist()) ^ keep)) <= 1  # the last of a nucleus may tie within rounding


@settings(max_examples=30)
@given(st.integers(0, 2**40), st.integers(0, 5000))
def test_noise_belongs_to_seed_and_position(seed, position):
    assert np.array_equal(position_noise(seed, position, 50), position_noise(seed, position, 50))
    assert not np.array_equal(position_noise(seed, position, 50), position_noise(seed, position + 1, 50))
    sampling = Distribution(np.arange(50), np.full(50, 0.02))
    token = gumbel_coupled(lambda i: sampling, [], lambda i: position_noise(seed, position + i, 50)).token
    assert gumbel_coupled(lambda i: sampling, [token], lambda i: position_noise(seed, position + i, 50)).accepted == 1


@pytest.mark.parametrize("temperature", [1e-6, 1e-100, 1e-289, 1e-291, 1e-307, 5e-324])
def test_tiny_temperatures_are_greedy(temperature):
    logits = np.array([3.0, 9.5, -40.0, 9.0, 0.0], np.float32)
    drawn = distribution(logits, SamplingParams(temperature=temperature))
    assert drawn.of(1) == 1.0 and drawn.draw(0.999) == 1
    assert drawn.argmax_with(position_noise(7, 0, len(logits))) == 1
    ties = distribution(np.array([9.5, 1.0, 9.5], np.float32), SamplingParams(temperature=temperature))
    assert ties.p.tolist() == [0.5, 0.0, 0.5]
