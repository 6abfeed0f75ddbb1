"""A GGUF file's header as an mlx-lm config. A file that is none, cut or split is one sentence,
never a crash.

Knows the `llama` and `qwen2` architectures. Sources: the GGUF
specification, llama.cpp's convert_hf_to_gguf.py.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from specl.shared.errors import ModelError, model_error
from specl.shared.models.gguf_header import HINT, check_header

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
MAX_SIZE = 1 << 26  # of a width, a number of heads or a context
_REQUIRED = object()
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6  # llama.cpp's LLAMA_TOKEN_TYPE_*
# tokens that end an answer in the chat formats of these families; a file names only one of them
_ENDS = {"<|eot_id|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<|end|>", "</s>"}
# control tokens whatever a file says (llama.cpp, llama-vocab.cpp), and what begins a turn beside them
_TURNS = _ENDS - {"</s>"} | {"<end_of_turn>", "<EOT>", "_<EOT>", "[EOT]", "<|im_start|>", "<start_of_turn>"}


@contextmanager
def wrong_values(path: Path) -> Iterator[None]:
    """Turns what the conversion stumbles over in a file's values into a ModelError. What the disk
    raises (OSError) passes.
    """
    try:
        yield
    except (ModelError, OSError, MemoryError):
        raise
    except Exception as error:  # numbers and texts of a foreign file: any of them may have another type or range
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path.name} holds values that make no model: {type(error).__name__} {reason}") from error


class Header:
    """An open GGUF file: its keys and tensors. Raises ModelError where the file is none, cut or
    split.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            check_header(path)
            self.reader = GGUFReader(path)
        except OSError as error:
            raise model_error(f"{path} cannot be read: {error.strerror or error}", "", error) from error
        except (ModelError, MemoryError):
            raise
        except Exception as error:  # the reader checks nothing: it raises whatever it stumbles over
            raise ModelError(f"{path} is not a whole GGUF file", HINT) from error
        self.architecture = self.key("general.architecture")
        if not isinstance(self.architecture, str) or self.architecture not in ARCHITECTURES:
            known = " and ".join(f"`{name}`" for name in ARCHITECTURES)
            raise ModelError(f"{path.name}: GGUF architecture {self.architecture!r} is not supported; {known} are")
        if self.key("split.count", 1) != 1:
            raise ModelError(f"{path.name} is one part of a split model", "join them with `llama-gguf-split --merge`")

    def key(self, name: str, default: Any = _REQUIRED) -> Any:
        """A value by its full name. Raises ModelError where it is missing and has no default."""
        field = self.reader.fields.get(name)
        if field is not None:
            return field.contents()
        if default is _REQUIRED:
            raise ModelError(f"{self.path.name}: the GGUF file has no {name}")
        return default

    def architecture_key(self, name: str, default: Any = _REQUIRED) -> Any:
        """A value whose full name begins with the architecture, for example `llama.block_count`."""
        return self.key(f"{self.architecture}.{name}", default)


