"""The `head` draft: one decoder layer that reads the target's last hidden state and the next token's embedding.

After EAGLE (Li et al. 2024, arXiv 2401.15077) and EAGLE-3's training over its own steps (2503.01840), with a hot
vocabulary (FR-Spec, 2502.14856): only the output rows of the `hot` tokens are scored, an exact subset, so that the rest has
draft probability 0. Embedding and output rows belong to the target and are shared, never stored, never trained.

Positions: entry p reads (state p-1, token p), where state p-1 is what the target had when it predicted token p, or the
head's own output in its place, and predicts token p+1. What it does not know: caches of requests, sampling, acceptance.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from specl.shared.errors import ModelError
from specl.shared.models.cpu_kernels import ONE_CALL, draft_stack, on_cpu, use_cpu_kernels, use_cpu_kernels_in_layer
from specl.shared.models.load import DENSE_ROWS, FEW_ROWS, LanguageModel
from specl.shared.runtime.atomic_files import atomic_dir
from specl.shared.runtime.incremental import Steps, run_all

MODEL_TYPE = "speclora_head"


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Sizes of a head, as config.json holds them."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    hot_size: int
    target_name: str
    target_fingerprint: str
    tokenizer_fingerprint: str


class HeadAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        d, self.n, self.kv, self.dim = (
            shape.hidden_size,
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.head_dim,
        )
        self.scale = self.dim**-0.5
        self.q_proj = nn.Linear(d, self.n * self.dim, bias=False)
        self.k_proj = nn.Linear(d, self.kv * self.dim, bias=False)
        self.v_proj = nn.Linear(d, self.kv * self.dim, bias=False)
        self.o_proj = nn.Linear(self.n * self.dim, d, bias=False)
        self.rope = nn.RoPE(self.dim, traditional=False, base=shape.rope_theta)

    def project(self, x: mx.array, offset: int) -> tuple[mx.array, mx.array, mx.array]:
        """Rotated queries, rotated keys and values, each [batch, heads, length, dim]."""
        b, length, _ = x.shape
        q, k, v = (
            y.reshape(b, length, -1, self.dim).transpose(0, 2, 1, 3)
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        return self.rope(q, offset=offset), self.rope(k, offset=offset), v

    def merge(self, y: mx.array) -> mx.array:
        """Attention's output [batch, heads, length, dim] through the output projection."""
        b, _, length, _ = y.shape
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(b, length, -1))

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        """Attention over `cache` and x [batch, length, hidden], causal."""
        q, k, v = self.project(x, cache.offset if cache is not None else 0)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        mask = "causal" if x.shape[1] > 1 else None
        return self.merge(mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask))


class HeadMlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., hidden] to the same."""
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Head(nn.Module):
    """The trainable part. Its output is in the same form as the target's normed state, so that it can be fed back."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        d, eps = shape.hidden_size, shape.rms_norm_eps
        self.embedding_norm = nn.RMSNorm(d, eps=eps)
        self.state_norm = nn.RMSNorm(d, eps=eps)
        self.fc = nn.Linear(2 * d, d, bias=False)
        self.input_layernorm = nn.RMSNorm(d, eps=eps)
        self.self_attn = HeadAttention(shape)
        self.post_attention_layernorm = nn.RMSNorm(d, eps=eps)
        self.mlp = HeadMlp(shape)
        self.norm = nn.RMSNorm(d, eps=eps)

    def enter(self, states: mx.array, embeddings: mx.array) -> mx.array:
        """Residual stream from the two inputs, each [batch, length, hidden]."""
        return self.fc(mx.concatenate([self.embedding_norm(embeddings), self.state_norm(states)], axis=-1))

    def leave(self, x: mx.array, attended: mx.array) -> mx.array:
        """The rest of the layer after attention, and the final norm."""
        x = x + attended
        return self.norm(x + self.mlp(self.post_attention_layernorm(x)))

    def __call__(self, states: mx.array, embeddings: mx.array, cache: Any = None) -> mx.array:
        """Outputs [batch, length, hidden] of the next entries after `cache`."""
        x = self.enter(states, embeddings)
        return self.leave(x, self.self_attn(self.input_layernorm(x), cache))

    def unroll(self, states: mx.array, embeddings: mx.array, steps: int) -> list[mx.array]:
        """Outputs of `steps` drafting depths for a whole text at once, exactly as drafting computes them.

        At depth s, entry p reads the output of depth s-1 at entry p-1 and sees, as drafting would, true-state entries up to
        p-s+1 and one entry of each shallower depth in between. Row p of every result predicts token p+1.
        """
        attention = self.self_attn
        keys, values, outputs = [], [], []
        for depth in range(steps):
            if depth:
                states = mx.concatenate([mx.zeros_like(states[:, :1]), outputs[-1][:, :-1]], axis=1)
            x = self.enter(states, embeddings)
            q, k, v = attention.project(self.input_layernorm(x), 0)
            groups = attention.n // attention.kv
            keys.append(mx.repeat(k, groups, axis=1))
            values.append(mx.repeat(v, groups, axis=1))
            outputs.append(self.leave(x, attention.merge(_staircase(q * attention.scale, keys, values))))
        return outputs


