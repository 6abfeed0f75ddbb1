"""Every loss and its gradient against a reference over the whole vocabulary, in double precision and by finite differences."""

import mlx.core as mx
import numpy as np
import pytest

from specl.shared.learning.losses import LossSettings, TargetTopK, position_losses

ROWS, VOCABULARY, STEP = 5, 24, 1e-6
SETTINGS = [
    LossSettings("ce"), LossSettings("kl"), LossSettings("kl", temperature=2.0), LossSettings("mixed", alpha=0.3), LossSettings("tv"),
    LossSettings("acceptance"),
]  # fmt: skip


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def distributions():
    rng = np.random.default_rng(4)
    return rng.normal(size=(ROWS, VOCABULARY)), softmax(2 * rng.normal(size=(ROWS, VOCABULARY)))


def merged(sampling, top):
    """The distribution's probabilities of `top`, then of everything else together."""
    kept = np.take_along_axis(sampling, top, 1)
    return np.concatenate([kept, 1 - kept.sum(1, keepdims=True)], 1)


def reference(logits, p, k, settings, weight=None):
    """Mean loss from the full distributions; `weight` of KL in the acceptance loss, where it is not to follow from the logits."""
    top = np.argsort(-p, axis=1)[:, :k]
    q, heat = softmax(logits), settings.temperature
    ce = -np.log(q[np.arange(ROWS), p.argmax(1)])
    hot_p, hot_q = (merged(p, top), merged(q, top)) if heat == 1 else (p ** (1 / heat), softmax(logits / heat))
    hot_p = hot_p / hot_p.sum(1, keepdims=True)
    hot_p, hot_q = np.maximum(hot_p, 1e-300), np.maximum(hot_q, 1e-300)
    kl = (hot_p * np.log(hot_p / hot_q)).sum(1)
    overlap = np.minimum(np.take_along_axis(p, top, 1), np.take_along_axis(q, top, 1)).sum(1)
    weight = np.exp(-3 * overlap.mean()) if weight is None else weight
    return {
        "ce": ce,
        "kl": kl,
        "mixed": settings.alpha * kl + (1 - settings.alpha) * ce,
        "tv": 1 - overlap,
        "acceptance": weight * kl + (1 - weight) * (1 - overlap),
    }[settings.kind].mean()


def teacher_of(p, k):
    top = np.argsort(-p, axis=1)[:, :k]
    logprobs = np.log(np.take_along_axis(p, top, 1)).astype(np.float32)
    return TargetTopK(mx.array(top), mx.array(logprobs), mx.array(p.argmax(1)), mx.ones(ROWS))


def ours(logits, p, k, settings):
    teacher = teacher_of(p, k)
    value, slopes = mx.value_and_grad(lambda x: position_losses(x, teacher, settings)[0].mean())(
        mx.array(logits.astype(np.float32))
    )
    return value.item(), np.array(slopes)


def differences(logits, loss):
    slopes = np.zeros_like(logits)
    for place in np.ndindex(*logits.shape):
        moved = [logits.copy() for _ in range(2)]
        moved[0][place] += STEP
        moved[1][place] -= STEP
        slopes[place] = (loss(moved[0]) - loss(moved[1])) / (2 * STEP)
    return slopes


@pytest.mark.parametrize("k", [VOCABULARY, 6])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.kind}-{s.temperature:g}")
def test_loss_and_gradient_equal_the_full_vocabulary(settings, k):
    if settings.temperature != 1 and k < VOCABULARY:
        pytest.skip("the tail is tempered as one outcome: exact at temperature 1 alone")
    logits, p = distributions()
    value, slopes = ours(logits, p, k, settings)
    assert value == pytest.approx(reference(logits, p, k, settings), abs=1e-5)
    overlap = 1 - reference(logits, p, k, LossSettings("tv"))
    expected = differences(logits, lambda x: reference(x, p, k, settings, np.exp(-3 * overlap)))
    assert np.abs(expected).max() > 1e-3
    assert np.allclose(slopes, expected, atol=2e-5)


def test_acceptance_loss_weight_has_no_gradient():
    logits, p = distributions()
    settings = LossSettings("acceptance")
    _, slopes = ours(logits, p, 6, settings)
    assert not np.allclose(slopes, differences(logits, lambda x: reference(x, p, 6, settings)), atol=1e-3)


def test_acceptance_loss_is_kl_or_variation_at_extremes():
    logits, p = distributions()
    near, far = np.log(p) + 1e-3 * logits, np.where(np.arange(VOCABULARY) == p.argmin(1)[:, None], 40.0, 0.0)
    for guess, share in ((near, np.exp(-3)), (far, 1.0)):
        value, _ = ours(guess, p, VOCABULARY, LossSettings("acceptance"))
        kl, tv = (reference(guess, p, VOCABULARY, LossSettings(kind)) for kind in ("kl", "tv"))
        assert value == pytest.approx(share * kl + (1 - share) * tv, rel=0.05, abs=1e-4)
