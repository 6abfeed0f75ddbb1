"""The distribution a token is drawn from: filters and temperature over one row of logits.

Sparse where filters leave tokens out. Filters act on the untempered distribution and temperature
last, in mlx-lm's order (sample_utils.make_sampler: top-p, min-p, top-k, then 1/T). Draft and target
use the same function. On the host: a row of 49,152 takes tenths of a millisecond here and 4.7 ms
through MLX's sort on CPU.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from specl.shared.native import available, row_stats
from specl.shared.sampling_params import SamplingParams

CHUNK = 64
SMALL_TEMPERATURE = 1e-290
MAX_NATIVE_K = 512  # beyond it numpy's partition is faster
NUCLEUS_CANDIDATES = (64, 256, 2048)  # tried before the vocabulary is sorted (milliseconds)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Probabilities `p` (float64, sum 1) of token `ids` (ascending); all other tokens have 0."""

    ids: np.ndarray
    p: np.ndarray

    def of(self, token: int) -> float:
        """The probability of one token."""
        index = int(np.searchsorted(self.ids, token))
        return float(self.p[index]) if index < len(self.ids) and self.ids[index] == token else 0.0

    def draw(self, uniform: float) -> int:
        """The token at this quantile in [0, 1)."""
        cumulative = np.cumsum(self.p)
        index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
        return int(self.ids[min(index, len(self.ids) - 1)])

    def argmax_with(self, noise: np.ndarray) -> int:
        """argmax of log p + noise[token]; with Gumbel noise an exact draw (Gumbel-max trick)."""
        with np.errstate(divide="ignore"):
            return int(self.ids[np.argmax(np.log(self.p) + noise[self.ids])])


def point_mass(token: int) -> Distribution:
    """All probability on one token: what an n-gram or argmax draft is."""
    return Distribution(np.array([token]), np.ones(1))


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """Along the last axis; the sum is in float64."""
    top = logits.max(axis=-1, keepdims=True)
    total: np.ndarray = np.log(np.exp(logits - top).sum(axis=-1, dtype=np.float64)) + top[..., 0]
    return total


def top_indices(logits: np.ndarray, k: int) -> np.ndarray:
    """Indices of the `k` largest of one row, largest first.

    The k largest lie in the k chunks with the largest maxima, so most of the row is only ever
    compared in bulk.
    """
    size = len(logits)
    k = min(k, size)
    chunks = size // CHUNK
    if chunks < 2 * k:
        return _by_value(logits, np.argpartition(logits, size - k)[size - k :])
    body = logits[: chunks * CHUNK].reshape(chunks, CHUNK)
    best = np.argpartition(body.max(axis=1), chunks - k)[chunks - k :]
    indices = (best[:, None] * CHUNK + np.arange(CHUNK)).ravel()
    indices = np.concatenate([indices, np.arange(chunks * CHUNK, size)])
    values = logits[indices]
    return _by_value(logits, indices[np.argpartition(values, len(values) - k)[len(values) - k :]])


def _by_value(logits: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return indices[np.argsort(-logits[indices], kind="stable")]


def largest(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices and values of the k largest of every row, largest first, [n, k]; log-sum-exp [n].

    In C++ where the extension is built.
    """
    if available() and logits.dtype == np.float32 and k <= MAX_NATIVE_K:
        stats = row_stats(mx.array(logits), min(k, logits.shape[1]))
        return np.array(stats.ids), np.array(stats.logits), np.array(stats.logsumexp)
    ids = np.stack([top_indices(row, k) for row in logits])
    return ids, np.take_along_axis(logits, ids, axis=1), log_sum_exp(logits)


def _nucleus(logits: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest most likely tokens whose probabilities sum to `top_p`, most likely first."""
    for count in (*NUCLEUS_CANDIDATES, len(logits)):
        (order,), (values,), (total,) = largest(logits[None], count)
        mass = np.cumsum(np.exp(values.astype(np.float64) - total))
        if mass[-1] >= top_p or count >= len(logits):
            nucleus: np.ndarray = order[: int(np.searchsorted(mass, top_p)) + 1]
            return nucleus
    raise AssertionError("unreachable")


def distribution(logits: np.ndarray, sampling: SamplingParams) -> Distribution:
    """The distribution of one row of logits [vocabulary], for a temperature above 0."""
    allowed: np.ndarray | None = None  # None: every token
    if sampling.top_p < 1:
        allowed = _nucleus(logits, sampling.top_p)
    if sampling.top_k and (allowed is None or len(allowed) > sampling.top_k):
        allowed = allowed[: sampling.top_k] if allowed is not None else top_indices(logits, sampling.top_k)
    if sampling.min_p > 0:
        floor = logits.max() + np.log(sampling.min_p)
        allowed = np.flatnonzero(logits >= floor) if allowed is None else allowed[logits[allowed] >= floor]
    ids = np.arange(len(logits)) if allowed is None else np.sort(allowed)
    values = logits[ids].astype(np.float64)
    if sampling.temperature < SMALL_TEMPERATURE:  # logits over it overflow, and inf - inf is no number
        values -= values.max()
    with np.errstate(over="ignore"):
        scaled = values / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    return Distribution(ids, weights / weights.sum())


def position_noise(seed: int, position: int, size: int) -> np.ndarray:
    """Gumbel noise of every token at one output position: a function of these three arguments only.

    Philox is counter-based, so any position is reached directly; numpy keeps its stream stable
    between versions.
    """
    bits = np.random.Philox(key=seed, counter=[0, 0, position, 0])
    uniform = np.random.Generator(bits).random(size)
    noise: np.ndarray = -np.log(-np.log(np.maximum(uniform, 1e-300)))
    return noise
