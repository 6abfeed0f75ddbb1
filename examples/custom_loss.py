"""A custom loss: reverse KL, which avoids words that the target would not say. `python
examples/custom_loss.py` tries it on toy rows.

For the trainer: `training: {loss: {type: "custom_loss:reverse_kl"}}` in the settings, with this
folder on PYTHONPATH.
"""

import mlx.core as mx
import mlx.optimizers as optim

from specl.shared.learning.losses import LossSettings, TargetTopK


def reverse_kl(logits: mx.array, target: TargetTopK, settings: LossSettings) -> tuple[mx.array, mx.array]:
    """KL(draft || target) over the target's top-k, a loss and a validity (0 or 1) for each row of
    `logits` [m, columns].

    `target.columns` [m, k] says which columns the top-k are (-1: not in the draft's vocabulary),
    `target.logprobs` their log-probabilities; `settings` are type, temperature and alpha of
    training.loss. Gradients must flow: no `.item()`.
    """
    inside = (target.columns >= 0).astype(mx.float32)
    columns = mx.maximum(target.columns, 0)
    log_q = mx.take_along_axis(logits, columns, axis=1) - mx.logsumexp(logits, axis=1, keepdims=True)
    q = mx.exp(log_q) * inside
    outside = mx.maximum(
        1.0 - q.sum(axis=1), 1e-9
    )  # what the draft gives to all else, where the target gives next to nothing
    losses = (q * (log_q - target.logprobs)).sum(axis=1) + outside * (mx.log(outside) + 9.0)
    return losses, (inside.sum(axis=1) > 0).astype(mx.float32)


if __name__ == "__main__":
    sampling = mx.log(mx.array([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]]))
    target = TargetTopK(mx.array([[4, 1, 7], [0, 2, 3]]), sampling, mx.array([4, 0]), mx.ones(2))
    logits, optimizer = {"logits": mx.zeros((2, 10))}, optim.Adam(learning_rate=0.1)
    step = mx.value_and_grad(lambda p: reverse_kl(p["logits"], target, LossSettings())[0].mean())
    for number in range(101):
        loss, gradients = step(logits)
        logits = optimizer.apply_gradients(gradients, logits)
        if number % 25 == 0:
            print(f"step {number}: loss {loss.item():.4f}")
