"""A loaded causal language model as drafting and training use it: hidden states, logits, caches,
tokens that end an answer.

Knows mlx-lm's module tree as far as `model.model` (the layers) and `lm_head`. Does not know where
weights come from. Shapes: ids are [batch, length] int, hidden states [batch, length, hidden],
logits [..., vocabulary].
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from specl.shared.errors import ModelError
from specl.shared.models.chat_prompt import ContentForm
from specl.shared.models.cpu_kernels import AS_LOADED, FEW_ROWS, Kernels, batch_step, is_packed_from_blocks
from specl.shared.native.packing import Affine

DENSE_ROWS = 512  # rows that one forward takes best where few rows are not native


@dataclass(slots=True)
class LanguageModel:
    """Weights, tokenizer and config. `fingerprint` names the weights, `tokenizer_fingerprint` the
    vocabulary.

    `content_form` is how the chat template takes a message's content (chat_prompt.py).
    `blocks` holds the file's own quantised blocks by module path where a dense copy computes (CPU).
    """

    name: str
    path: Path
    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    fingerprint: str
    tokenizer_fingerprint: str
    blocks: dict[str, Affine] = field(default_factory=dict, repr=False)
    kernels: Kernels = AS_LOADED
    content_form: ContentForm = "text"

    @property
    def context_length(self) -> int:
        """Positions the model was made for."""
        return int(self.config.get("max_position_embeddings") or 4096)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.config["hidden_size"])

    @property
    def vocabulary_size(self) -> int:
        """Columns of the logits; may be padded beyond the tokenizer's tokens."""
        return int(self.config["vocab_size"])

    @property
    def inner(self) -> nn.Module:
        """The model without its output layer."""
        inner: nn.Module = self.model.model
        return inner

    @property
    def output_layer(self) -> nn.Module:
        """`lm_head`, or the embedding where the two share one matrix."""
        layer: nn.Module = self.model.lm_head if hasattr(self.model, "lm_head") else self.embedding
        return layer

    @property
    def embedding(self) -> nn.Module:
        """The input embedding, [vocabulary, hidden]."""
        layer: nn.Module = self.inner.embed_tokens
        return layer

    def hidden_states(self, ids: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Last hidden states after the final norm, [batch, length, hidden], for ids [batch, length]
        after `cache`.
        """
        states: mx.array = self.inner(ids, cache)
        return states

    def prefill(self, ids: Sequence[int], cache: list[Any]) -> mx.array:
        """Feed a text of any length after `cache`; its hidden states [length, hidden], evaluated.

        Where few rows are native, a text is fed sixteen rows at a time, which is 2.5 times faster
        than many dense rows (measured, SmolLM2, 2 cores). Raises ModelError for an id without a row
        in the embedding: files of tokens come from elsewhere, and MLX checks no index.
        """
        if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocabulary_size:
            raise ModelError(
                f"a text has a token that is not below {self.vocabulary_size}, the vocabulary of {self.name}"
            )
        step = FEW_ROWS if self.few_rows_native else DENSE_ROWS
        parts = []
        for start in range(0, len(ids), step):
            parts.append(self.hidden_states(mx.array([list(ids[start : start + step])]), cache)[0])
            mx.eval(parts[-1])
        return mx.concatenate(parts) if len(parts) > 1 else parts[0]

    def batch_hidden_states(self, ids: Sequence[Sequence[int]], caches: Sequence[list[Any]]) -> mx.array:
        """Feed several sequences, each after its own cache: states [rows, hidden] in order, at most
        FEW_ROWS together.

        Where layers are one native call, weights are read once for all of them: eight rows cost
        little more than two.
        """
        if self.few_rows_native:
            states = batch_step(self.inner, ids, caches)
            if states is not None:
                return states
        return mx.concatenate(
            [self.hidden_states(mx.array([list(row)]), cache)[0] for row, cache in zip(ids, caches, strict=True)]
        )

    @property
    def few_rows_native(self) -> bool:
        """Whether up to FEW_ROWS rows go through all layers in one native call."""
        return self.kernels.one_call

    def logits(self, states: mx.array) -> mx.array:
        """Next-token logits [..., vocabulary] from hidden states [..., hidden]."""
        layer = self.output_layer
        logits: mx.array = layer(states) if hasattr(self.model, "lm_head") else layer.as_linear(states)
        return logits

    def embed(self, ids: mx.array) -> mx.array:
        """Input embeddings [..., hidden] of `ids` [...]."""
        embeddings: mx.array = self.embedding(ids)
        return embeddings

    def output_rows(self, ids: mx.array) -> mx.array:
        """The rows of the output matrix that score `ids` [n], dense, [n, hidden]."""
        layer = self.output_layer
        if hasattr(layer, "scales"):
            parts = (layer.weight[ids], layer.scales[ids], layer.biases[ids])
            return mx.dequantize(*parts, group_size=layer.group_size, bits=layer.bits)
        rows: mx.array = layer.weight[ids]
        return rows

    def output_blocks(self, ids: np.ndarray) -> Affine | None:
        """The rows of `output_rows` in the file's own quantised blocks, or None where it has none."""
        name = "lm_head" if hasattr(self.model, "lm_head") else "model.embed_tokens"
        return self.blocks[name].rows(ids) if name in self.blocks else None

    @property
    def output_is_blocks(self) -> bool:
        """Whether the output matrix was packed from its blocks, and so is known to equal them bit
        for bit.
        """
        return is_packed_from_blocks(self.output_layer)

    def new_cache(self) -> list[Any]:
        """An empty KV cache, an entry a layer."""
        cache: list[Any] = make_prompt_cache(self.model)
        return cache

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(self.tokenizer.eos_token_ids)
