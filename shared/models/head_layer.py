"""The network of a `head` draft: one decoder layer over the target's last hidden state and the next
token's embedding.

After EAGLE (Li et al. 2024, arXiv 2401.15077) and EAGLE-3's training over its own steps
(2503.01840). Knows tensors only: no target, no files, no caches of requests.

Positions: entry p reads (state p-1, token p), where state p-1 is what the target had when it
predicted token p, or the head's own output in its place, and predicts token p+1.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn


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
        d, self.dim = shape.hidden_size, shape.head_dim
        self.n, self.kv = shape.num_attention_heads, shape.num_key_value_heads
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
        projected: mx.array = self.o_proj(y.transpose(0, 2, 1, 3).reshape(b, length, -1))
        return projected

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
        """[..., hidden] to [..., hidden]."""
        y: mx.array = self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Head(nn.Module):
    """The trainable part. Its output has the form of the target's normed state, so that it can be
    fed back.
    """

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

    def combine_inputs(self, states: mx.array, embeddings: mx.array) -> mx.array:
        """The residual stream from the two inputs, each [batch, length, hidden]."""
        x: mx.array = self.fc(mx.concatenate([self.embedding_norm(embeddings), self.state_norm(states)], axis=-1))
        return x

    def after_attention(self, x: mx.array, attended: mx.array) -> mx.array:
        """The layer's MLP and the final norm, from the residual stream `x` and attention's output."""
        x = x + attended
        y: mx.array = self.norm(x + self.mlp(self.post_attention_layernorm(x)))
        return y

    def __call__(self, states: mx.array, embeddings: mx.array, cache: Any = None) -> mx.array:
        """Outputs [batch, length, hidden] of the next entries after `cache`."""
        x = self.combine_inputs(states, embeddings)
        return self.after_attention(x, self.self_attn(self.input_layernorm(x), cache))

    def unroll(self, states: mx.array, embeddings: mx.array, steps: int) -> list[mx.array]:
        """Outputs of `steps` drafting depths for a whole text at once, exactly as drafting computes
        them.

        At depth s, entry p reads the output of depth s-1 at entry p-1 and sees, as drafting would,
        true-state entries up to p-s+1 and one entry of each shallower depth in between. Row p of
        every result predicts token p+1.
        """
        attention = self.self_attn
        keys: list[mx.array] = []
        values: list[mx.array] = []
        outputs: list[mx.array] = []
        for depth in range(steps):
            if depth:
                states = mx.concatenate([mx.zeros_like(states[:, :1]), outputs[-1][:, :-1]], axis=1)
            x = self.combine_inputs(states, embeddings)
            q, k, v = attention.project(self.input_layernorm(x), 0)
            groups = attention.n // attention.kv
            keys.append(mx.repeat(k, groups, axis=1))
            values.append(mx.repeat(v, groups, axis=1))
            outputs.append(self.after_attention(x, attention.merge(_staircase(q * attention.scale, keys, values))))
        return outputs


def _staircase(q: mx.array, keys: list[mx.array], values: list[mx.array]) -> mx.array:
    """Attention of the deepest entries: all of depth 0 up to p-s, then one entry of each depth 1..s
    on the diagonal.
    """
    depth, length = len(keys) - 1, q.shape[2]
    rows, columns = mx.arange(length)[:, None], mx.arange(length)[None, :]
    far = mx.where(columns <= rows - depth, q @ keys[0].swapaxes(2, 3), -mx.inf)
    near = [(q * _shifted(keys[s], depth - s)).sum(-1, keepdims=True) for s in range(1, depth + 1)]
    weights = mx.softmax(mx.concatenate([far, *near], axis=-1), axis=-1, precise=True)
    out = weights[..., :length] @ values[0]
    for s in range(1, depth + 1):
        out = out + weights[..., length + s - 1, None] * _shifted(values[s], depth - s)
    return out


def _shifted(x: mx.array, count: int) -> mx.array:
    """Row p of the result is row p-count of `x` (zeros before)."""
    if count == 0:
        return x
    return mx.concatenate([mx.zeros_like(x[:, :, :count]), x[:, :, :-count]], axis=2)
