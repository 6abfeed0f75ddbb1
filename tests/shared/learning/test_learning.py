"""Losses against brute force, gradients that are not zero, a resumed run that is the uninterrupted one."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from specl.shared.learning.examples import Example, collate, hot_vocabulary, is_held_out
from specl.shared.learning.learner import Learner, agreement
from specl.shared.learning.losses import LOSSES, LossSettings, TargetTopK, position_losses
from specl.shared.learning.steps import BatchSampler, StepLoop, StepSettings
from specl.shared.models.head import new_head
from specl.shared.models.lora import (
    LoraShape,
    Pristine,
    attach,
    choose_layers,
    lora_weights,
)
from specl.shared.training_files.checkpoint import load_checkpoint, save_checkpoint
from tests.lora import change_norm, fuse, problems


def example(target, seed=0, prompt=5, rows=9, k=97, id="a"):
    """A text with the target's own distribution at every output position."""
    tokens = np.random.default_rng(seed).integers(4, 97, prompt + rows).astype(np.uint32)
    states = target.hidden_states(mx.array(tokens[None, :-1].astype(np.int64)))[0]
    logits = np.array(target.logits(states))[prompt - 1 :].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :k]
    top = np.take_along_axis(logprobs, ids, axis=1)
    return Example(
        id,
        tokens,
        prompt,
        ids.astype(np.uint32),
        top.astype(np.float32),
        np.ones(rows, np.float32),
        np.array(states).astype(np.float16),
    )


def teacher_of(p, k):
    ids = np.argsort(-p, axis=1)[:, :k]
    return TargetTopK(
        mx.array(ids),
        mx.array(np.log(np.take_along_axis(p, ids, 1)).astype(np.float32)),
        mx.array(p.argmax(1)),
        mx.ones(len(p)),
    )


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_kl_is_full_or_has_a_tail_bucket():
    rng = np.random.default_rng(0)
    logits, p = rng.normal(size=(6, 20)).astype(np.float32), softmax(rng.normal(size=(6, 20)) * 2)
    q = softmax(logits.astype(np.float64))
    full, _ = position_losses(mx.array(logits), teacher_of(p, 20), LossSettings("kl"))
    assert np.allclose(np.array(full), (p * np.log(p / q)).sum(1), atol=1e-4)
    few, _ = position_losses(mx.array(logits), teacher_of(p, 4), LossSettings("kl"))
    for row, value in enumerate(np.array(few)):
        top = np.argsort(-p[row])[:4]
        tail_p, tail_q = 1 - p[row, top].sum(), 1 - q[row, top].sum()
        assert value == pytest.approx(
            (p[row, top] * np.log(p[row, top] / q[row, top])).sum() + tail_p * np.log(tail_p / tail_q), abs=1e-4
        )


def test_out_of_vocabulary_tokens_leave_the_loss_finite():
    p = softmax(np.random.default_rng(1).normal(size=(3, 10)) * 3)
    teacher = teacher_of(p, 5)
    columns = np.array(teacher.columns)
    columns[:, 0], columns[2] = -1, -1
    losses, valid = position_losses(
        mx.zeros((3, 10)),
        TargetTopK(mx.array(columns), teacher.logprobs, mx.array([-1, 2, 3]), teacher.weights),
        LossSettings("mixed"),
    )
    assert np.isfinite(np.array(losses)).all() and np.array(valid)[:2].all()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("draft", ["head", "model"])
def test_every_loss_has_a_gradient_for_lora(tiny, kind, draft):
    target = tiny()
    made = new_head(target, np.arange(4, 90)) if draft == "head" else tiny(seed=21)
    learner = Learner(made)
    keys = choose_layers(learner.module, "all")
    learner.module.freeze()
    attach(learner.module, LoraShape(4, 8, 0.0, keys))
    batch = collate([example(target, 1), example(target, 2, prompt=7)])
    _, gradients = nn.value_and_grad(learner.module, lambda: learner.loss(batch, LossSettings(kind), 2))()
    found = dict(tree_flatten(gradients))
    assert found and all("lora_" in name for name in found)
    assert sum(mx.abs(value).sum().item() for value in found.values()) > 0
    Pristine(learner.module)
    from specl.shared.models.lora import detach

    detach(learner.module)
    learner.module.unfreeze()


def test_agreement_is_what_counting_by_hand_gives(tiny):
    target = tiny()
    draft = tiny(seed=5, layers=1)
    examples = [example(target, seed, prompt=4 + seed) for seed in range(3)]
    hits = 0
    for item in examples:
        logits = np.array(draft.model(mx.array(item.tokens[None].astype(np.int64))))[0]
        hits += sum(logits[i - 1].argmax() == item.tokens[i] for i in range(item.prompt_length, len(item.tokens)))
    score = agreement(Learner(draft), examples)
    assert score.hits.sum() == hits and score.positions.sum() == 27
    own = [
        Example(e.id, e.tokens, e.prompt_length, e.ids, e.logprobs, e.weights, e.states, greedy=False) for e in examples
    ]
    assert agreement(Learner(target), own).value == pytest.approx(1, abs=1e-3), (
        "a sampled text's overlap with its own distribution"
    )


