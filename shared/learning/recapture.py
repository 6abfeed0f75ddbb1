"""A text that is already written, read again by the target: its top-k distributions and hidden
states. One forward pass.

Knows token ids and the target; where a text comes from and whether it may be used is for the caller
to say.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from specl.shared.engine.sampling import log_sum_exp, top_indices
from specl.shared.learning.examples import Example
from specl.shared.models.cpu_kernels import FEW_ROWS
from specl.shared.models.language_model import LanguageModel

CAPTURE_ROWS = 128  # rows of logits at once: 512 x 151,936 in fp32 would be 311 MB
LONGEST = 512  # tokens of an example: the last of a long text
READ = 1024  # tokens of a long text that the target reads, at most, for what it expects of those


@dataclass(frozen=True, slots=True)
class WrittenText:
    """One answered request as token ids: the rendered prompt and then the answer, as the target
    read and wrote them.
    """

    id: str
    tokens: np.ndarray
    prompt_length: int
    greedy: bool


def recapture(
    target: LanguageModel, tokens: np.ndarray, prompt_length: int, k: int, with_top_k: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States fp16 [t-1, hidden], top-k ids uint32 and log-probabilities fp16 [n, k] of a text of t
    tokens, n of them output.
    """
    states = target.prefill(tokens[:-1].tolist(), target.new_cache())
    ids, logprobs = [], []
    rows = FEW_ROWS if target.few_rows_native else CAPTURE_ROWS
    for start in range(prompt_length - 1, len(tokens) - 1 if with_top_k else 0, rows):
        logits = np.array(target.logits(states[start : start + rows]).astype(mx.float32), copy=False)
        for row, total in zip(logits, log_sum_exp(logits), strict=True):
            best = top_indices(row, k)
            ids.append(best.astype(np.uint32))
            logprobs.append((row[best] - total).astype(np.float16))
    return (
        np.array(states.astype(mx.float16)),
        np.stack(ids) if ids else np.zeros((0, k), np.uint32),
        np.stack(logprobs) if logprobs else np.zeros((0, k), np.float16),
    )


def to_example(target: LanguageModel, text: WrittenText, k: int, with_states: bool) -> Example:
    """The end of a text (at most LONGEST tokens) as a training example."""
    tokens = text.tokens[-READ:]
    prompt_length = text.prompt_length - (len(text.tokens) - len(tokens))
    prompt_length = max(
        prompt_length, len(tokens) - LONGEST + 1, 1
    )  # tokens that are cut off next need no distribution
    states, ids, logprobs = recapture(target, tokens, prompt_length, k)
    weights = np.ones(len(ids), np.float32)
    kept_states = states if with_states else None
    return Example(text.id, tokens, prompt_length, ids, logprobs, weights, kept_states, text.greedy).clipped(LONGEST)
