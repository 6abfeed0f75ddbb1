"""Acceptance by depth as drafting meets it: how often the n-th drafted token stands, given that those before it stood.

Read off teacher-forced scores, without running target or draft token by token: where all shallower guesses were the text's own
tokens, the draft saw just what teacher forcing shows it. Greedy texts only; a sampled token is not the target's only answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specl.shared.learning.examples import Batch, Example, collate
from specl.shared.learning.learner import Learner, score_rows


@dataclass(frozen=True, slots=True)
class ByDepth:
    """`acceptance`: of the tokens that were drafted because all before them stood. `agreement`: at every place, whatever the
    draft itself would have said before it. One rate a depth; 0 where nothing got that far.
    """

    acceptance: tuple[float, ...]
    agreement: tuple[float, ...]


def by_depth(learner: Learner, examples: Sequence[Example], depths: int = 3, batch_size: int = 8) -> ByDepth:
    """Both over the greedy `examples`."""
    stood, tried, hit, judged = (np.zeros(depths) for _ in range(4))
    texts = sorted((example for example in examples if example.greedy), key=lambda example: len(example.tokens))
    for start in range(0, len(texts), batch_size):
        hits = _hits(learner, collate(texts[start : start + batch_size]), depths)
        alive = hits[0] >= 0
        for depth in range(depths):
            hit[depth] += (hits[depth] == 1).sum()
            judged[depth] += (hits[depth] >= 0).sum()
            # a draft that begins at place p guesses place p + depth at this depth
            row = np.full_like(hits[0], -1)
            row[:, : row.shape[1] - depth] = hits[depth][:, depth:]
            alive &= row >= 0
            tried[depth] += alive.sum()
            alive &= row == 1
            stood[depth] += alive.sum()
    return ByDepth(_rates(stood, tried), _rates(hit, judged))


def _rates(parts: np.ndarray, wholes: np.ndarray) -> tuple[float, ...]:
    return tuple(float(part / max(whole, 1)) for part, whole in zip(parts, wholes, strict=True))


def _hits(learner: Learner, batch: Batch, depths: int) -> list[np.ndarray]:
    """For each depth [rows, places]: 1 or 0 where the draft's own top token is the text's or not, -1 where nothing is judged."""
    outputs = learner.outputs(batch, depths)
    result = []
    for rows, pick in outputs:
        hits = np.full(batch.tokens.shape, -1)
        where = batch.where[pick]
        sampled = np.zeros(len(batch.tokens), bool)
        hits[where[:, 0], where[:, 1]] = score_rows(learner, rows, batch, pick, sampled)
        result.append(hits)
    # a language model reads tokens alone: at every depth it sees what it sees at the first
    return result + result[-1:] * (depths - len(result))
