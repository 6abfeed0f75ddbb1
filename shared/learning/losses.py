"""What a step minimises: cross-entropy, KL on the target's top-k with its tail, both mixed, total variation, or acceptance.

All vectorised over positions (a loss that calls `.item()` a position has no gradient). A draft with a hot vocabulary scores
a subset of tokens: the teacher is renormalised over it, its remaining mass being one tail outcome, else KL is infinite.

Sources: KL on top-k with tail, DistillSpec (arXiv 2310.08461); acceptance-shaped, LK losses (2602.23881).
"""

from dataclasses import dataclass

import mlx.core as mx

from specl.shared.errors import SpecLoraError
from specl.shared.settings.plugins import is_plugin, load_plugin
from specl.shared.settings.schema import LOSSES

KINDS = LOSSES
EPSILON = 1e-9
ROUNDING = 1e-6  # what may be left of 1 by float32 alone


@dataclass(frozen=True, slots=True)
class LossSettings:
    """`temperature` softens both sides of KL; `alpha` is KL's share of `mixed`. `kind` may be `module:name` of one's own loss:
    called with float32 logits [m, columns], the Teacher and these settings, it returns loss and validity (0 or 1) of each row.
    """

    kind: str = "mixed"
    temperature: float = 1.0
    alpha: float = 0.5


@dataclass(frozen=True, slots=True)
class Teacher:
    """The target at m positions, in the draft's columns: columns [m, k] (-1: not in the draft's vocabulary),
    logprobs [m, k], label [m] (the emitted token's column or -1), weights [m].
    """

    columns: mx.array
    logprobs: mx.array
    label: mx.array
    weights: mx.array


def position_losses(logits: mx.array, teacher: Teacher, settings: LossSettings) -> tuple[mx.array, mx.array]:
    """Loss and validity (0 or 1) of each row of `logits` [m, columns]."""
    logits = logits.astype(mx.float32)
    if settings.kind == "ce":
        return _cross_entropy(logits, teacher)
    kl, overlap, valid = _kl_and_overlap(logits, teacher, settings.temperature)
    if settings.kind == "kl":
        return kl, valid
    if settings.kind == "tv":
        return 1 - overlap, valid
    if settings.kind == "mixed":
        ce, labelled = _cross_entropy(logits, teacher)
        return settings.alpha * kl + (1 - settings.alpha) * ce * labelled, valid
    if settings.kind == "acceptance":
        # total variation alone has no gradient to start from: KL carries it until acceptance is up
        weight = mx.exp(-3.0 * mx.stop_gradient((overlap * valid).sum() / mx.maximum(valid.sum(), 1)))
        return weight * kl + (1 - weight) * (1 - overlap), valid
    if is_plugin(settings.kind):
        return _own(settings, logits, teacher)
    raise ValueError(f"loss must be one of {', '.join(KINDS)}, not {settings.kind!r}")


def _own(settings: LossSettings, logits: mx.array, teacher: Teacher) -> tuple[mx.array, mx.array]:
    losses, valid = load_plugin(settings.kind, "training.loss.type")(logits, teacher, settings)
    rows = (logits.shape[0],)
    if losses.shape != rows or valid.shape != rows:
        shapes = f"{tuple(losses.shape)} and {tuple(valid.shape)}"
        raise SpecLoraError(f"the loss {settings.kind} must return two arrays of shape {rows}, not {shapes}")
    return losses, valid


@mx.custom_function
def _totals(logits: mx.array) -> tuple[mx.array, mx.array]:
    """Log-sum-exp of each row, and its gradient in the logits, which is the softmax: exp is computed once for both. On a
    CPU's 49,152 columns exp costs nearly as much as the product that made the logits (30 of 40 ms for 64 rows).
    """
    q = mx.softmax(logits, axis=1)
    return logits.max(axis=1) - mx.log(q.max(axis=1)), q


@_totals.vjp
def _(logits: mx.array, given: tuple[mx.array, mx.array], made: tuple[mx.array, mx.array]) -> mx.array:
    return given[0][:, None] * made[1]


def _log_sum_exp(logits: mx.array) -> mx.array:
    return _totals(logits)[0]


def _cross_entropy(logits: mx.array, teacher: Teacher) -> tuple[mx.array, mx.array]:
    valid = (teacher.label >= 0).astype(mx.float32)
    label = mx.maximum(teacher.label, 0)
    chosen = mx.take_along_axis(logits, label[:, None], axis=1)[:, 0]
    return (_log_sum_exp(logits) - chosen) * valid, valid


def _kl_and_overlap(logits: mx.array, teacher: Teacher, temperature: float) -> tuple[mx.array, mx.array, mx.array]:
    """KL(teacher || draft) over (top-k inside the draft's vocabulary, tail), sum of min(p, q) at temperature 1 over the
    same, and validity: rows where the draft's vocabulary holds something of the target's law.
    """
    inside = (teacher.columns >= 0).astype(mx.float32)
    columns = mx.maximum(teacher.columns, 0)
    p = mx.exp(teacher.logprobs) * inside
    # the tail is what lies beyond the top k; top-k tokens that the draft cannot say are left out and the rest renormalised
    tail = mx.maximum(1.0 - mx.exp(teacher.logprobs).sum(axis=1), 0.0)
    log_q = mx.take_along_axis(logits, columns, axis=1) - _log_sum_exp(logits)[:, None]
    q = mx.exp(log_q) * inside
    overlap = mx.minimum(p, q).sum(axis=1)
    if temperature != 1.0:
        scaled = logits / temperature
        log_q = mx.take_along_axis(scaled, columns, axis=1) - _log_sum_exp(scaled)[:, None]
        q = mx.exp(log_q) * inside
        p, tail = _soften(p, tail, temperature)
    total = p.sum(axis=1) + tail
    p, tail = p / mx.maximum(total[:, None], EPSILON), tail / mx.maximum(total, EPSILON)
    q_tail = mx.maximum(1.0 - q.sum(axis=1), EPSILON)
    # log_q and not log(q + EPSILON), which has no gradient where the draft is most wrong
    kl = (p * (mx.log(p + EPSILON) - log_q) * inside).sum(axis=1)
    kl = kl + tail * (mx.log(tail + EPSILON) - mx.log(q_tail))
    return kl, overlap, (total > EPSILON).astype(mx.float32)


def _soften(p: mx.array, tail: mx.array, temperature: float) -> tuple[mx.array, mx.array]:
    """The teacher at another temperature; the tail is tempered as one outcome, which is exact only at 1."""
    power = 1.0 / temperature
    tempered = [mx.power(mx.maximum(part, EPSILON), power) for part in (p, tail)]
    return mx.where(p > 0, tempered[0], 0.0), mx.where(tail > ROUNDING, tempered[1], 0.0)
