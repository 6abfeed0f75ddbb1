"""A whole vocabulary's logits are computed in chunks, each with its gradient at once: loss and gradient are those of one piece."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from specl.shared.learning import learner as learning
from specl.shared.learning.examples import collate
from specl.shared.learning.learner import Learner
from specl.shared.learning.losses import LossSettings
from tests.bench.training import to_example
from tests.conftest import tiny_model


@pytest.mark.parametrize("kind", ["ce", "kl", "mixed", "tv"])
def test_chunks_change_neither_loss_nor_gradient(kind, monkeypatch):
    draft = tiny_model(seed=3)
    draft.model.freeze()
    for module in (*draft.model.layers, draft.model.model.norm):
        module.unfreeze()
    learner = Learner(draft)
    rng = np.random.default_rng(0)
    batch = collate([to_example(rng.integers(0, 97, length).astype(np.uint32)) for length in (30, 21, 8)])
    found = []
    for rows in (128, 20, 7):  # 56 rows: one piece, three, eight
        monkeypatch.setattr(learning, "CHUNK_ROWS", rows)
        loss, slopes = nn.value_and_grad(learner.module, lambda: 3 * learner.loss(batch, LossSettings(kind), 1))()
        found.append((loss.item(), dict(tree_flatten(slopes))))
    (loss, slopes), *others = found
    assert max(mx.abs(slope).max().item() for slope in slopes.values()) > 1e-3
    for other, its in others:
        assert other == pytest.approx(loss, rel=1e-5) and its.keys() == slopes.keys()
        assert all(mx.allclose(its[name], slopes[name], rtol=1e-3, atol=1e-5) for name in slopes)
