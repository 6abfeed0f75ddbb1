"""A step is one step however its texts are cut into pieces, and dropout is on while it lasts and never else."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from specl.shared.learning.examples import Example
from specl.shared.learning.gradient_checkpointing import checkpointed
from specl.shared.learning.learner import Learner, acceptance_by_depth, agreement
from specl.shared.learning.losses import LossSettings
from specl.shared.learning.steps import StepLoop, StepSettings
from specl.shared.models.head import new_head
from specl.shared.models.lora import LoraShape, attach, choose_layers
from tests.conftest import tiny_model


def text(n, rows, weight=1.0):
    rng = np.random.default_rng(n)
    tokens = rng.integers(4, 97, 6 + rows).astype(np.uint32)
    states = rng.normal(size=(5 + rows, 64)).astype(np.float16)
    weights = np.full(rows, weight, np.float32)
    return Example(f"{n}", tokens, 6, tokens[6:, None], np.full((rows, 1), -0.4, np.float16), weights, states)


class Slope:
    """An optimizer that keeps the gradient and moves nothing."""

    state, learning_rate = {}, 0.0

    def update(self, module, gradients):
        self.seen = dict(tree_flatten(gradients))


def lora_loop(draft, kind="mixed", dropout=0.0, depths=2):
    learner = Learner(draft)
    learner.module.freeze()
    mx.random.seed(11)
    attach(learner.module, LoraShape(4, 8.0, dropout, choose_layers(learner.module, "all")))
    for _, child in learner.module.named_modules():
        if "lora_b" in child:
            child.lora_b = mx.random.normal(child.lora_b.shape) * 0.1
    loop = StepLoop(learner, LossSettings(kind), StepSettings(1e-3, 10, depths=depths))
    loop.optimizer = Slope()
    return loop


@pytest.mark.parametrize("kind", ["ce", "kl", "mixed", "tv"])
@pytest.mark.parametrize("draft", ["head", "model"])
def test_gradient_of_pieces_equals_the_batch(kind, draft, monkeypatch):
    monkeypatch.setattr("specl.shared.learning.steps.MAX_GRADIENT_NORM", 1e9)
    target = tiny_model()
    # a head that cannot say all tokens: what counts in a piece is not just its tokens
    loop = lora_loop(new_head(target, np.arange(4, 70)) if draft == "head" else target, kind)
    texts = [text(1, 30), text(2, 4, weight=3.0), text(3, 11), text(4, 2)]
    found = []
    for pieces in ([texts], [texts[:1], texts[1:]], [[one] for one in texts]):
        loss = loop.step(pieces)
        found.append((loss, loop.optimizer.seen))
    (whole, slopes), *others = found
    assert max(mx.abs(slope).max().item() for slope in slopes.values()) > 1e-3
    for loss, seen in others:
        assert loss == pytest.approx(whole, rel=1e-5)
        assert all(mx.allclose(seen[name], slopes[name], rtol=1e-3, atol=1e-6) for name in slopes)


# ---------------------------------------------------------------------------------------------------- dropout
def test_dropout_is_on_only_in_training_steps():
    loop = lora_loop(tiny_model(), "kl", dropout=0.5, depths=1)
    learner, texts = loop.learner, [text(n, 12) for n in range(3)]
    losses = {loop.step([texts]) for _ in range(3)}
    assert len(losses) == 3  # the weights stand still: what differs is which inputs are dropped
    sampled = [Example(e.id, e.tokens, 6, e.ids, e.logprobs, e.weights, None, greedy=False) for e in texts]
    for left_on in (False, True):
        if left_on:
            learner.module.train()
        scores = {agreement(learner, sampled).value for _ in range(3)}
        assert len(scores) == 1
    learner.module.train()
    acceptance_by_depth(learner, texts)
    assert not any(child.training for _, child in learner.module.named_modules())


def test_interrupted_step_leaves_dropout_off():
    loop = lora_loop(tiny_model(), dropout=0.5)

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        loop.step([[text(1, 5)]], stop)
    assert not any(child.training for _, child in loop.learner.module.named_modules())


def test_checkpointing_recomputes_with_the_same_dropout():
    """y = drop(x) W is linear in W, so its sum is the sum of W times its own gradient, if both saw one mask."""
    layer = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4, bias=False)).train()
    x, sums = mx.random.normal((5, 6), key=mx.random.key(1)), set()
    outer = nn.Sequential(layer)
    for _ in range(4):
        with checkpointed([layer]):
            value, slope = nn.value_and_grad(outer, lambda: outer(x).sum())()
        weight = layer.layers[1].weight
        again = (slope["layers"][0]["layers"][1]["weight"] * weight).sum()
        assert value.item() == pytest.approx(again.item(), rel=1e-4)
        sums.add(value.item())
    assert len(sums) == 4  # another mask every time
