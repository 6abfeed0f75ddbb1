"""A model by name: a local folder, the built-in model, or a hub name through mlx-lm. Holds weights, tokenizer, fingerprint.

Precision: dense fp32 on CPU, where MLX's half and quantised kernels are scalar (measured: 117 ms for one row of
8192x2048 in 4 bits against 6 in dense fp32); the model's own quantisation on Metal and CUDA.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load_model, load_tokenizer

from specl.shared.errors import ModelError
from specl.shared.models import builtin, local_models
from specl.shared.models.cpu_kernels import ONE_CALL, blocks_of, on_cpu, use_cpu_kernels
from specl.shared.models.gguf_import import in_place, is_gguf, place_of

SAMPLE = 64 * 1024  # bytes read at each of the 32 places that a weights file is fingerprinted by
FEW_ROWS, DENSE_ROWS = 16, 512
_REWINDABLE = (KVCache, QuantizedKVCache)

Say = Callable[[str], None]


def _quiet(message: str) -> None:
    pass


def to_stderr(message: str) -> None:
    """The `say` of programs without a terminal interface of their own."""
    print(message, file=sys.stderr, flush=True)


@dataclass(slots=True)
class LanguageModel:
    """A loaded causal language model. `fingerprint` names its weights, `tokenizer_fingerprint` its vocabulary.

    `blocks` holds the file's own quantised blocks where a dense copy computes (CPU); `speed` says what path few rows take.
    """

    name: str
    path: Path
    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    fingerprint: str
    tokenizer_fingerprint: str
    blocks: dict[str, Any] = field(default_factory=dict, repr=False)
    speed: str = ""

    @property
    def context_length(self) -> int:
        """Positions the model was made for."""
        return int(self.config.get("max_position_embeddings") or 4096)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.config["hidden_size"])

    def states(self, ids: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Last hidden states after the final norm, [batch, length, hidden], for ids [batch, length]."""
        return self.model.model(ids, cache)

    def read(self, ids: Sequence[int], cache: list[Any]) -> mx.array:
        """Feed a text of any length after `cache`: its states [length, hidden], evaluated. Where few rows are native, many
        are read sixteen at a time, which is 2.5 times faster than dense rows at once (measured, SmolLM2, 2 cores).
        """
        step = FEW_ROWS if self.few_rows_native else DENSE_ROWS
        pieces = []
        for start in range(0, len(ids), step):
            pieces.append(self.states(mx.array([list(ids[start : start + step])]), cache)[0])
            mx.eval(pieces[-1])
        return mx.concatenate(pieces) if len(pieces) > 1 else pieces[0]

    def step_lanes(self, ids: Sequence[Sequence[int]], caches: Sequence[list[Any]]) -> mx.array:
        """Feed several sequences, each after its own cache: states [rows, hidden] in order, at most FEW_ROWS together.

        Where layers are one native call, weights are read once for all of them: eight rows cost little more than two.
        """
        if self.few_rows_native:
            inner = self.model.model
            states = inner._stack.step_lanes(inner, [list(part) for part in ids], list(caches))
            if states is not None:
                return states
        return mx.concatenate(
            [self.states(mx.array([list(part)]), cache)[0] for part, cache in zip(ids, caches, strict=True)]
        )

    @property
    def few_rows_native(self) -> bool:
        """Whether up to sixteen rows go through all layers in one native call."""
        return ONE_CALL in self.speed

    def logits(self, states: mx.array) -> mx.array:
        """Next-token logits [..., vocabulary] from `states`."""
        if hasattr(self.model, "lm_head"):
            return self.model.lm_head(states)
        return self.model.model.embed_tokens.as_linear(states)

    def embed(self, ids: mx.array) -> mx.array:
        """Input embeddings of `ids`."""
        return self.model.model.embed_tokens(ids)

    def head_blocks(self, ids: np.ndarray) -> Any:
        """The same rows in the file's own blocks, or None."""
        name = "lm_head" if hasattr(self.model, "lm_head") else "model.embed_tokens"
        return self.blocks[name].rows(ids) if name in self.blocks else None

    @property
    def head_is_blocks(self) -> bool:
        """Whether the output matrix was packed from its blocks, and so found to be the same numbers bit for bit."""
        layer = self.model.lm_head if hasattr(self.model, "lm_head") else self.model.model.embed_tokens
        packed = getattr(layer, "_packed", None)
        return packed is not None and packed.of(layer.weight) and packed.matrix.format not in ("f32", "bf16")

    def head_rows(self, ids: mx.array) -> mx.array:
        """The rows of the output matrix that score `ids`, dense, [n, hidden]."""
        layer = self.model.lm_head if hasattr(self.model, "lm_head") else self.model.model.embed_tokens
        if hasattr(layer, "scales"):
            parts = (layer.weight[ids], layer.scales[ids], layer.biases[ids])
            return mx.dequantize(*parts, group_size=layer.group_size, bits=layer.bits)
        return layer.weight[ids]

    def new_cache(self) -> list[Any]:
        """An empty KV cache."""
        return make_prompt_cache(self.model)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(self.tokenizer.eos_token_ids)


