"""The step loop: gradients, AdamW, a cosine schedule, accumulation, a time budget, and a state to
go on from.

Each `step` is one small piece of work, so that a trainer can stop between any two. Does not know
where examples come from, what is done with the result, or where a state is kept.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from specl.shared.learning.examples import Example, collate
from specl.shared.learning.gradient_checkpointing import checkpointed
from specl.shared.learning.learner import Learner
from specl.shared.learning.losses import EPSILON, LossSettings

Gradients = dict[str, Any]  # a tree of arrays by parameter name
WARM_UP = 0.05  # share of the steps
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True)
class StepSettings:
    """`total_steps` shapes the schedule; `depths` is the number of its own steps that a head is
    trained over.

    `checkpointing` recomputes activations of the draft's layers in the backward pass: less memory,
    more time.
    """

    learning_rate: float
    total_steps: int
    accumulation: int = 1
    weight_decay: float = 0.01
    depths: int = 3
    checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The state that a run resumes from: trainable weights and optimizer arrays by parameter path, and the
    number of steps taken.
    """

    weights: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    step: int


class StepLoop:
    """Trains `learner.module`'s trainable parameters."""

    def __init__(self, learner: Learner, loss: LossSettings, settings: StepSettings) -> None:
        self.learner, self.loss_settings, self.settings = learner, loss, settings
        self.step_number = 0
        self.time_share = 0.0  # of the time budget, if any: the schedule ends with the steps or with the time
        self.optimizer = optim.AdamW(learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
        self._gradients = nn.value_and_grad(
            learner.module, lambda batch: learner.weighted_loss(batch, self.loss_settings, settings.depths)
        )

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step: linear warm-up, then a cosine down to a tenth."""
        done = max(self.step_number / max(self.settings.total_steps, 1), self.time_share)
        if done < WARM_UP:
            return self.settings.learning_rate * (done / WARM_UP + 0.02)
        phase = min(1.0, (done - WARM_UP) / (1 - WARM_UP))
        return self.settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * phase)))

    def step(self, groups: Sequence[Sequence[Example]], yield_now: Callable[[], None] = lambda: None) -> float:
        """One optimizer step over all `groups` as if they were one (accumulation): every group has
        the weight of its tokens. Returns their mean loss. Raises FloatingPointError where it is not
        finite.

        `yield_now` is called before each group; it may wait, or raise to stop (nothing has changed
        then).
        """
        self.learner.module.train()
        try:
            loss, gradients = self._accumulate(groups, yield_now)
        finally:
            self.learner.module.eval()
        gradients, norm = optim.clip_grad_norm(gradients, MAX_GRADIENT_NORM)
        if not math.isfinite(loss) or not math.isfinite(norm.item()):
            raise FloatingPointError(f"the loss or its gradient is not finite at step {self.step_number}")
        self.optimizer.learning_rate = self.learning_rate
        self.optimizer.update(self.learner.module, gradients)
        mx.eval(self.learner.module.trainable_parameters(), self.optimizer.state)
        self.step_number += 1
        return loss

    def _accumulate(
        self, groups: Sequence[Sequence[Example]], yield_now: Callable[[], None]
    ) -> tuple[float, Gradients]:
        """Mean loss and mean gradients of the groups. Running means: sums could be too large for
        half precision.
        """
        mean_loss, mean_gradients, total_weight = 0.0, None, 0.0
        for group in groups:
            yield_now()
            with checkpointed(self.learner.layers if self.settings.checkpointing else ()):
                (loss, weight), gradients = self._gradients(collate(group))
            mx.eval(loss, weight, gradients)
            total_weight += weight.item()
            share = weight.item() / max(total_weight, EPSILON)
            mean_loss += share * (loss.item() - mean_loss)
            mean_gradients = gradients if mean_gradients is None else _towards(mean_gradients, gradients, share)
            mx.eval(mean_gradients)
        if mean_gradients is None:
            raise ValueError("a step needs at least one group of examples")
        return mean_loss, mean_gradients

    @property
    def state(self) -> TrainingState:
        """A copy of what `restore` needs to go on from here."""
        values: dict[str, object] = dict(tree_flatten(self.optimizer.state))
        optimizer = {name: value for name, value in values.items() if isinstance(value, mx.array)}
        return TrainingState(
            dict(tree_flatten(self.learner.module.trainable_parameters())), optimizer, self.step_number
        )

    def restore(self, state: TrainingState) -> None:
        """Go on from `state`. Raises ValueError where its weights do not fit the module."""
        self.learner.module.load_weights(list(state.weights.items()), strict=False)
        self.optimizer.state = tree_unflatten(list(state.optimizer.items()))
        mx.eval(self.learner.module.parameters(), self.optimizer.state)
        self.step_number = state.step


def _towards(mean: Gradients, new: Gradients, share: float) -> Gradients:
    """`mean` moved towards `new` by `share`."""
    moved: Gradients = tree_map(lambda old, value: old + share * (value - old), mean, new)
    return moved


class BatchSampler:
    """Endless shuffled groups from two pools: `fresh` examples and replayed ones; seeded.

    The replayed share holds on average: groups of 2 with a share of 0.2 have one replayed text in
    two groups of five.
    """

    def __init__(
        self, fresh: Sequence[Example], replay: Sequence[Example], size: int, replay_share: float, seed: int
    ) -> None:
        if not fresh and not replay:
            raise ValueError("no examples")
        self._rng = np.random.default_rng(seed)
        self._pools = [list(fresh), list(replay)]
        self._size = size
        self.fresh_share = 1 - replay_share if fresh and replay else float(bool(fresh))
        self._owed = (
            0.5  # fresh examples not yet drawn; begins at a half so that a share that is a whole number is exact
        )
        self._order: list[list[int]] = [[], []]

    def next(self) -> list[Example]:
        """One group of `size` examples."""
        self._owed += self._size * self.fresh_share
        count = min(int(self._owed), self._size)
        self._owed -= count
        return [self._draw(0) for _ in range(count)] + [self._draw(1) for _ in range(self._size - count)]

    def _draw(self, index: int) -> Example:
        pool = self._pools[index]
        if not self._order[index]:
            self._order[index] = self._rng.permutation(len(pool)).tolist()
        return pool[self._order[index].pop()]


class Deadline:
    """Time budget of a run in seconds, counted only while it works; `used` by earlier runs counts
    too.
    """

    def __init__(self, seconds: float, used: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock, self._start, self._away = seconds, clock, clock() - used, 0.0

    def pause(self, seconds: float) -> None:
        """Time spent waiting does not count."""
        self._away += seconds

    @property
    def used(self) -> float:
        """Seconds worked so far."""
        return self._clock() - self._start - self._away

    @property
    def share(self) -> float:
        """How much of the budget is spent, 0 to 1."""
        return min(1.0, self.used / self._seconds) if self._seconds > 0 else 1.0

    @property
    def over(self) -> bool:
        """Whether the budget is spent."""
        return self.used >= self._seconds
