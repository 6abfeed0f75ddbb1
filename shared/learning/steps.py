"""The step loop: gradients, AdamW, a cosine schedule, accumulation, a budget, and a state that survives a kill.

Each `step` is one small piece, so that a trainer can stop between any two. What it does not know: where examples come from,
what is done with the result.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from specl.shared.learning.checkpointing import checkpointed
from specl.shared.learning.examples import Example, collate
from specl.shared.learning.learner import Learner
from specl.shared.learning.losses import EPSILON, LossSettings
from specl.shared.runtime.atomic_files import atomic_dir
from specl.shared.runtime.failpoints import failpoint

WARM_UP = 0.05  # share of the steps
CLIP = 1.0  # gradient norm


@dataclass(frozen=True, slots=True)
class StepSettings:
    """`total_steps` shapes the schedule; `depths` is how many of its own steps a head is trained over.

    `checkpointing` recomputes activations of the draft's layers in the backward pass: less memory, more time.
    """

    learning_rate: float
    total_steps: int
    accumulation: int = 1
    weight_decay: float = 0.01
    depths: int = 3
    checkpointing: bool = False


class StepLoop:
    """Trains `learner.module`'s trainable parameters."""

    def __init__(self, learner: Learner, loss: LossSettings, settings: StepSettings) -> None:
        self.learner, self.loss_settings, self.settings = learner, loss, settings
        self.step_number = 0
        self.time_share = 0.0  # of the run's time, where that is limited: the schedule ends with whichever ends first
        self.optimizer = optim.AdamW(learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
        self._gradients = nn.value_and_grad(
            learner.module, lambda batch: learner.weighed_loss(batch, self.loss_settings, settings.depths)
        )

    def _rate(self) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        done = max(self.step_number / max(self.settings.total_steps, 1), self.time_share)
        if done < WARM_UP:
            return self.settings.learning_rate * (done / WARM_UP + 0.02)
        phase = min(1.0, (done - WARM_UP) / (1 - WARM_UP))
        return self.settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * phase)))

    def step(self, groups: Sequence[Sequence[Example]], yield_now: Callable[[], None] = lambda: None) -> float:
        """One optimizer step over all `groups` as if they were one (accumulation): every piece weighs what its tokens weigh.
        Their mean loss.

        `yield_now` is called between pieces; it may wait, or raise to stop (nothing has changed then).
        """
        total, mean, scale = None, 0.0, 0.0
        self.learner.module.train()
        try:
            for group in groups:
                yield_now()
                with checkpointed(self.learner.layers if self.settings.checkpointing else ()):
                    (loss, weight), gradients = self._gradients(collate(group))
                mx.eval(loss, weight, gradients)
                scale += weight.item()
                share = weight.item() / max(scale, EPSILON)
                mean += share * (loss.item() - mean)
                total = gradients if total is None else _towards(total, gradients, share)
                mx.eval(total)
        finally:
            self.learner.module.eval()
        total, norm = optim.clip_grad_norm(total, CLIP)
        if not math.isfinite(mean) or not math.isfinite(norm.item()):
            raise FloatingPointError(f"the loss or its gradient is not finite at step {self.step_number}")
        self.optimizer.learning_rate = self._rate()
        self.optimizer.update(self.learner.module, total)
        mx.eval(self.learner.module.trainable_parameters(), self.optimizer.state)
        self.step_number += 1
        return mean

    # ------------------------------------------------------------------------------------------------ survive a kill
    def save(self, folder: Path, about: dict[str, object]) -> None:
        """Weights, moments and step, whole, by rename. Raises OSError, with the last one still there, where the disk refuses."""
        try:
            with atomic_dir(folder, sync=True) as scratch:
                self._write(scratch)
                (scratch / "state.json").write_text(json.dumps({"step": self.step_number, **about}))
        except (OSError, RuntimeError) as error:  # mlx says RuntimeError where a disk is full
            raise OSError(f"no checkpoint could be written to {folder}: {error}") from error
        failpoint("training.after_checkpoint")

    def _write(self, folder: Path) -> None:
        weights = dict(tree_flatten(self.learner.module.trainable_parameters()))
        mx.save_safetensors(str(folder / "weights.safetensors"), weights)
        state = {k: v for k, v in tree_flatten(self.optimizer.state) if isinstance(v, mx.array)}
        mx.save_safetensors(str(folder / "optimizer.safetensors"), state)

    def resume(self, folder: Path) -> None:
        """Go on where `save` was. Raises ValueError or OSError where the checkpoint does not fit."""
        weights = mx.load(str(folder / "weights.safetensors"))
        state = mx.load(str(folder / "optimizer.safetensors"))
        self.learner.module.load_weights(list(weights.items()), strict=False)
        self.optimizer.state = tree_unflatten(list(state.items()))
        mx.eval(self.learner.module.parameters(), self.optimizer.state)
        self.step_number = int(json.loads((folder / "state.json").read_text())["step"])


def _towards(mean: dict[str, Any], new: dict[str, Any], share: float) -> dict[str, Any]:
    """A running mean, `share` of it being `new`; the sums themselves could be too large for half precision."""
    return tree_map(lambda old, value: old + share * (value - old), mean, new)


def about_checkpoint(folder: Path) -> dict[str, object] | None:
    """What `save` was told, or None where there is no whole checkpoint."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        return None


class Batches:
    """Endless shuffled groups from two pools: `fresh` examples and replayed ones; seeded.

    The replayed share holds on average: groups of 2 with a share of 0.2 have one replayed text in two groups of five.
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
        self._owed = 0.5  # of fresh examples, so that a share which the size allows is met in every group
        self._order: list[list[int]] = [[], []]

    def next(self) -> list[Example]:
        """One group of `size` examples."""
        self._owed += self._size * self.fresh_share
        count = min(int(self._owed), self._size)
        self._owed -= count
        return [self._draw(0) for _ in range(count)] + [self._draw(1) for _ in range(self._size - count)]

    def _draw(self, place: int) -> Example:
        pool = self._pools[place]
        if not self._order[place]:
            self._order[place] = self._rng.permutation(len(pool)).tolist()
        return pool[self._order[place].pop()]


class Deadline:
    """Wall-clock budget of a run, counted only while it works."""

    def __init__(self, seconds: float, used: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock, self._start, self._away = seconds, clock, clock() - used, 0.0

    def pause(self, seconds: float) -> None:
        """Time spent waiting does not count."""
        self._away += seconds

    @property
    def used(self) -> float:
        """Seconds worked."""
        return self._clock() - self._start - self._away

    @property
    def share(self) -> float:
        """How much of the budget is spent, 0 to 1."""
        return min(1.0, self.used / self._seconds) if self._seconds > 0 else 1.0

    @property
    def over(self) -> bool:
        """Whether the budget is spent."""
        return self.used >= self._seconds
