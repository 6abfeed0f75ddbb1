"""GGUF to an mlx-lm directory: config, weights under mlx-lm's names, tokenizer and chat template.

gguf_tensors.py converts the blocks. Knows files, no names of models. Promises: what it has written
loads, or it raises.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from gguf import ReaderTensor
from safetensors import SafetensorError
from safetensors.numpy import save_file

from specl.shared.errors import ModelError
from specl.shared.models.gguf_config import Header, end_tokens, model_config, wrong_values
from specl.shared.models.gguf_tensors import DENSE, GROUP, SUPPORTED, Part, Quantize, bits_of, parts_of, size_of

SHARD = 1 << 30  # bytes of weights held at once
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
_CONFIG_TENSORS = ("rope_freqs",)  # part of the config, not weights


def mlx_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj`. Raises ModelError for a tensor
    not known.
    """
    parts = gguf_name.rsplit(".", 1)[0].split(".")
    if parts[0] == "blk" and len(parts) == 3 and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}"
    if len(parts) == 1 and parts[0] in _TOP_NAMES:
        return _TOP_NAMES[parts[0]]
    raise ModelError(f"the GGUF file holds a tensor this program does not know: {gguf_name}")


def _tensors(header: Header) -> list[ReaderTensor]:
    """The tensors that become weights. Raises ModelError that names every unknown quantisation."""
    tensors = [tensor for tensor in header.reader.tensors if not tensor.name.startswith(_CONFIG_TENSORS)]
    unknown = sorted({tensor.tensor_type.name for tensor in tensors if tensor.tensor_type not in SUPPORTED})
    if unknown:
        raise ModelError(
            f"{header.path.name}: GGUF quantisation {', '.join(unknown)} is not supported; "
            f"{', '.join(kind.name for kind in SUPPORTED)} are"
        )
    return tensors


def _dense_type(tensors: list[ReaderTensor], quantize: Quantize) -> str:
    """The type of dense tensors: that of the matrices; fp16 if some are blocks, whose scales are
    fp16.
    """
    kinds = {DENSE.get(tensor.tensor_type, "blocks") for tensor in tensors if len(tensor.shape) == 2}
    if kinds == {"float32"} and quantize in ("keep", "none"):
        return "float32"
    return "bfloat16" if kinds <= {"bfloat16", "float32"} and "bfloat16" in kinds else "float16"


def size_needed(gguf: Path, quantize: Quantize = "keep") -> int:
    """Bytes that the converted model will take, within a few MB. Raises ModelError for what cannot
    be converted.
    """
    with wrong_values(gguf):
        header = Header(gguf)
        tensors = _tensors(header)
        dense = _dense_type(tensors, quantize)
        return sum(size_of(tensor, quantize, dense) for tensor in tensors) + (32 << 20)


def _weights(
    header: Header, config: dict[str, Any], quantize: Quantize, exact: bool
) -> Iterator[tuple[str, dict[str, Part], int, int]]:
    """(module name, its arrays, bits, group size) of every tensor."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    permuted = heads if header.architecture == "llama" else {}  # llama.cpp reorders rotary rows of this family only
    tensors = _tensors(header)
    dense = "float32" if exact else _dense_type(tensors, quantize)
    for tensor in tensors:
        name, suffix = mlx_name(tensor.name), tensor.name.rsplit(".", 1)[-1]
        parts = parts_of(tensor, quantize, dense, permuted.get(name.rsplit(".", 1)[-1]))
        if suffix == "bias":
            parts = {"bias": parts["weight"]}
        yield name, {f"{name}.{part}": value for part, value in parts.items()}, *bits_of(tensor, quantize)


class _Shards:
    """Writes safetensors files of about a GiB each, so that a large model is never completely in
    memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.written = folder, 0
        self.names: set[str] = set()
        self._pending: dict[str, Part] = {}

    def add(self, parts: dict[str, Part]) -> None:
        self.names |= parts.keys()
        self._pending |= parts
        if sum(part.data.nbytes for part in self._pending.values()) >= SHARD:
            self._write(f"model-{self.written + 1:05d}.safetensors")

    def _write(self, name: str) -> None:
        path, metadata = str(self.folder / name), {"format": "mlx"}
        try:
            if any(part.dtype == "bfloat16" for part in self._pending.values()):  # unknown to numpy
                mx.save_safetensors(path, {key: part.array for key, part in self._pending.items()}, metadata)
            else:
                save_file({key: part.data for key, part in self._pending.items()}, path, metadata)
        except (SafetensorError, RuntimeError) as error:  # what these writers raise on a full disk
            raise OSError(f"{name}: {error}") from error
        self.written += 1
        self._pending = {}

    def close(self) -> None:
        if self._pending:
            self._write(f"model-{self.written + 1:05d}.safetensors" if self.written else "model.safetensors")


def convert(gguf: Path, folder: Path, quantize: Quantize = "keep", exact: bool = False) -> None:
    """Write an mlx-lm model directory, tokenizer and chat template included. Raises ModelError for
    what it cannot read, OSError where the disk refuses.

    `quantize`: `keep` takes the file's blocks as they are, `4` and `8` quantise anew, `none` makes
    everything dense. `exact` also keeps norms in fp32 (the built-in model, by whose bytes its
    drafts know it).
    """
    with wrong_values(gguf):
        _convert(Header(gguf), folder, quantize, exact)


def _convert(header: Header, folder: Path, quantize: Quantize, exact: bool) -> None:
    from specl.shared.models.gguf_tokenizer import write_tokenizer

    config = model_config(header)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _Shards(folder)
    quantization: dict[str, Any] = {"group_size": GROUP, "bits": 4}
    quantised = False
    for name, parts, bits, group in _weights(header, config, quantize, exact):
        shards.add(parts)
        quantised = quantised or bool(bits)
        if bits and (bits, group) != (4, GROUP):
            quantization[name] = {"group_size": group, "bits": bits}
    shards.close()
    if quantised:
        config["quantization"] = quantization
    config["tie_word_embeddings"] = not any(name.startswith("lm_head") for name in shards.names)
    write_tokenizer(header, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ends = end_tokens(header)
    if not exact and len(ends) > 1:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    _check_loads(folder, header.path.name)


def _check_loads(folder: Path, name: str) -> None:
    """Every tensor that the architecture needs must be there, in its shape."""
    from mlx_lm.utils import load_model

    try:
        load_model(folder, lazy=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever the architecture's code stumbles over
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{name} does not hold a whole model: {reason}") from error
