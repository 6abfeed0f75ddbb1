"""The steps of one run: batches, budget, early stopping, and the checkpoints from which a killed or
stopped run is resumed.

Knows what is trained and for how long, nothing of scores, verdicts or published adapters.
"""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from specl.daemons.trainer.data_loader import TrainingData, micro_batches
from specl.daemons.trainer.throttle import Abandoned
from specl.shared.errors import Interrupted
from specl.shared.learning.early_stopping import EarlyStopping, split_validation
from specl.shared.learning.examples import Example
from specl.shared.learning.learner import Learner
from specl.shared.learning.losses import LossSettings
from specl.shared.learning.steps import BatchSampler, Deadline, StepLoop, StepSettings
from specl.shared.retention import checkpoints
from specl.shared.runtime import log
from specl.shared.settings.plugins import is_plugin, load_plugin
from specl.shared.settings.schema import Settings
from specl.shared.store import Store
from specl.shared.training_files.checkpoint import load_checkpoint, read_notes, save_checkpoint

MICRO_BATCH_TOKENS = 256  # of one forward and backward: what a request may have to wait for
CHECKPOINT_S = 20.0
SAME_WORK = 0.75  # of the generations of a checkpoint and a new run that both have
MIN_NEW_FAILURES = 8  # that the parent has not seen; fewer would be learned by heart
TRAINED_DEPTHS = 2  # of a head's own steps, as `draft build` does: the third costs half as much time again
RECIPE = {
    "lora", "loss", "learning_rate", "batch_size", "gradient_accumulation_steps", "replay_ratio", "num_epochs", "max_minutes",
}  # fmt: skip
_log = log.get("training")


@dataclass(slots=True)
class RunProgress:
    """The progress of the job under way, for `status`. The MLX thread writes it, the loop thread
    reads it.
    """

    state: str = "idle"
    step: int = 0
    total: int = 0
    loss: float | None = None

    def set_step(self, step: int, total: int) -> None:
        """Set the number of steps that are done, and of all."""
        self.step, self.total = step, total

    def clear(self) -> None:
        """Reset to no steps."""
        self.step, self.total, self.loss = 0, 0, None


