"""GGUF to an mlx-lm directory, without a change of any weight: Q4_1 and Q8_0 blocks are MLX's affine format with
groups of 32, so their codes are repacked, not requantised. `llama` files only; other architectures are refused by name.

Sources: ggml-common.h (block layouts), llama.cpp convert_hf_to_gguf.py (the permutation of attn_q and attn_k).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, dequantize

from specl.shared.errors import ModelError

GROUP = 32  # weights a block, in GGUF's Q4_1 and Q8_0
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_DENSE = {Kind.F32, Kind.F16, Kind.BF16}


def mlx_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj`. Raises ModelError for a tensor not known."""
    parts = gguf_name.removesuffix(".weight").split(".")
    if parts[0] == "blk" and len(parts) == 3 and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}"
    if len(parts) == 1 and parts[0] in _TOP_NAMES:
        return _TOP_NAMES[parts[0]]
    raise ModelError(f"the GGUF file holds a tensor this program does not know: {gguf_name}")


def unpermute_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of rotary rows: [out, ...] with out = heads * 2 * half."""
    out = rows.shape[0]
    return rows.reshape(heads, out // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unpack_q4_1(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes u8 [out, in], scales f16 and biases f16 [out, in/32] from rows of Q4_1 blocks (u8 [out, n*20])."""
    blocks = blocks.reshape(blocks.shape[0], -1, 20)
    scales, biases = blocks[..., 0:2].copy().view(np.float16)[..., 0], blocks[..., 2:4].copy().view(np.float16)[..., 0]
    nibbles = blocks[..., 4:]
    codes = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=-1)  # low nibbles are the block's first half
    return codes.reshape(blocks.shape[0], -1), scales, biases


def unpack_q8_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same from rows of Q8_0 blocks (u8 [out, n*34]): signed codes become unsigned ones with bias -128 * scale."""
    blocks = blocks.reshape(blocks.shape[0], -1, 34)
    scales = blocks[..., 0:2].copy().view(np.float16)[..., 0]
    codes = (blocks[..., 2:].copy().view(np.int8).astype(np.int16) + 128).astype(np.uint8)
    return codes.reshape(blocks.shape[0], -1), scales, (scales.astype(np.float32) * -128).astype(np.float16)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """MLX's packing: little-endian codes into u32 words, [out, in * bits / 32]."""
    per_word = 32 // bits
    words = codes.reshape(codes.shape[0], -1, per_word).astype(np.uint32)
    shifts = (np.arange(per_word, dtype=np.uint32) * bits).astype(np.uint32)
    return np.bitwise_or.reduce(words << shifts, axis=-1).astype(np.uint32)


def _settings(reader: GGUFReader) -> dict[str, Any]:
    architecture = reader.fields["general.architecture"].contents()
    if architecture != "llama":
        raise ModelError(f"GGUF architecture {architecture!r} is not supported; `llama` is")

    def get(name: str, default: Any = None) -> Any:
        field = reader.fields.get(f"llama.{name}")
        return field.contents() if field else default

    heads = get("attention.head_count")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "rms_norm_eps": round(get("attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": get("rope.freq_base", 10000.0),
        "max_position_embeddings": get("context_length"),
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].contents()),
        "eos_token_id": reader.fields["tokenizer.ggml.eos_token_id"].contents(),
        "bos_token_id": reader.fields["tokenizer.ggml.bos_token_id"].contents(),
    }


def _tensors(reader: GGUFReader, config: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Weights under mlx-lm's names, and its `quantization` entry."""
    weights: dict[str, np.ndarray] = {}
    quantization: dict[str, Any] = {"group_size": GROUP, "bits": 4}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        name = mlx_name(tensor.name)
        permuted = heads.get(name.rsplit(".", 1)[-1])
        if tensor.tensor_type in _DENSE:
            parts = {"weight": dequantize(tensor.data, tensor.tensor_type)}
        elif tensor.tensor_type in (Kind.Q4_1, Kind.Q8_0):
            bits = 4 if tensor.tensor_type == Kind.Q4_1 else 8
            codes, scales, biases = (unpack_q4_1 if bits == 4 else unpack_q8_0)(tensor.data)
            parts = {"weight": pack(codes, bits), "scales": scales, "biases": biases}
            if bits != quantization["bits"]:
                quantization[name] = {"group_size": GROUP, "bits": bits}
        else:
            raise ModelError(
                f"GGUF quantisation {tensor.tensor_type.name} ({tensor.name}) is not supported; Q4_1, Q8_0 and F16 are"
            )
        for part, value in parts.items():
            weights[f"{name}.{part}"] = np.ascontiguousarray(unpermute_rows(value, permuted) if permuted else value)
    return weights, quantization


def convert(gguf: Path, folder: Path) -> None:
    """Write an mlx-lm model directory, tokenizer and chat template included. Raises ModelError for what it cannot read."""
    from safetensors.numpy import save_file

    from specl.shared.models.gguf_tokenizer import write_tokenizer

    reader = GGUFReader(gguf)
    config = _settings(reader)
    weights, config["quantization"] = _tensors(reader, config)
    config["tie_word_embeddings"] = not any(name.startswith("lm_head") for name in weights)
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "mlx"})
    write_tokenizer(reader, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