def _staircase(q: mx.array, keys: list[mx.array], values: list[mx.array]) -> mx.array:
    """Attention of the deepest entries: all of depth 0 up to p-s, then one entry of each depth 1..s on the diagonal."""
    depth, length = len(keys) - 1, q.shape[2]
    rows, columns = mx.arange(length)[:, None], mx.arange(length)[None, :]
    far = mx.where(columns <= rows - depth, q @ keys[0].swapaxes(2, 3), -mx.inf)
    near = [(q * _later(keys[s], depth - s)).sum(-1, keepdims=True) for s in range(1, depth + 1)]
    weights = mx.softmax(mx.concatenate([far, *near], axis=-1), axis=-1, precise=True)
    out = weights[..., :length] @ values[0]
    for s in range(1, depth + 1):
        out = out + weights[..., length + s - 1, None] * _later(values[s], depth - s)
    return out


def _later(x: mx.array, count: int) -> mx.array:
    """Row p of the result is row p-count of `x` (zeros before)."""
    if count == 0:
        return x
    return mx.concatenate([mx.zeros_like(x[:, :, :count]), x[:, :, :-count]], axis=2)


@dataclass(slots=True)
class HeadDraft:
    """A head bound to its target: what the model drafter runs. `hot` [h] are token ids, sorted.

    `output` scores them with the target's own rows; it belongs to no module that an adapter could touch.
    """

    name: str
    path: Path | None
    head: Head
    shape: HeadShape
    target: LanguageModel
    hot: np.ndarray
    fingerprint: str
    dtype: mx.Dtype = mx.float32
    output: nn.Linear = field(init=False)
    _stack: Any = field(init=False, default=None)  # the head as one native call, where that is possible

    def __post_init__(self) -> None:
        self.hot, self.output = run_all(self._scorer(self.hot))

    def set_hot(self, hot: np.ndarray) -> None:
        """Score another hot vocabulary. Raises ModelError unless it has the same size and valid, distinct tokens."""
        self.hot, self.output = run_all(self.scorer(hot))

    def scorer(self, hot: np.ndarray) -> Steps[tuple[np.ndarray, nn.Linear]]:
        """`hot` sorted and the layer that scores it, made in pieces beside those in use: assign both. Raises as `set_hot`."""
        size = int(self.target.config["vocab_size"])
        hot = np.unique(np.asarray(hot, dtype=np.int64))
        if len(hot) != self.shape.hot_size or hot[0] < 0 or hot[-1] >= size:
            raise ModelError(f"a hot vocabulary needs {self.shape.hot_size} distinct tokens below {size}")
        return (yield from self._scorer(hot))

    def _scorer(self, hot: np.ndarray) -> Steps[tuple[np.ndarray, nn.Linear]]:
        output = nn.Linear(self.shape.hidden_size, 1, bias=False)
        output.weight = self.target.head_rows(mx.array(hot)).astype(self.dtype)
        mx.eval(output.weight)
        yield
        if on_cpu():
            blocks = self.target.head_blocks(hot)
            yield
            use_cpu_kernels_in_layer(output, blocks, "exact" if self.target.head_is_blocks else "auto")
        return hot, output

    def use_cpu_kernels_in_layer(self, layer: nn.Module) -> None:
        """What `use_cpu_kernels` does for a layer of the head, before it is there."""
        if on_cpu():
            use_cpu_kernels_in_layer(layer, weights="bf16")

    def use_cpu_kernels(self) -> str:
        """Let few rows be computed natively where that is possible; call again after the layers changed."""
        if not on_cpu():
            return "as loaded"
        speed = use_cpu_kernels(self.head, fuse=False, weights="bf16")
        self._stack = draft_stack(self.head, self.target.model.model.embed_tokens.weight)
        return speed

    @property
    def speed(self) -> str:
        """How it is computed: costs that were measured another way are no longer true."""
        return ONE_CALL if self._stack is not None else "as loaded"

    @property
    def rows_at_once(self) -> int:
        """Rows that `step` takes best when there are many."""
        return FEW_ROWS if self._stack is not None else DENSE_ROWS

    def step(self, states: mx.array, ids: list[int], cache: Any) -> tuple[mx.array, np.ndarray, int, float]:
        """Feed `ids` with `states` [n, hidden] after `cache`: the last output [1, hidden], its scores [hot] of the hot tokens,
        the place of the best of them, and their log-sum-exp.
        """
        if self._stack is not None and len(ids) <= FEW_ROWS:
            done = self._stack.step(states, ids, cache, self.output)
            if done is not None:
                last, scores, best, total = done
                return last, np.array(scores, copy=False), best, total
        out = self.head(states[None], self.target.embed(mx.array([ids])), cache)[0, -1:]
        scores = np.array(self.logits(out[0]).astype(mx.float32), copy=False)
        best = int(scores.argmax())
        return out, scores, best, float(scores[best] + np.log(np.exp(scores - scores[best]).sum()))

    def logits(self, outputs: mx.array) -> mx.array:
        """Scores of the hot tokens [..., hot]."""
        return self.output(outputs)


