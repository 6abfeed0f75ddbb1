"""A draft as something to train and to score: logits for supervised tokens, by drafting depth. Two kinds, one interface.

A head is unrolled over its own steps as drafting would run it (models/head.py); a language model is teacher-forced once.
"""

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from specl.shared.learning.depths import ByDepth, DepthCounts, Places
from specl.shared.learning.examples import Batch, Example, collate
from specl.shared.learning.gate import Agreement
from specl.shared.learning.losses import EPSILON, LossSettings, Teacher, position_losses
from specl.shared.models.head import HeadDraft
from specl.shared.models.language_model import LanguageModel

CHUNK_FLOATS = 16 * 1024 * 1024  # logits a chunk: 512 x 151,936 would be 311 MB a copy, and a step makes several
CHUNK_ROWS = 128  # of a whole vocabulary at most
DEPTH_WEIGHT = 0.8  # of each depth against the one before (EAGLE-3)


class Learner:
    """A draft to train or score. `module` holds what is trained."""

    def __init__(self, draft: HeadDraft | LanguageModel) -> None:
        self.draft = draft
        self.is_head = isinstance(draft, HeadDraft)
        self.module: nn.Module = draft.head if self.is_head else draft.model
        self._columns = self._column_table()

    def _column_table(self) -> np.ndarray:
        """Column of every token among the draft's logits, -1 where it has none."""
        if not self.is_head:
            return np.arange(int(self.draft.config["vocab_size"]))
        table = np.full(int(self.draft.target.config["vocab_size"]), -1, np.int64)
        table[self.draft.hot] = np.arange(len(self.draft.hot))
        return table

    @property
    def layers(self) -> list[nn.Module]:
        """What gradient checkpointing wraps."""
        return [self.module.mlp] if self.is_head else list(self.draft.model.layers)

    def set_hot(self, hot: np.ndarray) -> None:
        """Score another hot vocabulary (a head only)."""
        self.draft.set_hot(hot)
        self._columns = self._column_table()

    def teacher(self, batch: Batch, pick: np.ndarray) -> Teacher:
        """The target's law at the supervised tokens `pick`, in this draft's columns."""
        labels = batch.tokens[batch.where[pick, 0], batch.where[pick, 1]]
        # what only fills a row up (collate) is no token at all, whatever its id
        columns = np.where(np.isneginf(batch.logprobs[pick]), -1, self._columns[batch.ids[pick]])
        return Teacher(
            mx.array(columns),
            mx.array(batch.logprobs[pick]),
            mx.array(self._columns[labels]),
            mx.array(batch.weights[pick]),
        )

    def outputs(self, batch: Batch, depths: int) -> list[tuple[mx.array, np.ndarray]]:
        """For each depth: rows [m, hidden] that score supervised tokens, and which of them (indices into batch.where).

        Depth s has no row for the first s tokens of a text.
        """
        tokens = mx.array(batch.tokens)
        if self.is_head:
            states = mx.array(batch.states).astype(mx.float32)
            # entry e reads state e and token e+1, and predicts token e+2
            unrolled = self.module.unroll(states, self.draft.target.embed(tokens[:, 1:]).astype(mx.float32), depths)
            shift = 2
        else:
            unrolled, shift = [self.draft.hidden_states(tokens[:, :-1])], 1
        result = []
        for depth, out in enumerate(unrolled):
            pick = np.flatnonzero(batch.where[:, 1] >= shift + depth)
            rows, places = batch.where[pick, 0], batch.where[pick, 1] - shift
            flat = out.reshape(-1, out.shape[-1])
            result.append((flat[mx.array(rows * out.shape[1] + places)], pick))
        return result

    @property
    def rows_at_once(self) -> int:
        """Rows of logits that are held together."""
        if self.is_head:
            return max(1, CHUNK_FLOATS // len(self.draft.hot))
        return max(1, min(CHUNK_ROWS, CHUNK_FLOATS // len(self._columns)))

    def logits(self, rows: mx.array) -> mx.array:
        """Scores of the draft's columns."""
        return self.draft.logits(rows)

    def loss(self, batch: Batch, settings: LossSettings, depths: int) -> mx.array:
        """Mean loss over depths and supervised tokens; differentiable in `module`'s trainable parameters."""
        return self.weighed_loss(batch, settings, depths)[0]

    def weighed_loss(self, batch: Batch, settings: LossSettings, depths: int) -> tuple[mx.array, mx.array]:
        """The same, and the weights of the tokens that it is a mean of, summed: what it counts among other batches."""
        total, scale, tokens = mx.array(0.0), 0.0, mx.array(0.0)
        for depth, (rows, pick) in enumerate(self.outputs(batch, depths)):
            weight = DEPTH_WEIGHT**depth
            mean, counted = self._chunked_loss(rows, batch, pick, settings)
            total, tokens = total + weight * mean, tokens + weight * counted
            scale += weight
        return total / scale, tokens / scale

    def _chunked_loss(
        self, rows: mx.array, batch: Batch, pick: np.ndarray, settings: LossSettings
    ) -> tuple[mx.array, mx.array]:
        """As one piece where the logits are small, else in chunks: each chunk's gradient is taken with its loss, so that its
        logits are computed once and then let go (as Liger's fused linear cross-entropy does, arXiv 2410.10989).
        """
        size = self.rows_at_once
        teachers = [self.teacher(batch, pick[start : start + size]) for start in range(0, max(len(pick), 1), size)]

        def piece(part: mx.array, teacher: Teacher) -> tuple[mx.array, mx.array]:
            losses, valid = position_losses(self.logits(part), teacher, settings)
            scale = valid * teacher.weights
            return (losses * scale).sum(), scale.sum()

        if len(teachers) == 1:
            value, scale = piece(rows, teachers[0])
            return value / mx.maximum(scale, EPSILON), scale
        mean, _, scale = _in_chunks(piece, teachers, size)(rows)
        return mean, scale


def _in_chunks(
    piece: Callable[[mx.array, Teacher], tuple[mx.array, mx.array]], teachers: Sequence[Teacher], size: int
) -> Callable[[mx.array], tuple[mx.array, mx.array, mx.array]]:
    """Mean loss of all rows, its slope in them, and their weights summed. The slope that leads on is the rows' alone: what
    scores them is frozen.
    """
    with_slope = mx.value_and_grad(piece)

    @mx.custom_function
    def mean_and_slope(rows: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        values, scales, slopes = [], [], []
        for number, teacher in enumerate(teachers):
            (value, scale), slope = with_slope(rows[number * size : (number + 1) * size], teacher)
            values.append(value)
            scales.append(scale)
            slopes.append(slope)
        scale = sum(scales)
        share = 1 / mx.maximum(scale, EPSILON)
        return sum(values) * share, mx.concatenate(slopes) * share, scale

    @mean_and_slope.vjp
    def _(rows: mx.array, given: Sequence[mx.array], made: Sequence[mx.array]) -> mx.array:
        return given[0] * made[1]

    return mean_and_slope


def agreement(
    learner: Learner,
    examples: Sequence[Example],
    depths: int = 1,
    batch_size: int = 8,
    pause: Callable[[], object] = lambda: None,
) -> Agreement:
    """Score a draft on examples, teacher-forced: no target run is needed. `pause` is called between batches."""
    hits, positions = np.zeros(len(examples)), np.zeros(len(examples))
    counts = DepthCounts(depths)
    for members, places in _judged(learner, examples, depths, batch_size, pause):
        counts.add(places)
        hits[members] = np.nansum(places[0].score, axis=1)
        positions[members] = (~np.isnan(places[0].score)).sum(axis=1)
    return Agreement(hits, positions, counts.rates().acceptance)


def by_depth(learner: Learner, examples: Sequence[Example], depths: int = 3, batch_size: int = 8) -> ByDepth:
    """Acceptance and agreement by depth over the greedy `examples`: a sampled token is not the target's only answer."""
    counts = DepthCounts(depths)
    for _, places in _judged(learner, [example for example in examples if example.greedy], depths, batch_size):
        counts.add(places)
    return counts.rates()


def _judged(
    learner: Learner,
    examples: Sequence[Example],
    depths: int,
    batch_size: int,
    pause: Callable[[], object] = lambda: None,
) -> Iterator[tuple[list[int], list[Places]]]:
    """Batches of texts of like length: which examples they are, and their scores, a `Places` a depth."""
    learner.module.eval()  # no dropout while it is judged
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    for start in range(0, len(order), batch_size):
        pause()
        members = order[start : start + batch_size]
        batch = collate([examples[i] for i in members])
        sampled = np.array([not examples[i].greedy for i in members])
        found = [_places(learner, rows, batch, pick, sampled) for rows, pick in learner.outputs(batch, depths)]
        # a language model reads tokens alone: at every depth it sees what it sees at the first
        yield members, found + found[-1:] * (depths - len(found))


def _places(learner: Learner, rows: mx.array, batch: Batch, pick: np.ndarray, sampled: np.ndarray) -> Places:
    """One depth's scores where they belong in the texts."""
    where, grids = batch.where[pick], []
    for values in score_rows(learner, rows, batch, pick, sampled):
        grid = np.full(batch.tokens.shape, np.nan)
        grid[where[:, 0], where[:, 1]] = values
        grids.append(grid)
    return Places(*grids)


def score_rows(
    learner: Learner, rows: mx.array, batch: Batch, pick: np.ndarray, sampled: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`score` and `stands` of `Places`, a value a row."""
    size = learner.rows_at_once
    scores, stands = [np.zeros(0)], [np.zeros(0)]
    for start in range(0, len(pick), size):
        part = pick[start : start + size]
        teacher = learner.teacher(batch, part)
        logits = learner.logits(rows[start : start + size]).astype(mx.float32)
        hit = (mx.argmax(logits, axis=1) == teacher.label).astype(mx.float32)
        inside = teacher.columns >= 0
        q = mx.take_along_axis(logits, mx.maximum(teacher.columns, 0), axis=1) - mx.logsumexp(
            logits, axis=1, keepdims=True
        )
        overlap = (mx.exp(mx.minimum(teacher.logprobs, q)) * inside).sum(axis=1)
        # 0 for a drawn token beyond the top k or the draft's vocabulary, as in the sum
        drawn = inside & (teacher.columns == teacher.label[:, None])
        kept = mx.where(drawn, mx.exp(mx.minimum(q - mx.where(drawn, teacher.logprobs, 0.0), 0.0)), 0.0).sum(axis=1)
        mx.eval(hit, overlap, kept)
        is_sampled = sampled[batch.where[part, 0]]
        scores.append(np.where(is_sampled, np.array(overlap), np.array(hit)))
        stands.append(np.where(is_sampled, np.array(kept), np.array(hit)))
    return np.concatenate(scores), np.concatenate(stands)
