"""GGUF's quantised blocks as MLX's affine groups of 32 weights.

    GGUF                      MLX             change of the weights
    Q4_0, Q4_1                4 bits          none
    Q5_0, Q5_1, Q8_0          8 bits          none
    Q4_K                      4 bits          scales rounded to fp16: at most 0.8 per cent of a step
    Q5_K, Q6_K                8 bits, anew    at most an eighth of the coarser step

MLX has no groups of the last two kinds, so that their weights are requantised.

Sources: ggml-common.h (block layouts), llama.cpp convert_hf_to_gguf.py (the permutation of attn_q
and attn_k).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import ReaderTensor, dequantize
from gguf.quants import Q4_K

from specl.shared.errors import ModelError

GROUP = 32  # weights a block, in GGUF's Q4_x, Q5_x and Q8_0
CHUNK = 1 << 24  # weights that are dense in memory at a time
Quantize = Literal["keep", "4", "8", "none"]
Codes = tuple[np.ndarray, np.ndarray, np.ndarray]
DENSE = {Kind.F32: "float32", Kind.F16: "float16", Kind.BF16: "bfloat16"}
EXACT_BITS = {Kind.Q4_0: 4, Kind.Q4_1: 4, Kind.Q4_K: 4, Kind.Q5_0: 8, Kind.Q5_1: 8, Kind.Q8_0: 8}
REQUANTISED = (Kind.Q5_K, Kind.Q6_K)
SUPPORTED = (*DENSE, *EXACT_BITS, *REQUANTISED)


@dataclass(frozen=True, slots=True)
class Part:
    """One array of a safetensors file. bf16, which numpy does not have, is in `data` as uint16
    bits.
    """

    data: np.ndarray
    dtype: str

    @property
    def array(self) -> mx.array:
        """The values as an MLX array."""
        return mx.array(self.data).view(mx.bfloat16) if self.dtype == "bfloat16" else mx.array(self.data)


def unpermute_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of rotary rows: [out, ...] with out = heads * 2 * half."""
    out = rows.shape[0]
    return rows.reshape(heads, out // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unpack(blocks: np.ndarray, kind: Kind) -> Codes:
    """Codes u8 [out, in], scales f16 and biases f16 [out, in/32] from rows of blocks (u8 [out,
    bytes]).
    """
    rows = blocks.shape[0]
    if kind == Kind.Q4_K:
        return _unpack_q4_k(blocks)
    size = {Kind.Q4_0: 18, Kind.Q4_1: 20, Kind.Q5_0: 22, Kind.Q5_1: 24, Kind.Q8_0: 34}[kind]
    blocks = np.ascontiguousarray(blocks).reshape(rows, -1, size)
    scales, rest = _half(blocks[..., 0:2]), blocks[..., 2:]
    if kind == Kind.Q8_0:  # signed codes become unsigned ones
        codes = (rest.view(np.int8).astype(np.int16) + 128).astype(np.uint8)
        return codes.reshape(rows, -1), scales, (scales.astype(np.float32) * -128).astype(np.float16)
    if kind in (Kind.Q4_1, Kind.Q5_1):
        biases, rest = _half(rest[..., 0:2]), rest[..., 2:]
    else:
        biases = (scales.astype(np.float32) * (-8 if kind == Kind.Q4_0 else -16)).astype(np.float16)
    high_bits, nibbles = np.zeros((*blocks.shape[:2], 32), np.uint8), rest
    if kind in (Kind.Q5_0, Kind.Q5_1):
        high_bits, nibbles = np.unpackbits(rest[..., :4], axis=-1, bitorder="little") << np.uint8(4), rest[..., 4:]
    codes = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=-1) | high_bits  # low nibbles: the block's first half
    return codes.reshape(rows, -1), scales, biases


def _half(pairs: np.ndarray) -> np.ndarray:
    halves: np.ndarray = np.ascontiguousarray(pairs).view(np.float16)[..., 0]
    return halves


