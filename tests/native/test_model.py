"""Whole models on the native path against the same models on the ordinary one: logits, texts, caches, training."""

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen2
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from specl.shared import native
from specl.shared.native import decoder, modules

SIZES = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "intermediate_size": 224,  # not whole blocks of 64
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 311,
}


def tiny(family="llama", **changes):
    module = {"llama": llama, "qwen2": qwen2}[family]
    mx.random.seed(7)
    model = module.Model(module.ModelArgs(model_type=family, **{**SIZES, **changes}))
    # away from the near-ties of an untrained head, and with norms and biases that matter
    model.load_weights([(k, v + mx.random.normal(v.shape) * 0.15) for k, v in tree_flatten(model.parameters())])
    mx.eval(model.parameters())
    return model


MODELS = {
    "llama": lambda: tiny(),
    "llama_untied": lambda: tiny(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama3_rope": lambda: tiny(
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "qwen2": lambda: tiny("qwen2"),
    "qwen2_wide_heads": lambda: tiny("qwen2", hidden_size=160, num_attention_heads=2, num_key_value_heads=1),
}


@pytest.fixture(params=MODELS)
def pair(request):
    """The same model twice: ordinary, and accelerated."""
    ordinary, fast = MODELS[request.param](), MODELS[request.param]()
    got = native.accelerate(fast)
    assert got.active and got.fused, got.reason
    return ordinary, fast


def close(a, b):
    return np.abs(np.array(a) - np.array(b)).max() <= 2e-5 * max(1.0, np.abs(np.array(b)).max())


def is_fused_step(model, ids, cache):
    return model.model.native_stack.step(model.model, ids, cache) is not None


def ids_of(n, seed=0):
    return mx.array(np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (1, n)))


def test_logits_agree_at_every_width_after_any_prompt(pair, isa):
    native.use_instruction_set(isa)
    ordinary, fast = pair
    for prompt in (0, 1, 5, 40):
        caches = make_prompt_cache(ordinary), make_prompt_cache(fast)
        for at, width in enumerate((prompt, 1, 16, 3, 8, 17, 2)):
            if width:
                ids = ids_of(width, at)
                right, got = ordinary(ids, cache=caches[0]), fast(ids, cache=caches[1])
                assert got.shape == right.shape
                assert close(got, right), (prompt, width)
        assert [c.offset for c in caches[1]] == [c.offset for c in caches[0]]


def greedy(model, prompt, n):
    cache = make_prompt_cache(model)
    logits = model(prompt, cache=cache)
    out = []
    for _ in range(n):
        out.append(int(mx.argmax(logits[0, -1]).item()))
        logits = model(mx.array([[out[-1]]]), cache=cache)
    return out


def test_greedy_texts_are_equal(pair):
    ordinary, fast = pair
    prompt = ids_of(9)
    assert greedy(fast, prompt, 120) == greedy(ordinary, prompt, 120)


def test_verifying_many_rows_answers_what_single_steps_answer(pair):
    _, fast = pair
    ids = ids_of(16)
    one, many = make_prompt_cache(fast), make_prompt_cache(fast)
    fast(ids_of(20, 3), cache=one), fast(ids_of(20, 3), cache=many)
    wide = np.array(fast(ids, cache=many))
    for i in range(16):
        assert np.array_equal(np.array(fast(ids[:, i : i + 1], cache=one))[0, 0], wide[0, i]), i


def test_trimmed_cache_equals_a_fresh_one(pair):
    _, fast = pair
    clean, rewound = make_prompt_cache(fast), make_prompt_cache(fast)
    fast(ids_of(12), cache=clean), fast(ids_of(12), cache=rewound)
    fast(ids_of(8, 5), cache=rewound)
    for entry in rewound:
        assert entry.trim(8) == 8
    assert mx.array_equal(fast(ids_of(4, 6), cache=rewound), fast(ids_of(4, 6), cache=clean))


def test_cache_and_position_table_grow(pair, monkeypatch):
    monkeypatch.setattr(decoder, "FIRST_POSITIONS", 64)
    ordinary, fast = pair
    native.accelerate(fast).refresh()
    caches = make_prompt_cache(ordinary), make_prompt_cache(fast)
    for at in range(40):
        right, got = (m(ids_of(13, at), cache=c) for m, c in zip((ordinary, fast), caches, strict=True))
        mx.eval(right, got)
    assert caches[1][0].offset == 520
    assert close(got, right)


def test_copied_cache_is_independent():
    fast = MODELS["llama"]()
    assert native.accelerate(fast).fused
    cache = make_prompt_cache(fast)
    fast(ids_of(10), cache=cache)
    copies = [copy.deepcopy(cache), [copy.copy(entry) for entry in cache]]
    states = [entry.state for entry in cache]
    frozen = [np.array(keys[..., :10, :]) for keys, _, _ in states]
    rights = [np.array(fast(ids_of(3, 1), cache=copy.deepcopy(cache)))]
    mx.eval(fast(ids_of(3, 2), cache=cache))
    for other in copies:
        assert np.array_equal(np.array(fast(ids_of(3, 1), cache=other)), rights[0])
    assert all(np.array_equal(a, np.array(keys[..., :10, :])) for a, (keys, _, _) in zip(frozen, states, strict=True))


def test_steps_are_fused_and_write_in_place():
    fast = MODELS["llama"]()
    assert native.accelerate(fast).fused
    cache = make_prompt_cache(fast)
    assert is_fused_step(fast, ids_of(5), cache)
    before = cache[0].keys
    identity = id(before)
    del before
    assert is_fused_step(fast, ids_of(1), cache)
    assert id(cache[0].keys) == identity