def test_unrolled_depths_equal_stepwise_drafting(tiny):
    target = tiny()
    draft = new_head(target, np.arange(97))
    item = example(target, 3, prompt=6, rows=10)
    states, tokens = mx.array(item.states[None].astype(np.float32)), item.tokens.astype(np.int64)
    embeddings = target.embed(mx.array(tokens[None, 1:]))
    depths = draft.head.unroll(states, embeddings, 3)
    for start in (4, 9):
        cache = KVCache()
        out = draft.head(states[:, : start + 1], embeddings[:, : start + 1], cache)[:, -1:]
        for depth in range(3):
            assert mx.allclose(out[:, 0], depths[depth][:, start + depth], atol=1e-4).item()
            out = draft.head(out, embeddings[:, start + depth + 1 : start + depth + 2], cache)


def loop(target, seed=0):
    mx.random.seed(seed)
    learner = Learner(new_head(target, np.arange(97)))
    return StepLoop(learner, LossSettings("kl"), StepSettings(1e-3, 10, depths=2))


def test_a_resumed_run_is_the_uninterrupted_one(tiny, tmp_path):
    target = tiny()
    examples = [example(target, seed) for seed in range(4)]
    whole = loop(target)
    losses = [whole.step([examples[:2], examples[2:]]) for _ in range(4)]
    first = loop(target)
    for _ in range(2):
        first.step([examples[:2], examples[2:]])
    save_checkpoint(tmp_path / "checkpoint", first.state, {"parent": ""})
    second = loop(target, seed=9)
    second.restore(load_checkpoint(tmp_path / "checkpoint"))
    assert second.step_number == 2
    assert [second.step([examples[:2], examples[2:]]) for _ in range(2)] == pytest.approx(losses[2:], rel=1e-5)
    assert losses[-1] < losses[0]


def test_batches_keep_replay_share_and_vocabulary_size(tiny):
    fresh, replay = (
        [example(tiny(), i, id=f"f{i}") for i in range(3)],
        [example(tiny(), i, id=f"r{i}") for i in range(5)],
    )
    batches = BatchSampler(fresh, replay, 6, 0.67, seed=0)
    for _ in range(5):
        assert sum(item.id.startswith("r") for item in batches.next()) == 4
    small = BatchSampler(fresh, replay, 2, 0.2, seed=0)
    assert sum(item.id.startswith("r") for _ in range(50) for item in small.next()) == 20
    hot = hot_vocabulary(fresh, 20, 97, keep=np.arange(50))
    assert len(np.unique(hot)) == 20 and (np.diff(hot) > 0).all()


def test_held_out_is_a_stable_share_of_conversations():
    share = np.mean([is_held_out(f"conversation-{i}", 0.2) for i in range(4000)])
    assert 0.17 < share < 0.23
    assert is_held_out("abc", 0.5) == is_held_out("abc", 0.5)


# ------------------------------------------------------------------------------------------------ adapters on modules
def trained_lora(module, seed=0, rank=4):
    shape = LoraShape(rank, 8, 0.0, choose_layers(module, "all"))
    attach(module, shape)
    rng = np.random.default_rng(seed)
    weights = {
        name: mx.array(rng.normal(0, 0.05, value.shape).astype(np.float32))
        for name, value in lora_weights(module).items()
    }
    return shape, weights


def test_fused_equals_unfused_and_restore_is_exact(tiny):
    target = tiny()
    draft = new_head(target, np.arange(97))
    pristine = Pristine(draft.head)
    before = [id(layer) for layer in (draft.head.fc, draft.head.mlp.up_proj)]
    x = (mx.random.normal((1, 30, 64)), mx.random.normal((1, 30, 64)))
    base = draft.head(*x)
    shape, weights = trained_lora(draft.head)
    assert problems(draft.head, shape, weights) == [] and change_norm(shape, weights) > 0
    attach(draft.head, shape, weights)
    unfused = draft.head(*x)
    pristine.restore()
    assert fuse(draft.head, shape, weights) == "fused"
    assert mx.allclose(draft.head(*x), unfused, atol=1e-4).item() and not mx.allclose(unfused, base, atol=1e-3).item()
    for _ in range(50):
        fuse(draft.head, shape, weights)
        pristine.restore()
    assert [id(layer) for layer in (draft.head.fc, draft.head.mlp.up_proj)] == before
    assert mx.array_equal(draft.head(*x), base).item()


def test_a_quantised_base_keeps_the_adapter_beside_it(tiny):
    module = nn.Sequential(nn.Linear(64, 64, bias=False))
    nn.quantize(module, group_size=32, bits=4)
    shape, weights = trained_lora(module)
    assert fuse(module, shape, weights) == "unfused"


def test_every_problem_of_an_adapter_is_reported(tiny):
    module = new_head(tiny(), np.arange(97)).head
    shape, weights = trained_lora(module)
    weights["fc.lora_a"] = mx.full(weights["fc.lora_a"].shape, float("nan"))
    weights["mlp.up_proj.lora_b"] = mx.zeros((3, 3))
    weights["stranger.lora_a"] = mx.zeros((1,))
    del weights["mlp.down_proj.lora_b"]
    found = "; ".join(problems(module, shape, weights))
    for word in (
        "fc.lora_a has values that are not finite",
        "mlp.up_proj.lora_b has shape",
        "stranger.lora_a is not part",
        "mlp.down_proj.lora_b is missing",
    ):
        assert word in found


def test_schedule_ends_by_steps_or_time(tiny):
    made = loop(tiny())
    full = made.settings.learning_rate
    made.step_number = made.settings.total_steps // 2
    half = made.learning_rate
    made.step_number = made.settings.total_steps
    assert made.learning_rate == pytest.approx(0.1 * full) and 0.1 * full < half < full
    made.step_number, made.time_share = made.settings.total_steps // 2, 1.0
    assert made.learning_rate == pytest.approx(0.1 * full)
