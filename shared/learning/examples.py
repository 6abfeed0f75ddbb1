"""What a draft learns from: one answered request with the target's law at each output position. Arrays only.

Knows the shape of an example, how examples become a padded batch, and how they are split by conversation; nothing of where
they are stored.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

PAD_TO = 32  # lengths are rounded up, so that few distinct shapes are computed


@dataclass(frozen=True, slots=True)
class Example:
    """tokens [t] (prompt, then output); row j of the others belongs to output token j = tokens[prompt_length + j]:
    top-k ids [n, k], natural log-probabilities [n, k] at temperature 1, weights [n] of the loss.
    states [t-1, hidden] are the target's normed hidden states (fp16), where the draft reads them.
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
        """The same with these states."""
        return replace(self, states=states)

    def clipped(self, limit: int) -> "Example":
        """The last `limit` tokens of it: less of the prompt, and of the answer only what is longer than `limit` by itself.

        One token of the prompt stays at least, for the first of the answer to follow.
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
    """Padded examples. `first[b]` is the place of the first supervised token of row b, `length[b]` its tokens.

    tokens [b, t]; states [b, t-1, hidden] or None; supervised tokens flat: `where` [m, 2] (row, place of the token to
    predict), ids [m, k], logprobs [m, k], weights [m].
    """

    tokens: np.ndarray
    states: np.ndarray | None
    where: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    weights: np.ndarray
    owner: np.ndarray


def collate(examples: Sequence[Example]) -> Batch:
    """Pad on the right. Laws of fewer tokens than the longest are filled up with token 0 at log-probability -inf."""
    longest = max(len(example.tokens) for example in examples)
    width = -(-longest // PAD_TO) * PAD_TO
    tokens = np.zeros((len(examples), width), np.int64)
    with_states = all(example.states is not None for example in examples)
    hidden = examples[0].states.shape[1] if with_states else 0
    states = np.zeros((len(examples), width - 1, hidden), np.float16) if with_states else None
    where, owner = [], []
    for b, example in enumerate(examples):
        tokens[b, : len(example.tokens)] = example.tokens
        if with_states:
            states[b, : len(example.tokens) - 1] = example.states
        places = np.arange(example.prompt_length, len(example.tokens))
        where.append(np.stack([np.full_like(places, b), places], axis=1))
        owner.append(np.full(len(places), b))
    return Batch(
        tokens,
        states,
        np.concatenate(where),
        _filled([example.ids for example in examples], 0).astype(np.int64),
        _filled([example.logprobs for example in examples], -np.inf).astype(np.float32),
        np.concatenate([example.weights for example in examples]).astype(np.float32),
        np.concatenate(owner),
    )


def _filled(rows: Sequence[np.ndarray], value: float) -> np.ndarray:
    """Arrays [n, k] below each other, as wide as the widest: rows keep the k of the setting that they were stored under."""
    k = max(part.shape[1] for part in rows)
    return np.concatenate([np.pad(part, ((0, 0), (0, k - part.shape[1])), constant_values=value) for part in rows])


def is_held_out(conversation_id: str, share: float) -> bool:
    """A stable choice by conversation, not by turn: turns share their prefix."""
    digest = hashlib.sha256(conversation_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def hot_vocabulary(
    examples: Sequence[Example], size: int, vocabulary: int, keep: np.ndarray | None = None
) -> np.ndarray:
    """The `size` tokens that the target most expects, by probability mass over all rows; `keep` fills what is left.

    After FR-Spec (arXiv 2502.14856), with the target's own law in place of corpus counts.
    """
    mass = np.zeros(vocabulary)
    for example in examples:
        np.add.at(mass, example.ids.ravel().astype(np.int64), np.exp(example.logprobs.astype(np.float64)).ravel())
        np.add.at(mass, example.tokens[example.prompt_length :].astype(np.int64), 1.0)
    if keep is not None:
        # the old vocabulary keeps its place against anything that was hardly ever expected
        mass[keep] += 1e-3 * mass.max()
    return np.sort(np.argsort(-mass, kind="stable")[:size])