def located(name: str, models: Path) -> Path | None:
    """What `name` stands for on this machine without any work: a model's folder, or a GGUF file that was not converted
    yet. None where it is neither. Raises ModelError for a name of Ollama's or LM Studio's that is not there.
    """
    path = Path(name).expanduser()
    if "/" not in name and (models / name / "config.json").is_file():
        return models / name
    if name.startswith(local_models.PREFIXES):
        path = local_models.find(name, local_models.search_here()).path
    if is_gguf(path):
        converted = place_of(path, models)
        return converted if (converted / "config.json").is_file() else path
    return path if path.is_dir() else None


def resolve(name: str, models: Path, say: Say = _quiet) -> Path:
    """The folder that `name` stands for; fetches the built-in model or a hub model where it is not here yet, and converts
    a GGUF file when it is first used.

    Raises ModelError with one sentence that says what is wrong.
    """
    if name == builtin.NAME:
        return builtin.ensure(models, say)
    path = located(name, models)
    if path is not None and not path.is_dir():
        return in_place(path, models, say)
    if path is not None:
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is not a model folder: it has no config.json")
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"there is no model {name!r}", f"name a folder, a GGUF file, a hub model (owner/name) or `{builtin.NAME}`"
        )
    from mlx_lm.utils import hf_repo_to_path

    say(f"looking for {name} on the hub")
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "model*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
        snapshot_download(name, allow_patterns=patterns)
        return Path(hf_repo_to_path(name))
    except Exception as error:  # the hub client raises its own, requests' and httpx's errors
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"the hub model {name} cannot be fetched: {reason[0]}",
            "check the name and the network, or use a local folder",
        ) from error


def fingerprint(folder: Path) -> str:
    """A name for the weights: sha256 over config, sizes and 32 samples of each weights file (whole for small files)."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("model*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with open(path, "rb") as file:
            for place in range(32):
                file.seek(size * place // 32)
                digest.update(file.read(min(SAMPLE, size // 32 + 1)))
    return digest.hexdigest()[:16]


def _tokenizer_fingerprint(tokenizer: TokenizerWrapper) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def _check_rewindable(name: str, model: nn.Module) -> None:
    """Speculation rewinds caches: refuse those that cannot (sliding windows once full, recurrent states)."""
    kinds = {type(cache) for cache in make_prompt_cache(model)}
    if bad := sorted(kind.__name__ for kind in kinds if kind not in _REWINDABLE):
        raise ModelError(f"{name} uses {', '.join(bad)}, which cannot rewind, so it cannot be served speculatively")


def dense_fp32(model: nn.Module) -> nn.Module:
    """A loaded model, quantised or not, in fp32; the same object, computed only when evaluated."""
    model.set_dtype(mx.float32)  # scales first, so that dequantising happens in fp32
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    return model


def load(
    name: str, models: Path, precision: str = "auto", say: Say = _quiet, path: Path | None = None
) -> LanguageModel:
    """Load by name, from `path` where it has been resolved already.

    Raises ModelError for a missing model, an unsupported architecture or a missing tokenizer.
    """
    path = path or resolve(name, models, say)
    try:
        model, config = load_model(path, lazy=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged config raises whatever the architecture's code stumbles over
        raise ModelError(f"the model {name} cannot be loaded: {_first_line(error)}") from error
    if not hasattr(model, "model") or not (hasattr(model, "lm_head") or hasattr(model.model, "embed_tokens")):
        raise ModelError(
            f"{name}: architecture {config.get('model_type')!r} is not supported: it hides its last hidden state"
        )
    _check_rewindable(name, model)
    try:
        tokenizer = load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # transformers raises many kinds for a missing or broken tokenizer
        raise ModelError(f"{name} has no usable tokenizer: {_first_line(error)}") from error
    blocks, speed = {}, "as loaded"
    if precision == "fp32" or (precision == "auto" and on_cpu()):
        blocks = blocks_of(model) if on_cpu() else {}
        model = dense_fp32(model)
    mx.eval(model.parameters())
    if on_cpu():
        speed = use_cpu_kernels(model, blocks)
    loaded = LanguageModel(
        name, path, model, tokenizer, config, fingerprint(path), _tokenizer_fingerprint(tokenizer), blocks, speed
    )
    _check_split(loaded)
    return loaded


def _first_line(error: Exception) -> str:
    """What went wrong, in one line; its kind, too, where the words alone may say little."""
    lines = str(error).splitlines()
    plain = isinstance(error, (OSError, ValueError, RuntimeError)) and lines
    return lines[0] if plain else f"{type(error).__name__} {lines[0] if lines else ''}".strip()


def _check_split(loaded: LanguageModel) -> None:
    """`logits(states(x))` must be what the model itself says; some architectures scale or cap in between."""
    ids = mx.array([[1, 2, 3]])
    whole, split = loaded.model(ids), loaded.logits(loaded.states(ids))
    if not mx.allclose(whole, split, rtol=1e-3, atol=1e-3).item():
        raise ModelError(
            f"{loaded.name}: architecture {loaded.config.get('model_type')!r} is not supported: its head is not a plain product"
        )


def check_pair(target: LanguageModel, draft: LanguageModel) -> None:
    """Raises ModelError where a draft's tokens mean other text than the target's. Padded sizes may differ."""
    if target.tokenizer_fingerprint != draft.tokenizer_fingerprint:
        raise ModelError(
            f"the tokenizers of {target.name} and {draft.name} differ, so one cannot draft for the other",
            "choose a draft of the same family, or make one with `specl-ctl draft build`",
        )
