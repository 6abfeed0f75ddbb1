"""A draft as something to train and to score: logits for supervised tokens, by drafting depth. Two
kinds, one interface.

A head is unrolled over its own steps as drafting would run it (models/head.py); a language model is
teacher-forced once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from specl.shared.learning.depths import DepthCounts, DepthRates, DepthScores
from specl.shared.learning.examples import Batch, Example, collate
from specl.shared.learning.judge import Agreement
from specl.shared.learning.losses import EPSILON, LossSettings, TargetTopK, position_losses
from specl.shared.models.head import HeadDraft
from specl.shared.models.language_model import LanguageModel

CHUNK_FLOATS = 16 * 1024 * 1024  # logits of a chunk: 512 x 151,936 would be 311 MB a copy, and a step makes several
CHUNK_ROWS = 128  # of a whole vocabulary at most
DEPTH_WEIGHT = 0.8  # of each depth against the one before (EAGLE-3)


class Learner:
    """A draft to train or score. `module` holds what is trained."""

    def __init__(self, draft: HeadDraft | LanguageModel) -> None:
        self.draft = draft
        self.module: nn.Module = draft.head if isinstance(draft, HeadDraft) else draft.model
        self._columns = _column_table(draft)

    @property
    def layers(self) -> list[nn.Module]:
        """The modules that gradient checkpointing wraps."""
        draft = self.draft
        return [draft.head.mlp] if isinstance(draft, HeadDraft) else list(draft.model.layers)

    def set_hot(self, hot: np.ndarray) -> None:
        """Score another hot vocabulary. Raises TypeError for a draft that is not a head."""
        if not isinstance(self.draft, HeadDraft):
            raise TypeError("only a head draft has a hot vocabulary")
        self.draft.set_hot(hot)
        self._columns = _column_table(self.draft)

    def target_top_k(self, batch: Batch, indices: np.ndarray) -> TargetTopK:
        """The target's distributions at the supervised tokens `indices`, in this draft's columns."""
        labels = batch.tokens[batch.supervised[indices, 0], batch.supervised[indices, 1]]
        # what only fills a row up (collate) is no token at all, whatever its id
        columns = np.where(np.isneginf(batch.logprobs[indices]), -1, self._columns[batch.ids[indices]])
        return TargetTopK(
            mx.array(columns),
            mx.array(batch.logprobs[indices]),
            mx.array(self._columns[labels]),
            mx.array(batch.weights[indices]),
        )

    def outputs(self, batch: Batch, depths: int) -> list[tuple[mx.array, np.ndarray]]:
        """For each depth: hidden rows [m, hidden] that predict supervised tokens, and which tokens
        (indices into batch.supervised). Depth s has no row for the first s tokens of a text. A
        language model has one depth.
        """
        tokens = mx.array(batch.tokens)
        if isinstance(self.draft, HeadDraft):
            if batch.states is None:
                raise ValueError("a head reads states, and the examples have none")
            states = mx.array(batch.states).astype(mx.float32)
            # entry e reads state e and token e+1, and predicts token e+2
            embeddings = self.draft.target.embed(tokens[:, 1:]).astype(mx.float32)
            unrolled, shift = self.draft.head.unroll(states, embeddings, depths), 2
        else:
            unrolled, shift = [self.draft.hidden_states(tokens[:, :-1])], 1
        result = []
        for depth, out in enumerate(unrolled):
            indices = np.flatnonzero(batch.supervised[:, 1] >= shift + depth)
            rows, positions = batch.supervised[indices, 0], batch.supervised[indices, 1] - shift
            flat = out.reshape(-1, out.shape[-1])
            result.append((flat[mx.array(rows * out.shape[1] + positions)], indices))
        return result

    @property
    def chunk_rows(self) -> int:
        """How many rows of logits are held together."""
        if isinstance(self.draft, HeadDraft):
            return max(1, CHUNK_FLOATS // len(self.draft.hot))
        return max(1, min(CHUNK_ROWS, CHUNK_FLOATS // len(self._columns)))

    def logits(self, rows: mx.array) -> mx.array:
        """Logits [m, columns] of hidden rows [m, hidden]."""
        return self.draft.logits(rows)

    # ------------------------------------------------------------------------------------------------ loss
    def loss(self, batch: Batch, settings: LossSettings, depths: int) -> mx.array:
        """Mean loss over depths and supervised tokens; differentiable in `module`'s trainable
        parameters.
        """
        return self.weighted_loss(batch, settings, depths)[0]

    def weighted_loss(self, batch: Batch, settings: LossSettings, depths: int) -> tuple[mx.array, mx.array]:
        """The mean loss, and the sum of the token weights that it is a mean over: its weight among
        other batches.
        """
        total, scale, tokens = mx.array(0.0), 0.0, mx.array(0.0)
        for depth, (rows, indices) in enumerate(self.outputs(batch, depths)):
            weight = DEPTH_WEIGHT**depth
            mean, token_weight = self._chunked_loss(rows, batch, indices, settings)
            total, tokens = total + weight * mean, tokens + weight * token_weight
            scale += weight
        return total / scale, tokens / scale

    def _chunked_loss(
        self, rows: mx.array, batch: Batch, indices: np.ndarray, settings: LossSettings
    ) -> tuple[mx.array, mx.array]:
        """In one piece where the logits are small, else in chunks: each chunk's gradient is taken
        with its loss, so that its logits are computed once and then freed (as Liger's fused linear
        cross-entropy does, arXiv 2410.10989).
        """
        size = self.chunk_rows
        starts = range(0, max(len(indices), 1), size)
        targets = [self.target_top_k(batch, indices[start : start + size]) for start in starts]

        def chunk_sums(chunk: mx.array, target: TargetTopK) -> tuple[mx.array, mx.array]:
            losses, valid = position_losses(self.logits(chunk), target, settings)
            scale = valid * target.weights
            return (losses * scale).sum(), scale.sum()

        if len(targets) == 1:
            value, scale = chunk_sums(rows, targets[0])
            return value / mx.maximum(scale, EPSILON), scale
        mean, _, scale = _mean_over_chunks(chunk_sums, targets, size)(rows)
        return mean, scale


def _column_table(draft: HeadDraft | LanguageModel) -> np.ndarray:
    """Column of every token of the vocabulary among the draft's logits, -1 where it has none."""
    if not isinstance(draft, HeadDraft):
        return np.arange(int(draft.config["vocab_size"]))
    table = np.full(int(draft.target.config["vocab_size"]), -1, np.int64)
    table[draft.hot] = np.arange(len(draft.hot))
    return table


