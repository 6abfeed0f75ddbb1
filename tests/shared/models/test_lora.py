"""LoRA on layers: what attaches, fuses and detaches leaves the base as it was, bit for bit, dense or quantised."""

import hashlib
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from specl.shared.errors import AdapterRejected
from specl.shared.models.lora import (
    LoraShape,
    Pristine,
    attach,
    choose_layers,
    detach,
    interpolate,
    linear_layers,
    lora_weights,
)
from tests.lora import change_norm, fuse, problems

BASES = ["fp32", "fp16", "bf16", "4-bit", "8-bit"]


class Block(nn.Module):
    """A layer with and one without a bias, and one that LoRA must leave alone."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.norm = nn.RMSNorm(64)

    def __call__(self, x):
        return self.norm(x + self.down(nn.silu(self.up(x))))


def block(base):
    mx.random.seed(7)
    module = Block()
    if base.endswith("bit"):
        nn.quantize(module, group_size=32, bits=int(base[0]))
    else:
        module.set_dtype({"fp32": mx.float32, "fp16": mx.float16, "bf16": mx.bfloat16}[base])
    mx.eval(module.parameters())
    return module


def some_lora(module, rank=4, alpha=8.0, scale=0.2, keys=("up", "down")):
    shape = LoraShape(rank, alpha, 0.0, keys)
    rng, weights = np.random.default_rng(3), {}
    for key, (inner, out) in {"up": (64, 96), "down": (96, 64)}.items():
        if key in keys:
            weights[f"{key}.lora_a"] = mx.array(rng.normal(0, scale, (inner, rank)).astype(np.float32))
            weights[f"{key}.lora_b"] = mx.array(rng.normal(0, scale, (rank, out)).astype(np.float32))
    return shape, weights


def bits(module):
    """A digest of every weight's bytes, by name."""
    found = {}
    for name, value in tree_flatten(module.parameters()):
        found[name] = hashlib.sha256(np.array(value.view(mx.uint8))).hexdigest()
    return found


def inputs(module, rows=10):
    dtype = module.norm.weight.dtype
    return mx.random.normal((1, rows, 64), key=mx.random.key(1)).astype(dtype)


# ---------------------------------------------------------------------------------------------------- there and back
@pytest.mark.parametrize("base", BASES)
def test_zero_b_changes_nothing_and_detach_restores_layers(base):
    module = block(base)
    before, layers, out = bits(module), dict(linear_layers(module)), module(inputs(module))
    attach(module, some_lora(module)[0])
    assert isinstance(module.up, LoRALinear) and isinstance(module.down, LoRALinear)
    assert mx.array_equal(module(inputs(module)), out).item()
    detach(module)
    assert module.up is layers["up"] and module.down is layers["down"]
    assert bits(module) == before


@pytest.mark.parametrize("base", BASES)
def test_base_is_bit_identical_after_any_adapters(base):
    module = block(base)
    pristine, before, out = Pristine(module), bits(module), module(inputs(module))
    for round in range(5):
        shape, weights = some_lora(module, rank=2 + round)
        fuse(module, shape, weights)
        assert not mx.array_equal(module(inputs(module)), out).item()
        if round % 2:
            attach(module, shape, weights)
        pristine.restore()
        assert bits(module) == before
    assert mx.array_equal(module(inputs(module)), out).item()


@pytest.mark.parametrize("base", BASES)
def test_fused_is_unfused_within_the_base_types_tolerance(base):
    module = block(base)
    shape, weights = some_lora(module)
    plain = module(inputs(module))
    attach(module, shape, weights)
    unfused = module(inputs(module))
    detach(module)
    pristine = Pristine(module)
    form = fuse(module, shape, weights)
    now = module(inputs(module))
    pristine.restore()
    assert form == ("unfused" if base.endswith("bit") else "fused")
    tolerance = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 6e-2}.get(base, 0)
    assert mx.max(mx.abs(now - unfused)).item() <= tolerance
    assert mx.max(mx.abs(unfused - plain)).item() > 0.5


def test_effect_below_base_precision_stays_beside_it():
    module = block("bf16")
    module.up.weight = module.up.weight * 100
    shape, weights = some_lora(module, scale=0.02, keys=("up",))
    assert fuse(module, shape, weights) == "unfused"
    assert isinstance(module.up, LoRALinear)


def test_fusing_starts_from_the_pristine_base():
    module = block("fp32")
    pristine = Pristine(module)
    shape, weights = some_lora(module)
    fuse(module, shape, weights)
    once = np.array(module.up.weight)
    pristine.restore()
    other_shape, other = some_lora(module, rank=7, scale=0.5)
    fuse(module, other_shape, other)
    pristine.restore()
    fuse(module, shape, weights)
    assert (np.array(module.up.weight) == once).all()


def test_fused_weight_is_base_plus_scaled_ab():
    module = block("fp32")
    base, bias = np.array(module.up.weight), np.array(module.up.bias)
    shape, weights = some_lora(module, alpha=12.0)
    fuse(module, shape, weights)
    expected = base + 3.0 * (np.array(weights["up.lora_a"]) @ np.array(weights["up.lora_b"])).T
    assert np.allclose(np.array(module.up.weight), expected, atol=1e-6)
    assert (np.array(module.up.bias) == bias).all() and "bias" not in module.down