def _unpack_q4_k(blocks: np.ndarray) -> Codes:
    """Superblocks of 256: two fp16 scales over eight 6-bit scales and minima, then nibbles, 64
    weights in 32 bytes.
    """
    rows = blocks.shape[0]
    raw = np.ascontiguousarray(blocks).reshape(-1, 144)
    scale, least = Q4_K.get_scale_min(raw[:, 4:16])
    scales = _half(raw[:, 0:2]).astype(np.float32)[:, None] * scale
    biases = -_half(raw[:, 2:4]).astype(np.float32)[:, None] * least
    nibbles = raw[:, 16:].reshape(-1, 4, 1, 32)
    codes = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=2)
    return codes.reshape(rows, -1), *(x.astype(np.float16).reshape(rows, -1) for x in (scales, biases))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """MLX's packing: little-endian codes into u32 words, [out, in * bits / 32]."""
    per_word = 32 // bits
    words = codes.reshape(codes.shape[0], -1, per_word).astype(np.uint32)
    shifts = (np.arange(per_word, dtype=np.uint32) * bits).astype(np.uint32)
    packed: np.ndarray = np.bitwise_or.reduce(words << shifts, axis=-1).astype(np.uint32)
    return packed


def bits_of(tensor: ReaderTensor, quantize: Quantize) -> tuple[int, int]:
    """Bits and group that a matrix will have; (0, 0) where it stays dense."""
    inner = int(tensor.shape[0])
    if len(tensor.shape) != 2 or quantize == "none" or inner % GROUP:
        return 0, 0
    if quantize == "keep":
        if tensor.tensor_type in DENSE:
            return 0, 0
        return EXACT_BITS.get(tensor.tensor_type, 8), GROUP
    return int(quantize), 64 if inner % 64 == 0 else GROUP


def size_of(tensor: ReaderTensor, quantize: Quantize, dense: str) -> int:
    """Bytes that the converted tensor will need."""
    count = int(np.prod(tensor.shape))
    bits, group = bits_of(tensor, quantize)
    if bits:
        return count * bits // 8 + count // group * 4
    return count * (4 if dense == "float32" else 2)


def parts_of(tensor: ReaderTensor, quantize: Quantize, dense: str, heads: int | None) -> dict[str, Part]:
    """`weight`, and `scales` and `biases` where it is quantised.

    `dense` is the type of dense tensors; with `heads`, llama.cpp's permutation of rotary rows is
    undone.
    """
    bits, group = bits_of(tensor, quantize)
    if bits and quantize == "keep" and tensor.tensor_type in EXACT_BITS:
        codes, scales, biases = unpack(tensor.data, tensor.tensor_type)
        arrays = {"weight": pack(codes, bits), "scales": scales, "biases": biases}
        parts = {name: Part(array, array.dtype.name) for name, array in arrays.items()}
    elif bits:
        parts = _quantised(tensor, bits, group, dense)
    else:
        parts = {"weight": as_type(np.concatenate(list(_rows(tensor))), dense)}
    if any(part.dtype == "float16" and not np.isfinite(part.data).all() for part in parts.values()):
        raise ModelError(f"the GGUF tensor {tensor.name} has values that fp16 cannot hold")
    if heads:
        rows = {name: np.ascontiguousarray(unpermute_rows(part.data, heads)) for name, part in parts.items()}
        return {name: Part(rows[name], part.dtype) for name, part in parts.items()}
    return parts


def _rows(tensor: ReaderTensor) -> Iterator[np.ndarray]:
    """The tensor in dense fp32, CHUNK weights at a time."""
    data = tensor.data if tensor.data.ndim > 1 else tensor.data[None]
    step = max(1, CHUNK // int(tensor.shape[0]))
    for start in range(0, data.shape[0], step):
        values = dequantize(np.ascontiguousarray(data[start : start + step]), tensor.tensor_type)
        yield np.asarray(values, dtype=np.float32) if tensor.data.ndim > 1 else np.asarray(values, np.float32)[0]


def _quantised(tensor: ReaderTensor, bits: int, group: int, dense: str) -> dict[str, Part]:
    chunks: list[list[np.ndarray]] = [[], [], []]
    for rows in _rows(tensor):
        for chunk, array in zip(chunks, mx.quantize(mx.array(rows), group, bits), strict=True):
            chunk.append(np.array(array))
    weight, scales, biases = (np.concatenate(chunk) for chunk in chunks)
    half = "float16" if dense == "float32" else dense
    return {"weight": Part(weight, "uint32"), "scales": as_type(scales, half), "biases": as_type(biases, half)}


def as_type(values: np.ndarray, dtype: str) -> Part:
    """fp32 values in another type; bf16 is rounded to nearest even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return Part(np.ascontiguousarray(values, dtype=dtype), dtype)
    return Part(np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16)), dtype)