def test_unknown_layers_take_the_python_path():
    model = MODELS["llama"]()
    assert native.accelerate(model).fused
    step = model.model.native_stack.step
    cache = make_prompt_cache(model)
    assert step(model.model, ids_of(17), cache) is None
    assert step(model.model, mx.concatenate([ids_of(2), ids_of(2)]), cache) is None
    assert step(model.model, mx.array([[SIZES["vocab_size"]]]), cache) is None
    assert step(model.model, ids_of(2), cache[:-1]) is None
    assert step(model.model, ids_of(2), [*cache[:-1], object()]) is None
    for entry in cache:
        entry.keys = entry.values = mx.zeros((1, 2, 256, 16), mx.float16)
    assert step(model.model, ids_of(2), cache) is None
    assert all(entry.offset == 0 for entry in cache)
    assert model(ids_of(3)).shape == (1, 3, SIZES["vocab_size"])


def test_exchanged_weights_are_packed_by_refresh():
    model, plain = MODELS["llama"](), MODELS["llama"]()
    got = native.accelerate(model)
    for m in (model, plain):
        m.model.layers[1].mlp.up_proj.weight = m.model.layers[1].mlp.up_proj.weight * 1.5
    assert not got.intact()
    caches = make_prompt_cache(model), make_prompt_cache(plain)
    assert close(model(ids_of(4), cache=caches[0]), plain(ids_of(4), cache=caches[1]))
    assert got.refresh().fused and got.intact()
    assert close(model(ids_of(4), cache=caches[0]), plain(ids_of(4), cache=caches[1]))


def test_training_an_adapter_gives_the_ordinary_gradients():
    grads = []
    for fast in (False, True):
        model = MODELS["llama"]()
        if fast:
            assert native.accelerate(model).fused
        model.freeze()
        mx.random.seed(3)
        linear_to_lora_layers(model, 3, {"rank": 4, "scale": 2.0, "dropout": 0.0})
        for _, layer in model.named_modules():
            if "lora_b" in layer:
                layer.lora_b = mx.ones_like(layer.lora_b) * 0.1

        def loss(model, ids):
            return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()

        value, grad = nn.value_and_grad(model, loss)(model, ids_of(12))
        step = model(ids_of(3), cache=make_prompt_cache(model))
        grads.append((value, step, *(g for _, g in sorted(tree_flatten(grad)))))
    assert all(close(a, b) for a, b in zip(*grads, strict=True))
    assert max(mx.abs(g).max().item() for g in grads[0][2:]) > 0


def test_full_training_after_acceleration_sees_the_dense_weights():
    model, plain = MODELS["qwen2"](), MODELS["qwen2"]()
    assert native.accelerate(model).fused

    def loss(model, ids):
        return nn.losses.cross_entropy(model(ids[:, :-1], cache=make_prompt_cache(model)), ids[:, 1:]).mean()

    grads = [nn.value_and_grad(m, loss)(m, ids_of(9))[1] for m in (model, plain)]
    for (name, a), (_, b) in zip(*(sorted(tree_flatten(g)) for g in grads), strict=True):
        assert close(a, b), name


def test_release_gives_the_model_back():
    model, plain = MODELS["llama"](), MODELS["llama"]()
    got = native.accelerate(model)
    got.release()
    assert type(model.model) is llama.LlamaModel
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert mx.array_equal(model(ids_of(4)), plain(ids_of(4)))


def test_a_copy_of_an_accelerated_model_works():
    model = MODELS["llama"]()
    assert native.accelerate(model).fused
    twin = copy.deepcopy(model)
    assert close(twin(ids_of(4), cache=make_prompt_cache(twin)), model(ids_of(4), cache=make_prompt_cache(model)))


@pytest.mark.parametrize(("weights", "share"), [("bf16", 0.05), ("q8", 0.05)])
def test_rounded_weights_stay_near(weights, share):
    model, plain = MODELS["llama"](), MODELS["llama"]()
    got = native.accelerate(model, weights)
    assert got.fused and set(got.formats) <= {"bf16", "q8g32f", "q8g32h"}
    a, b = (np.array(m(ids_of(6), cache=make_prompt_cache(m))) for m in (model, plain))
    assert np.abs(a - b).max() < share * np.abs(b).max()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_keeps_its_words(bits):
    model, plain = MODELS["llama_untied"](), MODELS["llama_untied"]()
    for m in (model, plain):
        nn.quantize(m, 32, bits, class_predicate=lambda path, module: isinstance(module, nn.Linear))
    got = native.accelerate(model)
    assert got.fused and set(got.formats) == {f"q{bits}g32f"}
    for n in (4, 30):
        assert close(model(ids_of(n), cache=make_prompt_cache(model)), plain(ids_of(n), cache=make_prompt_cache(plain)))


def test_any_module_with_linear_layers_can_be_accelerated():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(48, 100), nn.Linear(100, 7, bias=False)

        def __call__(self, x):
            return self.second(nn.gelu(self.first(x)))

    head = Head()
    x = mx.random.normal((2, 3, 48))
    right = head(x)
    got = native.accelerate(head)
    assert got.active and not got.fused and got.formats == {"f32": 2}
    assert isinstance(head.first, modules.FewRowLinear)
    assert close(head(x), right)
    many = mx.random.normal((50, 48))
    got.release()
    right = head(many)
    native.accelerate(head)
    assert mx.array_equal(head(many), right)
