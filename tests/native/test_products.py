"""Every format, width and instruction set against float64; the same bits whatever the width and the machine."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specl.shared import native
from specl.shared.native import extension, packing

PLAIN = ["f32", "bf16"]
AFFINE = [(4, 32, True), (4, 32, False), (4, 64, True), (4, 64, False), (4, 128, False)]
AFFINE += [(8, 32, True), (8, 32, False), (8, 64, True), (8, 64, False), (8, 16, False), (8, 128, True)]


def make(form, n, k, seed):
    """A packed matrix and the fp32 weights it stands for."""
    noise = np.random.default_rng(seed)
    if isinstance(form, str):
        dense = noise.standard_normal((n, k)).astype(np.float32)
        if form == "bf16":
            dense = np.array(mx.array(dense).astype(mx.bfloat16).astype(mx.float32))
        return extension.native().pack_float(mx.array(dense), form), dense
    bits, group, half = form
    k = -(-k // group) * group
    values = noise.integers(0, 2**bits, (n, k)).astype(np.uint8)
    scales, offsets = (noise.standard_normal((n, k // group)).astype(np.float32) for _ in range(2))
    if half:
        scales, offsets = (part.astype(np.float16).astype(np.float32) for part in (scales, offsets))
    # one rounding, as the kernels' fused multiply-add has
    repeat = [np.repeat(part.astype(np.float64), group, 1) for part in (scales, offsets)]
    dense = (repeat[0] * values + repeat[1]).astype(np.float32)
    return packing.pack_affine(packing.Affine(bits, group, values, scales, offsets)), dense


def product(x, packed, bias=None):
    return np.array(extension.native().linear(mx.array(x), packed, bias))


@pytest.mark.parametrize("form", PLAIN + AFFINE, ids=str)
def test_a_packed_matrix_gives_back_its_weights(form):
    packed, dense = make(form, 13, 130, 1)
    assert np.array_equal(np.array(packed.unpack()), dense)
    if not isinstance(form, str):
        assert packed.format == f"q{form[0]}g{min(form[1], 64)}{'h' if form[2] else 'f'}"


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(PLAIN + AFFINE),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    width=st.integers(1, 40),
    biased=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_agree_with_float64(form, n, k, width, biased, seed):
    packed, dense = make(form, n, k, seed)
    noise = np.random.default_rng(seed + 1)
    x = noise.standard_normal((width, dense.shape[1])).astype(np.float32)
    bias = noise.standard_normal(n).astype(np.float32)
    right = x.astype(np.float64) @ dense.astype(np.float64).T + biased * bias
    # fp32 sums of k terms: a share of the sum of magnitudes
    room = np.abs(x.astype(np.float64)) @ np.abs(dense.astype(np.float64)).T + 1e-6
    for isa in native.instruction_sets():
        native.use_instruction_set(isa)
        got = product(x, packed, mx.array(bias) if biased else None)
        assert np.all(np.abs(got - right) <= 4e-7 * room + biased * 1e-6), isa


@pytest.mark.parametrize("form", PLAIN + AFFINE, ids=str)
@pytest.mark.parametrize("shape", [(37, 576), (8, 64), (5, 1700)], ids=str)
def test_row_is_bit_identical_at_every_width(form, shape):
    packed, dense = make(form, *shape, 3)
    x = np.random.default_rng(4).standard_normal((16, dense.shape[1])).astype(np.float32)
    alone = product(x[:1], packed)
    wide = product(x, packed)
    assert np.array_equal(alone, wide[:1])
    for isa in native.instruction_sets():
        native.use_instruction_set(isa)
        for width in range(1, 17):
            assert np.array_equal(product(x[:width], packed), wide[:width]), (isa, width)


def test_threads_do_not_change_a_bit():
    packed, dense = make("bf16", 1000, 576, 5)
    x = np.random.default_rng(6).standard_normal((5, dense.shape[1])).astype(np.float32)
    native.set_threads(1)
    alone = product(x, packed)
    for threads in (2, 3, 7):
        native.set_threads(threads)
        for _ in range(20):
            assert np.array_equal(product(x, packed), alone)


def test_lazy_input_equals_evaluated_input():
    packed, _ = make("bf16", 40, 64, 7)
    x = mx.array(np.random.default_rng(8).standard_normal((3, 64)).astype(np.float32))
    lazy = extension.native().linear(mx.transpose(mx.transpose(x) * 1.0), packed)
    assert mx.array_equal(lazy, extension.native().linear(x, packed))


@pytest.mark.parametrize("bad", ["type", "length", "bias"])
def test_inputs_that_do_not_fit_are_refused(bad):
    packed, _ = make("f32", 8, 64, 9)
    x = mx.zeros((2, 32 if bad == "length" else 64), mx.float16 if bad == "type" else mx.float32)
    with pytest.raises(ValueError, match=r"float32|length|bias"):
        extension.native().linear(x, packed, mx.zeros((3,)) if bad == "bias" else None)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 32), (8, 64)])
def test_mlx_quantised_weights_are_read(bits, group):
    dense = mx.random.normal((24, 256), key=mx.random.key(1))
    quantised = mx.quantize(dense, group, bits)
    packed = packing.pack_affine(packing.affine_from_mlx(*quantised, bits=bits, group_size=group))
    back = mx.dequantize(*quantised, group, bits)
    assert mx.allclose(packed.unpack(), back, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K"])
def test_gguf_blocks_are_read_exactly(kind):
    gguf = pytest.importorskip("gguf")
    noise = np.random.default_rng(2)
    form = gguf.GGMLQuantizationType[kind]
    if kind == "Q6_K":  # gguf cannot write it: any bytes are a valid block but for the scale
        raw = noise.integers(0, 256, (6, 2, 210)).astype(np.uint8)
        raw[..., 208:] = np.array([0.013], np.float16).view(np.uint8)
        raw = raw.reshape(6, -1)
    else:
        raw = gguf.quants.quantize(noise.standard_normal((6, 256)).astype(np.float32), form)
    packed = packing.pack_affine(packing.affine_from_gguf(raw, kind))
    assert np.array_equal(np.array(packed.unpack()), gguf.quants.dequantize(raw, form).astype(np.float32))


def test_automatic_packing_never_rounds():
    dense = mx.random.normal((16, 128), key=mx.random.key(3))
    assert packing.pack(dense).format == "f32"
    assert packing.pack(dense.astype(mx.bfloat16).astype(mx.float32)).format == "bf16"
    affine = packing.affine_from_mlx(*mx.quantize(dense, 32, 4), bits=4, group_size=32)
    exact = packing.pack_affine(affine).unpack()
    assert packing.pack(exact, exact=affine).format.startswith("q4")
    assert packing.pack(exact + 1e-3, exact=affine).format == "f32"


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), n=st.integers(1, 400), k=st.integers(1, 32), seed=st.integers(0, 2**32 - 1))
def test_row_stats_agree_with_numpy(rows, n, k, seed):
    k = min(k, n)
    # few distinct values, so that ties are met
    logits = np.random.default_rng(seed).integers(-30, 30, (rows, n)).astype(np.float32)
    for isa in native.instruction_sets():
        native.use_instruction_set(isa)
        stats = native.row_stats(mx.array(logits), k)
        assert np.array_equal(np.array(stats.argmax), logits.argmax(1))
        wide = logits.astype(np.float64)
        exact = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1)) + wide.max(1)
        assert np.allclose(np.array(stats.logsumexp), exact, rtol=1e-6, atol=1e-5)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        assert np.array_equal(np.array(stats.ids), order)
        assert np.array_equal(np.array(stats.logits), np.take_along_axis(logits, order, 1))
