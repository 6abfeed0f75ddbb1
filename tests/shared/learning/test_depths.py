"""Conditional acceptance counted from hits, against drafting at every place in a plain loop."""

import numpy as np
import pytest

from specl.shared.learning import depths
from specl.shared.learning.examples import Example


def test_a_deeper_token_counts_only_where_all_before_it_stood(monkeypatch):
    rng = np.random.default_rng(4)
    hits = [np.where(rng.random((6, 40)) < rate, 1, 0) for rate in (0.7, 0.6, 0.5)]
    for matrix in hits:
        matrix[:, :9] = -1  # the prompt
        matrix[2, 30:] = -1  # a shorter text
    none = np.zeros((1, 2))
    texts = [Example(str(n), np.arange(12), 9, none, none, none, None) for n in range(6)]
    sampled = Example("s", np.arange(12), 9, none, none, none, None, greedy=False)
    seen = []
    monkeypatch.setattr(depths, "collate", lambda examples: seen.append([e.id for e in examples]))
    monkeypatch.setattr(depths, "_hits", lambda learner, batch, count: hits)
    stood, tried = [0, 0, 0], [0, 0, 0]
    for row in range(6):
        for place in range(9, 40):
            for depth in range(3):
                if place + depth >= 40 or hits[depth][row, place + depth] < 0:
                    break
                tried[depth] += 1
                stood[depth] += hits[depth][row, place + depth]
                if not hits[depth][row, place + depth]:
                    break
    found = depths.by_depth(None, [*texts, sampled])
    assert found.acceptance == pytest.approx([s / t for s, t in zip(stood, tried, strict=True)])
    assert found.agreement == pytest.approx([(h == 1).sum() / (h >= 0).sum() for h in hits])
    assert seen == [["0", "1", "2", "3", "4", "5"]]  # sampled answers are not judged
