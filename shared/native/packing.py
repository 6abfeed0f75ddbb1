"""Weights in the formats that the kernels read, and which format a matrix gets.

Knows the affine form (value * scale + offset by group) that MLX's quantisation and GGUF's block
formats share. Does not know models. Promises: `pack` with "auto" takes only a format whose weights
are bit for bit the dense ones.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import mlx.core as mx
import numpy as np

from specl.shared.native.extension import native

Weights = Literal["auto", "exact", "f32", "bf16", "q8", "q4"]


class Matrix(Protocol):
    """A packed weight of the extension (`_native.Matrix`). `shape` is (rows, inputs)."""

    format: str
    nbytes: int
    shape: tuple[int, int]

    def unpack(self) -> mx.array:
        """The dense weight, fp32 [rows, inputs]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """A matrix as whole numbers of `bits` bits: weight = value * scale + offset, a scale and an
    offset a group.
    """

    bits: int
    group: int
    values: np.ndarray  # uint8 [rows, inputs]
    scales: np.ndarray  # float32 [rows, inputs / group]
    offsets: np.ndarray

    def rows(self, order: np.ndarray) -> "Affine":
        """This matrix with its rows reordered or selected (llama.cpp permutes the rows of q and k)."""
        return Affine(self.bits, self.group, self.values[order], self.scales[order], self.offsets[order])


def affine_from_gguf(data: np.ndarray, kind: str) -> Affine | None:
    """A tensor of a GGUF file: `data` its rows of blocks (as gguf's reader gives them), `kind` its
    type's name.

    Exact for Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q6_K; None for any other type.
    """
    block = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q6_K": 210}.get(kind)
    if block is None or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] % block:
        return None
    n = data.shape[0]
    raw = np.ascontiguousarray(data).reshape(n, -1, block)
    if kind == "Q6_K":
        return _q6_k(raw)
    scale = _halves(raw[..., :2])
    at = 2
    if kind in ("Q4_1", "Q5_1"):
        offset, at = _halves(raw[..., 2:4]), 4
    else:
        offset = scale * {"Q4_0": -8.0, "Q5_0": -16.0, "Q8_0": -128.0}[kind]
    if kind == "Q8_0":
        values = (raw[..., at:].view(np.int8).astype(np.int16) + 128).astype(np.uint8)
        return Affine(8, 32, values.reshape(n, -1), scale, offset.astype(np.float32))
    high: np.ndarray = np.zeros((*raw.shape[:2], 32), np.uint8)
    if kind in ("Q5_0", "Q5_1"):
        high = np.unpackbits(raw[..., at : at + 4], axis=-1, bitorder="little") << 4
        at += 4
    nibbles = raw[..., at:]
    values = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1) | high
    bits = 4 if kind.startswith("Q4") else 8
    return Affine(bits, 32, values.reshape(n, -1), scale, offset.astype(np.float32))


def _halves(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16)[..., 0].astype(np.float32)


def _q6_k(raw: np.ndarray) -> Affine:
    """Blocks of 256: low nibbles, high pairs of bits, sixteen signed scales, one fp16 scale over
    them.
    """
    n = raw.shape[0]
    low, high = raw[..., :128].reshape(n, -1, 2, 2, 32), raw[..., 128:192].reshape(n, -1, 2, 1, 32)
    nibbles = np.concatenate([low & 15, low >> 4], axis=3)
    pairs = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=3)
    values = nibbles | (pairs << 4)
    scale = (_halves(raw[..., 208:210])[..., None] * raw[..., 192:208].view(np.int8)).astype(np.float32)
    scale = scale.reshape(n, -1)
    return Affine(8, 16, values.reshape(n, -1), scale, scale * np.float32(-32))


def affine_from_mlx(weight: mx.array, scales: mx.array, biases: mx.array, *, bits: int, group_size: int) -> Affine:
    """MLX's affine quantisation, as `mx.quantize` packs it."""
    per_word = 32 // bits
    words = np.array(weight)
    shifts = np.arange(per_word, dtype=np.uint32) * bits
    values = ((words[..., None] >> shifts) & np.uint32(2**bits - 1)).astype(np.uint8).reshape(words.shape[0], -1)
    return Affine(bits, group_size, values, *(np.array(part.astype(mx.float32)) for part in (scales, biases)))


def pack(dense: mx.array, weights: Weights = "auto", exact: Affine | None = None) -> Matrix:
    """A matrix for the kernels.

    "auto": `exact` where it equals `dense` bit for bit, else bf16 where that loses nothing, else
    fp32. "exact": `exact` without a comparison, for rows of a matrix that was compared as a whole.
    """
    if weights == "exact" and exact is not None:
        return pack_affine(exact)
    if weights in ("exact", "auto"):
        return _pack_lossless(dense, exact)
    if weights in ("f32", "bf16"):
        return _pack_float(dense, weights)
    if dense.shape[1] % 32:
        return _pack_float(dense, "bf16")
    bits = 8 if weights == "q8" else 4
    return pack_affine(affine_from_mlx(*mx.quantize(dense, 32, bits), bits=bits, group_size=32))


def _pack_lossless(dense: mx.array, exact: Affine | None) -> Matrix:
    if exact is not None and exact.values.shape == dense.shape:
        packed = pack_affine(exact)
        if mx.array_equal(packed.unpack(), dense).item():
            return packed
    rounded = dense.astype(mx.bfloat16).astype(mx.float32)
    return _pack_float(dense, "bf16" if mx.array_equal(rounded, dense).item() else "f32")


def _pack_float(dense: mx.array, format: str) -> Matrix:
    matrix: Matrix = native().pack_float(dense, format)
    return matrix


def pack_affine(affine: Affine) -> Matrix:
    """Affine weights as they are."""
    parts = (mx.array(part) for part in (affine.values, affine.scales, affine.offsets))
    matrix: Matrix = native().pack_affine(*parts, affine.bits, affine.group)
    return matrix


def can_pack(bits: int, group: int) -> bool:
    """Whether the kernels have a layout for these affine weights."""
    return (bits, group) in {(4, 32), (4, 64), (4, 128), (8, 32), (8, 64), (8, 128), (8, 16)}
