"""Sampling values of a request over the settings' defaults."""

import pytest

from specl.shared.sampling_params import SEED_LIMIT, merge_sampling
from specl.shared.settings.schema import Settings


def seed_of(seed):
    """The seed in force for a requested one."""
    return merge_sampling(Settings().speculative, {"seed": seed}).validate().seed


def test_seed_minus_one_is_random():
    assert seed_of(-1) is None and seed_of(None) is None and seed_of(0) == 0


@pytest.mark.parametrize("seed", [-2, -SEED_LIMIT, SEED_LIMIT - 1])
def test_every_other_seed_is_in_range(seed):
    assert 0 <= seed_of(seed) < SEED_LIMIT and seed_of(seed) == seed_of(seed)