def head_shape(target: LanguageModel, hot_size: int) -> HeadShape:
    """The shape of a one-layer head for `target`: a layer like the target's own."""
    c = target.config
    heads = int(c["num_attention_heads"])
    return HeadShape(
        hidden_size=target.hidden_size,
        intermediate_size=int(c["intermediate_size"]),
        num_attention_heads=heads,
        num_key_value_heads=int(c.get("num_key_value_heads") or heads),
        head_dim=int(c.get("head_dim") or target.hidden_size // heads),
        rope_theta=float(c.get("rope_theta") or 10000.0),
        rms_norm_eps=float(c["rms_norm_eps"]),
        hot_size=hot_size,
        target_name=target.name,
        target_fingerprint=target.fingerprint,
        tokenizer_fingerprint=target.tokenizer_fingerprint,
    )


def new_head(target: LanguageModel, hot: np.ndarray, name: str = "new") -> HeadDraft:
    """An untrained head for `target`. Norms start at one; the rest as MLX initialises linear layers."""
    hot = np.unique(np.asarray(hot, dtype=np.int64))
    shape = head_shape(target, len(hot))
    head = Head(shape)
    mx.eval(head.parameters())
    return HeadDraft(name, None, head, shape, target, hot, "")


def save_head(
    draft: HeadDraft, folder: Path, manifest: dict[str, Any], beside: Callable[[Path], None] = lambda folder: None
) -> None:
    """Write a draft directory (bf16 weights, hot vocabulary, config, manifest) whole, by rename. `beside` adds files.

    bf16, because the native kernels read it as it is: half the memory traffic of fp32 a draft step.
    """
    weights = {name: value.astype(mx.bfloat16) for name, value in tree_flatten(draft.head.parameters())}
    with atomic_dir(folder, sync=True) as scratch:
        mx.save_safetensors(str(scratch / "model.safetensors"), weights, metadata={"format": "mlx"})
        np.save(scratch / "hot_vocab.npy", draft.hot.astype(np.uint32))
        (scratch / "config.json").write_text(json.dumps({"model_type": MODEL_TYPE, **asdict(draft.shape)}, indent=2))
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2))
        beside(scratch)


def is_head(folder: Path) -> bool:
    """Whether `folder` holds a head draft."""
    try:
        return json.loads((folder / "config.json").read_text())["model_type"] == MODEL_TYPE
    except (OSError, ValueError, KeyError):
        return False


def load_head(folder: Path, name: str, target: LanguageModel) -> HeadDraft:
    """Load and bind a head. Raises ModelError where it is damaged or was made for another target."""
    try:
        config = json.loads((folder / "config.json").read_text())
        config.pop("model_type")
        shape = HeadShape(**config)
        hot = np.load(folder / "hot_vocab.npy", allow_pickle=False).astype(np.int64)
        weights = mx.load(str(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError) as error:
        raise ModelError(
            f"the draft {name} is damaged: {error}", "build it again with `specl-ctl draft build`"
        ) from error
    if (shape.target_fingerprint, shape.tokenizer_fingerprint) != (target.fingerprint, target.tokenizer_fingerprint):
        raise ModelError(
            f"the draft {name} was made for {shape.target_name} ({shape.target_fingerprint}), not for {target.name} ({target.fingerprint})",
            "make one for this target with `specl-ctl draft build`, or set models.draft.name to null",
        )
    head = Head(shape)
    dtype = target.embed(mx.array([0])).dtype
    try:
        head.load_weights([(key, value.astype(dtype)) for key, value in weights.items()])
    except ValueError as error:
        raise ModelError(f"the draft {name} is damaged: {str(error).splitlines()[0]}") from error
    mx.eval(head.parameters())
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
    draft = HeadDraft(name, folder, head, shape, target, hot, digest, dtype)
    draft.use_cpu_kernels()
    return draft
