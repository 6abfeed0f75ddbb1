"""A head draft's step as one call, and several sequences in one step, against the ordinary path."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from specl.shared import native
from specl.shared.models.head import new_head
from specl.shared.models.lora import LoraShape, attach
from tests.native.test_model import MODELS, tiny

EXACT = 1e-4


@pytest.fixture(params=[64, 96, 160], ids=lambda hidden: f"hidden-{hidden}")
def head(request, language_model):
    """A random head on a target of that width, sped up, with weights that bf16 holds exactly."""
    target = language_model(hidden_size=request.param, num_attention_heads=2, num_key_value_heads=1)
    draft = new_head(target, np.arange(0, 300, 3))
    draft.head.apply(lambda x: x.astype(mx.bfloat16).astype(mx.float32))
    draft.set_hot(draft.hot)
    draft.use_cpu_kernels()
    assert draft.native_step is not None
    return draft


def ordinary(draft, states, ids, cache):
    """The same step without the native call."""
    stack, draft.native_step = draft.native_step, None
    try:
        return draft.step(states, ids, cache)
    finally:
        draft.native_step = stack


def test_a_draft_step_is_the_ordinary_one(head, isa):
    native.use_instruction_set(isa)
    rng = np.random.default_rng(0)
    ours, theirs = KVCache(), KVCache()
    for width in (1, 5, 16, 1, 2, 16, 7):
        states = mx.array(rng.standard_normal((width, head.shape.hidden_size)).astype(np.float32))
        ids = rng.integers(0, 300, width).tolist()
        last, scores, best, total = head.step(states, ids, ours)
        wanted = ordinary(head, states, ids, theirs)
        assert mx.abs(last - wanted[0]).max().item() < EXACT
        assert np.abs(scores - wanted[1]).max() < EXACT
        assert scores[best] == scores.max() and total == pytest.approx(wanted[3], abs=EXACT)
        assert ours.offset == theirs.offset
        ours.trim(width // 2)
        theirs.trim(width // 2)


def test_draft_step_beyond_the_first_position_table(head):
    cache, other = KVCache(), KVCache()
    states = mx.random.normal((16, head.shape.hidden_size))
    for _ in range(66):
        got, wanted = head.step(states, [5] * 16, cache), ordinary(head, states, [5] * 16, other)
    assert cache.offset == 1056 and mx.abs(got[0] - wanted[0]).max().item() < EXACT


def test_adapter_beside_its_base_takes_the_python_path(head):
    states = mx.random.normal((2, head.shape.hidden_size))
    before = head.step(states, [1, 2], KVCache())
    attach(head.head, LoraShape(4, 8.0, 0.0, ("self_attn.q_proj",)))
    adapter = head.head.self_attn.q_proj
    adapter.lora_b = mx.random.normal(adapter.lora_b.shape)
    after = head.step(states, [1, 2], KVCache())
    assert head.native_step.step(states, [1, 2], KVCache(), head.output) is None
    assert mx.abs(after[0] - before[0]).max().item() > 1e-3


def test_another_hot_vocabulary_is_scored_at_once(head):
    states = mx.random.normal((1, head.shape.hidden_size))
    head.set_hot(head.hot + 1)
    got, wanted = head.step(states, [1], KVCache()), ordinary(head, states, [1], KVCache())
    assert np.abs(got[1] - wanted[1]).max() < EXACT


@pytest.mark.parametrize("family", MODELS)
def test_batched_sequences_are_bit_identical_to_single(family, isa):
    native.use_instruction_set(isa)
    model = MODELS[family]()
    assert native.accelerate(model).fused
    inner, rng = model.model, np.random.default_rng(1)
    texts = [rng.integers(0, 300, length).tolist() for length in (3, 40, 17, 1, 300)]
    widths = (1, 4, 2, 1, 8)

    def filled():
        caches = [model.make_cache() if hasattr(model, "make_cache") else _caches(model) for _ in texts]
        for text, cache in zip(texts, caches, strict=True):
            mx.eval(inner(mx.array([text]), cache))
        return caches

    together, alone = filled(), filled()
    ids = [rng.integers(0, 300, width).tolist() for width in widths]
    for _ in range(2):
        got = inner.native_stack.step_lanes(inner, ids, together)
        wanted = [inner(mx.array([part]), cache)[0] for part, cache in zip(ids, alone, strict=True)]
        assert mx.array_equal(got, mx.concatenate(wanted)).item()
    for ours, theirs in zip(together, alone, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.offset == b.offset and mx.array_equal(a.state[0], b.state[0]).item()


def _caches(model):
    return [KVCache() for _ in model.model.layers]


def test_unsupported_batch_takes_the_python_path():
    model = tiny()
    native.accelerate(model)
    inner, cache = model.model, _caches(model)
    lanes = inner.native_stack.step_lanes
    assert lanes(inner, [], []) is None
    assert lanes(inner, [[1]], []) is None
    assert lanes(inner, [[1], []], [cache, _caches(model)]) is None
    assert lanes(inner, [[1], [2]], [cache, cache]) is None, "one sequence twice"
    assert lanes(inner, [[1] * 9, [2] * 8], [cache, _caches(model)]) is None, "more than sixteen rows"
    assert lanes(inner, [[311]], [cache]) is None and lanes(inner, [[-1]], [cache]) is None
    assert cache[0].offset == 0
    assert lanes(inner, [[310]], [cache]) is not None and cache[0].offset == 1
