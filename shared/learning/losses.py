"""The training losses: cross-entropy, KL on the target's top-k with its tail, both mixed, total
variation, or acceptance.

All are vectorised over positions (a loss that calls `.item()` for a position has no gradient). A
draft with a hot vocabulary scores a subset of tokens: the target's distribution is renormalised
over it and its remaining mass is one tail outcome, otherwise KL would be infinite.

Sources: KL on top-k with tail, DistillSpec (arXiv 2310.08461); acceptance-shaped,
LK losses (2602.23881).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from specl.shared.errors import SpecLoraError

EPSILON = 1e-9
ROUNDING = 1e-6  # a probability mass below this may be rounding of float32 alone


@dataclass(frozen=True, slots=True)
class TargetTopK:
    """The target's distributions at m positions, in the draft's columns: columns [m, k] (-1: not in
    the draft's vocabulary), natural logprobs [m, k], label [m] (column of the text's token, or -1),
    weights [m] of the loss.
    """

    columns: mx.array
    logprobs: mx.array
    label: mx.array
    weights: mx.array


@dataclass(frozen=True, slots=True)
class LossSettings:
    """`temperature` softens both sides of KL; `alpha` is the share of KL in `mixed`. `custom` is a
    loss of the user's, whose name is then `kind`: called with float32 logits [m, columns], the
    TargetTopK and these settings, it returns the loss and the validity (0 or 1) of each row.
    """

    kind: str = "mixed"
    temperature: float = 1.0
    alpha: float = 0.5
    custom: "Callable[[mx.array, TargetTopK, LossSettings], tuple[mx.array, mx.array]] | None" = None

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON, for the manifest of a draft or a checkpoint."""
        return {"kind": self.kind, "temperature": self.temperature, "alpha": self.alpha}


def position_losses(logits: mx.array, target: TargetTopK, settings: LossSettings) -> tuple[mx.array, mx.array]:
    """Loss and validity (0 or 1) of each row of `logits` [m, columns]. Raises ValueError for an
    unknown kind.
    """
    logits = logits.astype(mx.float32)
    if settings.custom is not None:
        return _custom(settings.custom, logits, target, settings)
    if settings.kind not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, not {settings.kind!r}")
    return LOSSES[settings.kind](logits, target, settings)


def _custom(
    loss: Callable[..., tuple[mx.array, mx.array]], logits: mx.array, target: TargetTopK, settings: LossSettings
) -> tuple[mx.array, mx.array]:
    losses, valid = loss(logits, target, settings)
    rows = (logits.shape[0],)
    if losses.shape != rows or valid.shape != rows:
        shapes = f"{tuple(losses.shape)} and {tuple(valid.shape)}"
        raise SpecLoraError(f"the loss {settings.kind} must return two arrays of shape {rows}, not {shapes}")
    return losses, valid


# ---------------------------------------------------------------------------------------------------- kinds
def cross_entropy(logits: mx.array, target: TargetTopK, settings: LossSettings) -> tuple[mx.array, mx.array]:
    """Against the text's token; valid where the draft's vocabulary has it."""
    valid = (target.label >= 0).astype(mx.float32)
    label = mx.maximum(target.label, 0)
    chosen = mx.take_along_axis(logits, label[:, None], axis=1)[:, 0]
    return (_log_sum_exp(logits) - chosen) * valid, valid


def kl_divergence(logits: mx.array, target: TargetTopK, settings: LossSettings) -> tuple[mx.array, mx.array]:
    """KL(target || draft)."""
    kl, _, valid = _kl_and_overlap(logits, target, settings.temperature)
    return kl, valid


def total_variation(logits: mx.array, target: TargetTopK, settings: LossSettings) -> tuple[mx.array, mx.array]:
    """One minus the sum of min(p, q), which is the rate of rejection."""
    _, overlap, valid = _kl_and_overlap(logits, target, settings.temperature)
    return 1 - overlap, valid


def mixed(logits: mx.array, target: TargetTopK, settings: LossSettings) -> tuple[mx.array, mx.array]:
    """KL and cross-entropy; where the draft's vocabulary lacks the text's token, KL alone."""
    kl, _, valid = _kl_and_overlap(logits, target, settings.temperature)
    ce, labelled = cross_entropy(logits, target, settings)
    return settings.alpha * kl + (1 - settings.alpha) * ce * labelled, valid


def acceptance(logits: mx.array, target: TargetTopK, settings: LossSettings) -> tuple[mx.array, mx.array]:
    """Total variation, led by KL until acceptance is up: total variation alone has no gradient to
    start from.
    """
    kl, overlap, valid = _kl_and_overlap(logits, target, settings.temperature)
    weight = mx.exp(-3.0 * mx.stop_gradient((overlap * valid).sum() / mx.maximum(valid.sum(), 1)))
    return weight * kl + (1 - weight) * (1 - overlap), valid


LOSSES: dict[str, Callable[[mx.array, TargetTopK, LossSettings], tuple[mx.array, mx.array]]] = {
    "ce": cross_entropy,
    "kl": kl_divergence,
    "tv": total_variation,
    "mixed": mixed,
    "acceptance": acceptance,
}


# ---------------------------------------------------------------------------------------------------- sums
@mx.custom_function
def _log_sum_exp_and_softmax(logits: mx.array) -> tuple[mx.array, mx.array]:
    """Log-sum-exp of each row, and its gradient in the logits, which is the softmax: exp is
    computed once for both. For a CPU's 49,152 columns exp costs nearly as much as the product that
    made the logits (30 of 40 ms for 64 rows).
    """
    q = mx.softmax(logits, axis=1)
    return logits.max(axis=1) - mx.log(q.max(axis=1)), q


@_log_sum_exp_and_softmax.vjp
def _(logits: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]) -> mx.array:
    return cotangents[0][:, None] * outputs[1]


def _log_sum_exp(logits: mx.array) -> mx.array:
    outputs: Any = _log_sum_exp_and_softmax(logits)  # mlx types a custom function's result as object
    log_sum_exp: mx.array = outputs[0]
    return log_sum_exp


def _kl_and_overlap(logits: mx.array, target: TargetTopK, temperature: float) -> tuple[mx.array, mx.array, mx.array]:
    """KL(target || draft) over (top-k inside the draft's vocabulary, tail); the sum of min(p, q)
    over the same top-k at temperature 1; validity: rows where the draft's vocabulary has some of
    the target's probability.
    """
    inside = (target.columns >= 0).astype(mx.float32)
    columns = mx.maximum(target.columns, 0)
    p = mx.exp(target.logprobs) * inside
    # the tail lies beyond the top k; top-k tokens outside the draft's vocabulary are left out and
    # the rest renormalised
    tail = mx.maximum(1.0 - mx.exp(target.logprobs).sum(axis=1), 0.0)
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
    """The distribution at another temperature; the tail is tempered as one outcome, which is exact
    only at 1.
    """
    power = 1.0 / temperature
    tempered = [mx.power(mx.maximum(part, EPSILON), power) for part in (p, tail)]
    return mx.where(p > 0, tempered[0], 0.0), mx.where(tail > ROUNDING, tempered[1], 0.0)