def model_config(header: Header) -> dict[str, Any]:
    """config.json as mlx-lm reads it, without `quantization` and `tie_word_embeddings`, which the
    tensors decide.
    """
    heads, width = header.architecture_key("attention.head_count"), header.architecture_key("embedding_length")
    _check_counts(header)
    config = {
        "model_type": header.architecture,
        "architectures": [ARCHITECTURES[header.architecture]],
        "hidden_size": width,
        "num_hidden_layers": header.architecture_key("block_count"),
        "intermediate_size": header.architecture_key("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.architecture_key("attention.head_count_kv", heads),
        "rms_norm_eps": round(_real(header, "attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": _real(header, "rope.freq_base", 10000.0),
        "max_position_embeddings": header.architecture_key("context_length"),
        "vocab_size": _vocabulary(header),
        "eos_token_id": header.key("tokenizer.ggml.eos_token_id"),
        "bos_token_id": header.key("tokenizer.ggml.bos_token_id", None),
    }
    size = header.architecture_key("attention.key_length", width // heads)
    if size != width // heads:
        if header.architecture == "qwen2":
            raise ModelError(f"{header.path.name}: qwen2 with heads of {size} is not supported")
        config["head_dim"] = size
    if header.architecture_key("rope.dimension_count", size) != size:
        raise ModelError(f"{header.path.name}: rotary positions over a part of each head are not supported")
    if scaling := _rope_scaling(header, config["rope_theta"], size):
        config["rope_scaling"] = scaling
    return config


def _real(header: Header, name: str, default: Any = _REQUIRED) -> Any:
    """A positive number. Raises ModelError."""
    value = header.architecture_key(name, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ModelError(f"{header.path.name}: {header.architecture}.{name} is {value!r:.60}")
    return value


def _check_counts(header: Header) -> None:
    """Sizes must be counts, and a layer has tensors: `block_count` alone would make any number of
    layers. Raises ModelError.
    """
    tensors = len(header.reader.tensors)
    limits = {"block_count": tensors, "attention.head_count": MAX_SIZE, "embedding_length": MAX_SIZE}
    limits |= {"feed_forward_length": MAX_SIZE, "context_length": MAX_SIZE}
    for name, limit in limits.items():
        value = header.architecture_key(name)
        if type(value) is not int or not 0 < value <= limit:
            raise ModelError(f"{header.path.name}: {header.architecture}.{name} is {value!r:.60}")


def _vocabulary(header: Header) -> int:
    """Rows of the embedding, which may be more than the tokenizer has tokens."""
    rows = [int(tensor.shape[1]) for tensor in header.reader.tensors if tensor.name == "token_embd.weight"]
    return rows[0] if rows else len(header.key("tokenizer.ggml.tokens"))


def _rope_scaling(header: Header, theta: float, size: int) -> dict[str, Any] | None:
    """`rope_scaling` of the config; None where positions are not scaled."""
    factors = next((t for t in header.reader.tensors if t.name == "rope_freqs.weight"), None)
    if factors is not None:
        return _llama3(header, np.array(factors.data, dtype=np.float64).reshape(-1), theta, size)
    kind = header.architecture_key("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _real(header, "rope.scaling.factor")}
    raise ModelError(f"{header.path.name}: rotary scaling {kind!r} is not supported; `linear` and llama 3's are")


def _llama3(header: Header, factors: np.ndarray, theta: float, size: int) -> dict[str, Any]:
    """Llama 3.1's `rope_scaling` from the factors that llama.cpp stores instead; the other numbers
    are the published ones.
    """
    factor, low, high, old = round(float(factors.max()), 3), 1.0, 4.0, 8192
    wavelength = 2 * np.pi * theta ** (np.arange(0, size, 2) / size)
    smooth = (old / wavelength - low) / (high - low)
    expected = np.where(wavelength > old / low, factor, 1 / ((1 - smooth) / factor + smooth))
    expected = np.where(wavelength < old / high, 1.0, expected)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise ModelError(
            f"{header.path.name}: its rotary factors are not those of Llama 3.1, so they are not supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": old,
    }


def token_kinds(header: Header) -> list[int]:
    """The type of every token. What looks like the end of a turn, or is named as one, is a control
    token: many files say NORMAL, and then it would be cut into pieces and end nothing.
    """
    tokens = header.key("tokenizer.ggml.tokens")
    kinds = list(header.key("tokenizer.ggml.token_type"))
    named = {header.key(f"tokenizer.ggml.{name}_token_id", None) for name in ("eos", "eot", "eom")}
    for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind in (NORMAL, USER) and (token in _TURNS or id in named):
            kinds[id] = CONTROL
    return kinds


def end_tokens(header: Header) -> list[int]:
    """Every token that ends an answer: those that the file names, and those with a known text."""
    named = [header.key(f"tokenizer.ggml.{name}_token_id", None) for name in ("eos", "eot", "eom")]
    kinds = token_kinds(header)
    known = [i for i, token in enumerate(header.key("tokenizer.ggml.tokens")) if token in _ENDS and kinds[i] != NORMAL]
    return list(dict.fromkeys(i for i in [*named, *known] if i is not None))