@dataclass(slots=True)
class TrainingLoop:
    """Trains what is attached to a learner. `base` is what the weights begin from: fingerprint of
    the draft, id of the parent; `parent_seen_ids` are generations that the parent was trained on.
    `pause` as in RunContext.

    Afterwards `eligible_ids` names all training generations, a resumed run's included, `seen_ids`
    those that were in a batch, and `losses` has one a step. A checkpoint keeps these under names of
    the first version: ids, shown, watched.
    """

    data: TrainingData
    replay: list[Example]
    settings: Settings
    folder: Path
    store: Store
    base: dict[str, str]
    parent_seen_ids: Collection[str]
    progress: RunProgress
    pause: Callable[[], float]
    eligible_ids: list[str] = field(default_factory=list)
    seen_ids: set[str] = field(default_factory=set)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    validation_losses: list[float] = field(default_factory=list)

    def run(self, learner: Learner) -> None:
        """Run all steps, or as many as there is time for. Raises Interrupted when told to stop: the
        checkpoint stays.
        """
        training = self.settings.training
        train, validation = split_validation([*self.data.failures, *self.data.successes])
        train_ids = {example.id for example in train}
        self.eligible_ids = sorted({*self.eligible_ids, *train_ids})
        fresh, replayed = self.pools(train_ids)
        batches = BatchSampler(fresh, replayed, training.batch_size, training.replay_ratio, seed=0)
        fresh_a_step = training.batch_size * training.gradient_accumulation_steps * max(batches.fresh_share, 0.1)
        total = max(1, math.ceil(len(fresh) * training.num_epochs / fresh_a_step))
        loss = self._loss()
        checkpointing = self.settings.memory.gradient_checkpointing
        steps = StepSettings(training.learning_rate, total, depths=TRAINED_DEPTHS, checkpointing=checkpointing)
        loop = StepLoop(learner, loss, steps)
        deadline = Deadline(training.max_minutes * 60, self._resume(loop, batches))
        stop = EarlyStopping(learner, validation, loss, TRAINED_DEPTHS, losses=self.validation_losses)
        self.validation_losses = stop.losses
        self.progress.state = "training"
        self.progress.set_step(loop.step_number, total)
        try:
            self._steps(loop, batches, deadline, stop)
            self._save(loop, deadline)  # the scores may be interrupted, too
        except Abandoned:
            raise
        except Interrupted:
            self._save(loop, deadline)
            raise

    def _loss(self) -> LossSettings:
        loss = self.settings.training.loss
        custom = load_plugin(loss.type, "training.loss.type") if is_plugin(loss.type) else None
        return LossSettings(loss.type, loss.temperature, loss.alpha, custom)

    def pools(self, train_ids: Collection[str]) -> tuple[list[Example], list[Example]]:
        """Two pools: fresh texts, and texts to replay. Failures that the parent has seen go to the
        second where there are enough new ones. Otherwise failures of a new kind of work would be
        drowned by all earlier ones.
        """
        failures, successes = (
            [example for example in part if example.id in train_ids]
            for part in (self.data.failures, self.data.successes)
        )
        new = [example for example in failures if example.id not in self.parent_seen_ids]
        if len(new) >= MIN_NEW_FAILURES:
            seen = [example for example in failures if example.id in self.parent_seen_ids]
            return new, [*seen, *successes, *self.replay]
        return (failures, [*successes, *self.replay]) if failures else (successes, self.replay)

    def _steps(self, loop: StepLoop, batches: BatchSampler, deadline: Deadline, stop: EarlyStopping) -> None:
        """Run steps until all are done, the time is over, or the validation loss no longer falls."""
        saved_at = time.monotonic()

        def wait() -> None:
            deadline.pause(self.pause())

        while loop.step_number < self.progress.total and not deadline.over:
            if stop.should_stop(deadline.used, wait):
                _log.info("training.stopped_early", step=loop.step_number, losses=[round(x, 4) for x in stop.losses])
                return
            groups = [
                group
                for _ in range(self.settings.training.gradient_accumulation_steps)
                for group in micro_batches(batches.next(), MICRO_BATCH_TOKENS)
            ]
            loop.time_share = deadline.share
            self.seen_ids |= {example.id for group in groups for example in group} & set(self.eligible_ids)
            self.losses.append(loop.step(groups, wait))
            self.tokens += sum(example.rows for group in groups for example in group)
            self.progress.step, self.progress.loss = loop.step_number, round(float(np.mean(self.losses[-10:])), 4)
            if time.monotonic() - saved_at > CHECKPOINT_S:
                self._save(loop, deadline)
                saved_at = time.monotonic()

    # ------------------------------------------------------------------------------------------------ checkpoints
    @property
    def _checkpoint(self) -> Path:
        return checkpoints.checkpoint_folder(self.folder)

    def _save(self, loop: StepLoop, deadline: Deadline) -> None:
        """Save a checkpoint. A disk that has no room for it does not end the run."""
        notes = {
            "ids": self.eligible_ids,
            "shown": sorted(self.seen_ids),
            "used_s": deadline.used,
            "losses": self.losses,
            "tokens": self.tokens,
            "watched": self.validation_losses,
        }
        try:
            save_checkpoint(self._checkpoint, loop.state, self._plan() | notes)
        except OSError as error:
            _log.warning("checkpoint.not_saved", reason=str(error))

    def _plan(self) -> dict[str, Any]:
        """Everything that shapes the weights. A checkpoint that was made with another plan is not resumed."""
        return {**self.base, "recipe": self.settings.training.model_dump(mode="json", include=RECIPE)}

    def _is_same_work(self, notes: dict[str, Any]) -> bool:
        """Whether to resume a killed run's checkpoint: it was made with the same plan and mostly on
        the same generations, all of them are still stored, and none of them is held out.
        """
        ids, now = set(notes.get("ids", [])), set(self.eligible_ids)
        held_out = {example.id for example in self.data.held_out}
        same_plan = all(notes.get(name) == value for name, value in self._plan().items())
        mostly = len(ids & now) >= SAME_WORK * len(ids | now)
        return same_plan and mostly and not ids & held_out and not self.store.missing(sorted(ids))

    def _resume(self, loop: StepLoop, batches: BatchSampler) -> float:
        """Resume a killed run from its checkpoint if that is of the same work, otherwise remove it.
        Returns the seconds that it had worked.
        """
        notes = read_notes(self._checkpoint)
        if notes is None:
            return 0.0
        if self._is_same_work(notes):
            try:
                loop.restore(load_checkpoint(self._checkpoint))
                for _ in range(loop.step_number * self.settings.training.gradient_accumulation_steps):
                    batches.next()
                self.eligible_ids = sorted({*notes["ids"], *self.eligible_ids})
                self.seen_ids, self.validation_losses = set(notes["shown"]), list(notes["watched"])
                self.losses, self.tokens = list(notes["losses"]), int(notes["tokens"])
                _log.info("training.resumed", step=loop.step_number)
                return float(notes["used_s"])
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                _log.warning("checkpoint.unusable", reason=str(error))
        checkpoints.forget(self._checkpoint)
        return 0.0