def _mean_over_chunks(
    chunk_sums: Callable[[mx.array, TargetTopK], tuple[mx.array, mx.array]], targets: Sequence[TargetTopK], size: int
) -> Callable[[mx.array], tuple[mx.array, mx.array, mx.array]]:
    """A function of all rows: their mean loss, its gradient in the rows, and the sum of their
    weights. Only the rows' gradient leads on: the weights that turn rows into logits are frozen.
    """
    with_gradient = mx.value_and_grad(chunk_sums)

    @mx.custom_function
    def mean_and_gradient(rows: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        values, scales, gradients = [], [], []
        for number, target in enumerate(targets):
            (value, scale), gradient = with_gradient(rows[number * size : (number + 1) * size], target)
            values.append(value)
            scales.append(scale)
            gradients.append(gradient)
        scale = mx.stack(scales).sum()
        share = 1 / mx.maximum(scale, EPSILON)
        return mx.stack(values).sum() * share, mx.concatenate(gradients) * share, scale

    @mean_and_gradient.vjp
    def _(rows: mx.array, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> mx.array:
        return cotangents[0] * outputs[1]

    function: Callable[..., Any] = mean_and_gradient  # mlx types a custom function's result as object
    return function


# ---------------------------------------------------------------------------------------------------- scores
def agreement(
    learner: Learner,
    examples: Sequence[Example],
    depths: int = 1,
    batch_size: int = 8,
    pause: Callable[[], object] = lambda: None,
) -> Agreement:
    """Score a draft on examples, teacher-forced: no target run is needed. `pause` is called between
    batches.
    """
    hits, positions = np.zeros(len(examples)), np.zeros(len(examples))
    counts = DepthCounts(depths)
    for members, scores in _scored_batches(learner, examples, depths, batch_size, pause):
        counts.add(scores)
        hits[members] = np.nansum(scores[0].accepted, axis=1)
        positions[members] = (~np.isnan(scores[0].accepted)).sum(axis=1)
    return Agreement(hits, positions, counts.rates().acceptance)


def acceptance_by_depth(
    learner: Learner, examples: Sequence[Example], depths: int = 3, batch_size: int = 8
) -> DepthRates:
    """Acceptance and agreement by depth over the greedy `examples`: a sampled token is not the
    target's only answer.
    """
    counts = DepthCounts(depths)
    for _, scores in _scored_batches(learner, [example for example in examples if example.greedy], depths, batch_size):
        counts.add(scores)
    return counts.rates()


def _scored_batches(
    learner: Learner,
    examples: Sequence[Example],
    depths: int,
    batch_size: int,
    pause: Callable[[], object] = lambda: None,
) -> Iterator[tuple[list[int], list[DepthScores]]]:
    """Batches of texts of similar length: which examples they are, and their scores, a DepthScores
    for each depth.
    """
    learner.module.eval()  # no dropout while it is scored
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    for start in range(0, len(order), batch_size):
        pause()
        members = order[start : start + batch_size]
        batch = collate([examples[i] for i in members])
        sampled = np.array([not examples[i].greedy for i in members])
        scores = [
            _depth_scores(learner, rows, batch, indices, sampled) for rows, indices in learner.outputs(batch, depths)
        ]
        # a language model reads tokens alone: at every depth it sees what it sees at the first
        yield members, scores + scores[-1:] * (depths - len(scores))


def _depth_scores(
    learner: Learner, rows: mx.array, batch: Batch, indices: np.ndarray, sampled: np.ndarray
) -> DepthScores:
    """One depth's scores at their positions in the texts."""
    supervised, grids = batch.supervised[indices], []
    for values in score_rows(learner, rows, batch, indices, sampled):
        grid = np.full(batch.tokens.shape, np.nan)
        grid[supervised[:, 0], supervised[:, 1]] = values
        grids.append(grid)
    return DepthScores(*grids)


def score_rows(
    learner: Learner, rows: mx.array, batch: Batch, indices: np.ndarray, sampled: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`accepted` and `matches` of DepthScores, a value for each row. `sampled` [texts] says which
    texts are not greedy.
    """
    size = learner.chunk_rows
    all_accepted, all_matches = [np.zeros(0)], [np.zeros(0)]
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        logits = learner.logits(rows[start : start + size]).astype(mx.float32)
        hit, overlap, drawn = _row_scores(logits, learner.target_top_k(batch, part))
        is_sampled = sampled[batch.supervised[part, 0]]
        all_accepted.append(np.where(is_sampled, overlap, hit))
        all_matches.append(np.where(is_sampled, drawn, hit))
    return np.concatenate(all_accepted), np.concatenate(all_matches)


def _row_scores(logits: mx.array, target: TargetTopK) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row: whether the draft's best token is the text's; the sum of min(p, q); min(1, q/p)
    of the text's token.
    """
    hit = (mx.argmax(logits, axis=1) == target.label).astype(mx.float32)
    inside = target.columns >= 0
    q = mx.take_along_axis(logits, mx.maximum(target.columns, 0), axis=1) - mx.logsumexp(logits, axis=1, keepdims=True)
    overlap = (mx.exp(mx.minimum(target.logprobs, q)) * inside).sum(axis=1)
    # 0 for a drawn token beyond the top k or the draft's vocabulary, as in the sum
    is_text = inside & (target.columns == target.label[:, None])
    ratio = mx.exp(mx.minimum(q - mx.where(is_text, target.logprobs, 0.0), 0.0))
    drawn = mx.where(is_text, ratio, 0.0).sum(axis=1)
    mx.eval(hit, overlap, drawn)
    return np.array(hit), np.array(overlap), np.array(drawn)
