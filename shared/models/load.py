"""Loads a language model by name: weights, tokenizer and fingerprints, and checks that it can be
served speculatively.

Precision: dense fp32 on CPU, where MLX's half and quantised kernels are scalar (measured: 117 ms
for one row of 8192x2048 in 4 bits against 6 in dense fp32); the model's own quantisation on Metal
and CUDA.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load_model, load_tokenizer

from specl.shared.errors import ModelError, model_error
from specl.shared.models.chat_prompt import content_form
from specl.shared.models.cpu_kernels import AS_LOADED, blocks_of, on_cpu, use_cpu_kernels
from specl.shared.models.find import ensure_model
from specl.shared.models.language_model import LanguageModel
from specl.shared.models.report import Report, no_report

SAMPLES = 32  # places at which a weights file is read for its fingerprint
SAMPLE_BYTES = 64 * 1024  # read at each of them
_REWINDABLE = (KVCache, QuantizedKVCache)


def load(
    name: str, models: Path, precision: str = "auto", report: Report = no_report, path: Path | None = None
) -> LanguageModel:
    """Load a model by name, from the folder `path` where the caller knows it already.

    Raises ModelError for a missing model, an unsupported architecture or a missing tokenizer,
    ModelUnavailable where the network or the disk failed.
    """
    path = path or ensure_model(name, models, report)
    try:
        model, config = load_model(path, lazy=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged config raises whatever the architecture's code stumbles over
        raise model_error(f"the model {name} cannot be loaded: {_first_line(error)}", "", error) from error
    if not hasattr(model, "model") or not (hasattr(model, "lm_head") or hasattr(model.model, "embed_tokens")):
        raise ModelError(
            f"{name}: architecture {config.get('model_type')!r} is not supported: it hides its last hidden state"
        )
    _check_rewindable(name, model)
    try:
        tokenizer = load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # transformers raises many kinds for a missing or broken tokenizer
        raise model_error(f"{name} has no usable tokenizer: {_first_line(error)}", "", error) from error
    vocabulary = _tokenizer_fingerprint(tokenizer)
    limit_tokens(name, tokenizer, _embedding_rows(model, config))
    form = content_form(name, tokenizer)
    blocks, kernels = {}, AS_LOADED
    if precision == "fp32" or (precision == "auto" and on_cpu()):
        blocks = blocks_of(model) if on_cpu() else {}
        model = to_dense_fp32(model)
    mx.eval(model.parameters())
    if on_cpu():
        kernels = use_cpu_kernels(model, blocks)
    loaded = LanguageModel(name, path, model, tokenizer, config, fingerprint(path), vocabulary, blocks, kernels, form)
    _check_split(loaded)
    return loaded


def fingerprint(folder: Path) -> str:
    """A name for the weights: sha256 over config, sizes and 32 samples of each weights file (whole
    for small files).
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("model*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with open(path, "rb") as file:
            for sample in range(SAMPLES):
                file.seek(size * sample // SAMPLES)
                digest.update(file.read(min(SAMPLE_BYTES, size // SAMPLES + 1)))
    return digest.hexdigest()[:16]


def _tokenizer_fingerprint(tokenizer: TokenizerWrapper) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def _embedding_rows(model: nn.Module, config: dict[str, Any]) -> int:
    """Token ids that the embedding has a row for: all below this number."""
    rows = int(model.model.embed_tokens.weight.shape[0])
    return min(rows, int(config.get("vocab_size") or rows))


def limit_tokens(name: str, tokenizer: TokenizerWrapper, rows: int) -> None:
    """Let the tokenizer write ids below `rows` only: MLX reads foreign memory for any other.

    Many published models have an added token more than their embedding has rows (`[PAD]` = 32000).
    Such tokens are taken out, so that their text is text. Raises ModelError where that is not
    possible.
    """
    beyond = {token for token, id in tokenizer.get_vocab().items() if not 0 <= id < rows}
    if not beyond:
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if 0 <= token["id"] < rows]
        pieces = state["model"].get("vocab")
        if isinstance(pieces, dict):  # an added token may also stand in the vocabulary itself
            written = {part for merge in state["model"].get("merges", ()) for part in _parts(merge)}
            for token in beyond - written:
                pieces.pop(token, None)
        try:
            backend.__setstate__(json.dumps(state).encode())
        except Exception:  # a template of the post-processor may need the token
            backend = None
    if backend is None or any(not 0 <= id < rows for id in backend.get_vocab().values()):
        raise ModelError(
            f"{name}: its tokenizer has {len(beyond)} tokens that its embedding of {rows} rows does not hold "
            f"(for example {min(beyond)!r})",
            "the model is incomplete, or its tokenizer belongs to another one",
        )


def _parts(merge: str | list[str]) -> list[str]:
    """The two sides of a merge and what they become."""
    left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
    return [left, right, left + right]


def to_dense_fp32(model: nn.Module) -> nn.Module:
    """Turn a loaded model, quantised or not, into dense fp32; the same object, computed only when
    evaluated.
    """
    model.set_dtype(mx.float32)  # scales first, so that dequantising happens in fp32
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    return model


def _check_rewindable(name: str, model: nn.Module) -> None:
    """Speculation rewinds caches: refuse those that cannot (sliding windows once full, recurrent
    states).
    """
    kinds = {type(cache) for cache in make_prompt_cache(model)}
    if bad := sorted(kind.__name__ for kind in kinds if kind not in _REWINDABLE):
        raise ModelError(f"{name} uses {', '.join(bad)}, which cannot rewind, so it cannot be served speculatively")


def _check_split(loaded: LanguageModel) -> None:
    """`logits(hidden_states(ids))` must equal the model's own output; some architectures scale or
    cap in between.
    """
    ids = mx.array([[id % loaded.vocabulary_size for id in (1, 2, 3)]])
    direct, split = loaded.model(ids), loaded.logits(loaded.hidden_states(ids))
    if not mx.allclose(direct, split, rtol=1e-3, atol=1e-3).item():
        raise ModelError(
            f"{loaded.name}: architecture {loaded.config.get('model_type')!r} is not supported: its head is not a plain product"
        )


def check_pair(target: LanguageModel, draft: LanguageModel) -> None:
    """Raises ModelError where a draft's tokens mean other text than the target's. Padded sizes may
    differ.
    """
    if target.tokenizer_fingerprint != draft.tokenizer_fingerprint:
        raise ModelError(
            f"the tokenizers of {target.name} and {draft.name} differ, so one cannot draft for the other",
            "choose a draft of the same family, or make one with `specl-ctl draft build`",
        )


def _first_line(error: Exception) -> str:
    """The error in one line; with its class, where the text alone may say little."""
    lines = str(error).splitlines()
    plain = isinstance(error, (OSError, ValueError, RuntimeError)) and lines
    return lines[0] if plain else f"{type(error).__name__} {lines[0] if lines else ''}".strip()
