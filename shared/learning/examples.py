"""What a draft learns from: one answered request with the target's distribution at each output
position. Arrays only.

Knows the shape of an example, how examples become a padded batch, and how they are split by
conversation; nothing of where they are stored.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

PAD_TO = 32  # lengths are rounded up, so that few distinct shapes are computed


@dataclass(frozen=True, slots=True)
class Example:
    """One text. tokens [t] are the prompt, then the output; row j of the others belongs to output
    token j, which is tokens[prompt_length + j]: top-k ids [n, k], natural log-probabilities [n, k]
    at temperature 1, weights [n] of the loss. states [t-1, hidden] are the target's normed hidden
    states (fp16), where the draft reads them.
    """

    id: str
    tokens: np.ndarray
    prompt_length: int
    ids: np.ndarray
    logprobs: np.ndarray
    weights: np.ndarray
    states: np.ndarray | None
    greedy: bool = True

    @property
    def rows(self) -> int:
        """Output positions."""
        return len(self.tokens) - self.prompt_length

    def with_states(self, states: np.ndarray | None) -> "Example":
        """A copy with these states."""
        return replace(self, states=states)

    def clipped(self, limit: int) -> "Example":
        """A copy with the last `limit` tokens. The prompt is cut first, the answer only where it
        alone is longer than `limit`.

        At least one token of the prompt stays, for the answer's first token to follow.
        """
        drop = len(self.tokens) - limit
        if drop <= 0:
            return self
        prompt_length = min(self.prompt_length, max(1, self.prompt_length - drop))
        rows = limit - prompt_length
        first = self.rows - rows
        return replace(
            self,
            tokens=self.tokens[drop:],
            prompt_length=prompt_length,
            ids=self.ids[first:],
            logprobs=self.logprobs[first:],
            weights=self.weights[first:],
            states=self.states[drop:].copy() if self.states is not None else None,  # a view would keep the whole text's
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded examples: tokens [b, t]; states [b, t-1, hidden] or None. The m tokens to predict are
    flat: `supervised` [m, 2] is their row and position, beside ids [m, k], logprobs [m, k] and
    weights [m].
    """

    tokens: np.ndarray
    states: np.ndarray | None
    supervised: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    weights: np.ndarray


def collate(examples: Sequence[Example]) -> Batch:
    """Pad on the right. A distribution of fewer tokens than the widest is filled up with token 0 at
    log-probability -inf.
    """
    longest = max(len(example.tokens) for example in examples)
    width = -(-longest // PAD_TO) * PAD_TO
    tokens = np.zeros((len(examples), width), np.int64)
    supervised = []
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        positions = np.arange(example.prompt_length, len(example.tokens))
        supervised.append(np.stack([np.full_like(positions, row), positions], axis=1))
    return Batch(
        tokens,
        _padded_states(examples, width - 1),
        np.concatenate(supervised),
        _same_width([example.ids for example in examples], 0).astype(np.int64),
        _same_width([example.logprobs for example in examples], -np.inf).astype(np.float32),
        np.concatenate([example.weights for example in examples]).astype(np.float32),
    )


def _padded_states(examples: Sequence[Example], width: int) -> np.ndarray | None:
    """States [b, width, hidden], None where an example has none."""
    states = [example.states for example in examples if example.states is not None]
    if len(states) < len(examples):
        return None
    padded = np.zeros((len(examples), width, states[0].shape[1]), np.float16)
    for row, part in enumerate(states):
        padded[row, : len(part)] = part
    return padded


def _same_width(rows: Sequence[np.ndarray], value: float) -> np.ndarray:
    """Arrays [n, k] below each other, as wide as the widest: rows have the k of the setting that
    they were stored under.
    """
    k = max(part.shape[1] for part in rows)
    return np.concatenate([np.pad(part, ((0, 0), (0, k - part.shape[1])), constant_values=value) for part in rows])


def is_held_out(conversation_id: str, share: float) -> bool:
    """Whether a conversation is held out: a stable choice by conversation, not by turn, because
    turns share their prefix.
    """
    digest = hashlib.sha256(conversation_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def hot_vocabulary(
    examples: Sequence[Example], size: int, vocabulary: int, keep: np.ndarray | None = None
) -> np.ndarray:
    """The `size` tokens with the most probability mass over all rows, sorted; tokens of `keep` come
    before those hardly expected.

    After FR-Spec (arXiv 2502.14856), with the target's distributions in place of corpus counts.
    """
    mass = np.zeros(vocabulary)
    for example in examples:
        np.add.at(mass, example.ids.ravel().astype(np.int64), np.exp(example.logprobs.astype(np.float64)).ravel())
        np.add.at(mass, example.tokens[example.prompt_length :].astype(np.int64), 1.0)
    if keep is not None:
        mass[keep] += 1e-3 * mass.max()
    return np.sort(np.argsort(-mass, kind="stable")[:size])