# ---------------------------------------------------------------------------------------------------- what trains
@pytest.mark.parametrize("base", ["fp32", "4-bit"])
def test_only_a_and_b_train(base):
    module = block(base)
    before = bits(module)
    module.freeze()
    attach(module, some_lora(module)[0])
    names = {name for name, _ in tree_flatten(module.trainable_parameters())}
    assert names == {f"{key}.lora_{part}" for key in ("up", "down") for part in "ab"} == set(lora_weights(module))
    x = inputs(module)

    def loss(parameters):
        module.update(parameters)
        return mx.sum(mx.square(module(x) - 1))

    gradients = dict(tree_flatten(mx.grad(loss)(module.trainable_parameters())))
    assert gradients.keys() == names
    detach(module)
    assert bits(module) == before


def test_layers_are_chosen_by_last_or_whole_name():
    module = nn.Module()
    module.blocks = [block("fp32"), block("4-bit")]
    assert choose_layers(module, "all") == ("blocks.0.down", "blocks.0.up", "blocks.1.down", "blocks.1.up")
    assert choose_layers(module, ["up", "blocks.0.down"]) == ("blocks.0.down", "blocks.0.up", "blocks.1.up")
    with pytest.raises(AdapterRejected, match=r"no linear layer 'q_proj'; it has down, up"):
        choose_layers(module, ["up", "q_proj"])


def test_attached_module_shows_its_plain_layers():
    module = block("fp32")
    names = set(linear_layers(module))
    attach(module, some_lora(module)[0])
    assert set(linear_layers(module)) == names == {"up", "down"}


# ---------------------------------------------------------------------------------------------------- judging
@pytest.mark.parametrize("base", BASES)
def test_good_adapter_has_no_problems(base):
    module = block(base)
    shape, weights = some_lora(module)
    assert problems(module, shape, weights) == []
    attach(module, shape, weights)
    assert problems(module, shape, weights) == []


@pytest.mark.parametrize("base", ["fp32", "4-bit"])
def test_quantised_shapes_are_those_of_dense_layers(base):
    module = block(base)
    shape, weights = some_lora(module)
    weights["up.lora_a"] = mx.zeros((8, 4))  # as many columns as a packed row has words
    assert problems(module, shape, weights) == ["up.lora_a has shape (8, 4), not (64, 4)"]


@pytest.mark.parametrize("kind", [mx.int32, mx.uint8, mx.bool_, mx.complex64])
def test_numbers_that_are_not_real_are_a_problem(kind):
    module = block("fp32")
    shape, weights = some_lora(module)
    weights["up.lora_b"] = weights["up.lora_b"].astype(kind)
    (problem,) = problems(module, shape, weights)
    assert problem.startswith("up.lora_b has values of type ") and problem.endswith("not real numbers")


def test_overflowing_product_is_a_problem():
    shape, weights = some_lora(block("fp32"), scale=300.0)
    assert problems(block("fp32"), shape, weights) == []
    assert problems(block("bf16"), shape, weights) == []
    found = ["up: its weight change overflows", "down: its weight change overflows"]
    assert problems(block("fp16"), shape, weights) == found
    weights = {name: value * 1e20 for name, value in weights.items()}
    assert problems(block("fp32"), shape, weights) == found


def test_change_norm_is_the_joint_frobenius_norm():
    module = block("fp32")
    shape, weights = some_lora(module)
    changes = [2.0 * np.array(weights[f"{key}.lora_a"]) @ np.array(weights[f"{key}.lora_b"]) for key in shape.keys]
    expected = np.sqrt(sum((change.astype(np.float64) ** 2).sum() for change in changes))
    assert change_norm(shape, weights) == pytest.approx(expected, rel=1e-5)
    zero = {name: value * (0 if name.endswith("b") else 1) for name, value in weights.items()}
    assert change_norm(shape, zero) == 0


# ---------------------------------------------------------------------------------------------------- part of the way
def test_interpolation_from_zero_scales_the_change():
    module = block("fp32")
    shape, weights = some_lora(module)
    pristine = Pristine(module)
    plain = {key: np.array(layer.weight) for key, layer in linear_layers(module).items()}
    for share in (0.0, 0.65, 1.0):
        fuse(module, shape, interpolate(weights, share))
        for key, layer in linear_layers(module).items():
            a, b = (np.array(weights[f"{key}.lora_{part}"]) for part in "ab")
            assert np.allclose(np.array(layer.weight) - plain[key], share * shape.scale * (a @ b).T, atol=1e-5)
        pristine.restore()


def test_interpolation_from_an_adapter_starts_there():
    module = block("fp32")
    shape, start = some_lora(module)
    _, learned = some_lora(module, scale=0.4)
    for share, expected in ((0.0, start), (1.0, learned)):
        found = interpolate(learned, share, start)
        assert all(mx.allclose(found[name], expected[name], atol=1e-6).item() for name in expected)


# ---------------------------------------------------------------------------------------------------- dropout
@pytest.mark.parametrize("base", ["fp32", "4-bit"])
def test_what_is_made_for_use_drops_nothing_out(base):
    """The fidelity probe would take dropout for what fuse_steps loses, and a served layer would give two answers."""
    module = block(base)
    shape, weights = some_lora(module)
    forms = []
    for dropout in (0.0, 0.5):
        module.train()
        forms.append(fuse(module, replace(shape, dropout=dropout), weights))
        module.train()  # whatever mode somebody leaves it in
        assert mx.array_equal(module(inputs(module)), module(inputs(module))).item()
        detach(module)
    assert forms == (["fused"] * 2 if base == "fp32" else ["unfused"] * 2)


def test_untrained_attached_layers_have_no_dropout():
    module = block("fp32")
    shape, weights = some_lora(module)
    attach(module, replace(shape, dropout=0.5), weights)
    assert mx.array_equal(module(inputs(module)), module(inputs(module))).item()
    module.train()
    assert not mx.array_equal(module(inputs(module)), module(inputs(module))).item()
