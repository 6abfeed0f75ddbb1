"""The steps of one run: batches, budget, early stop, and checkpoints that a killed or stopped run goes on from.

Knows what is learned and for how long, nothing of scores, gates or adapters on disk.
"""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from specl.daemons.trainer.data_loader import DataLoader, TrainingData, pieces
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
from specl.shared.training_files.checkpoint import load_checkpoint, read_notes, save_checkpoint

PIECE_TOKENS = 256  # of one forward and backward: what a request may have to wait for
CHECKPOINT_S = 20.0
SAME_WORK = 0.75  # of the generations of a checkpoint and a new run that both have
ENOUGH_NEW = 8  # failures that the parent did not learn from; fewer would be learned by heart
TRAINED_DEPTHS = 2  # of a head's own steps, as `draft build` does: the third costs half as much time again
RECIPE = {
    "lora", "loss", "learning_rate", "batch_size", "gradient_accumulation_steps", "replay_ratio", "num_epochs", "max_minutes",
}  # fmt: skip
_log = log.get("training")


@dataclass(slots=True)
class Live:
    """What `status` shows of a run under way."""

    state: str = "idle"
    step: int = 0
    total: int = 0
    loss: float | None = None

    def tell(self, step: int, total: int) -> None:
        """How far its present work is."""
        self.step, self.total = step, total


@dataclass(slots=True)
class TrainingLoop:
    """Trains what is attached to `learner`. `origin` is what the weights began from: draft and parent; `known` names the
    generations that the parent was shown. `pause` as in TrainingJob.

    Afterwards `learned` names every generation that the weights may have seen, a resumed run's included, `shown` those that they
    have seen, and `losses` has one a step.
    """

    material: TrainingData
    replay: list[Example]
    settings: Settings
    folder: Path
    data_loader: DataLoader
    origin: dict[str, str]
    known: Collection[str]
    live: Live
    pause: Callable[[], float]
    learned: list[str] = field(default_factory=list)
    shown: set[str] = field(default_factory=set)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    watched: list[float] = field(default_factory=list)  # losses on what was set aside

    def run(self, learner: Learner) -> None:
        """All steps, or as many as there is time for. Raises Interrupted when told to stop: the checkpoint stays."""
        training, material = self.settings.training, self.material
        taught, aside = split_validation([*material.failures, *material.successes])
        kept = {example.id for example in taught}
        self.learned = sorted({*self.learned, *kept})
        fresh, again = self._pools(kept)
        batches = BatchSampler(fresh, again, training.batch_size, training.replay_ratio, seed=0)
        fresh_a_step = training.batch_size * training.gradient_accumulation_steps * max(batches.fresh_share, 0.1)
        total = max(1, math.ceil(len(fresh) * training.num_epochs / fresh_a_step))
        kind = training.loss.type
        custom = load_plugin(kind, "training.loss.type") if is_plugin(kind) else None
        loss = LossSettings(kind, training.loss.temperature, training.loss.alpha, custom)
        checkpointing = self.settings.memory.gradient_checkpointing
        steps = StepSettings(training.learning_rate, total, depths=TRAINED_DEPTHS, checkpointing=checkpointing)
        loop = StepLoop(learner, loss, steps)
        deadline = Deadline(training.max_minutes * 60, self._resume(loop, batches))
        stop = EarlyStopping(learner, aside, loss, TRAINED_DEPTHS, losses=self.watched)
        self.watched = stop.losses
        self.live.state, self.live.step, self.live.total = "training", loop.step_number, total
        try:
            self._steps(loop, batches, deadline, stop)
            self._save(loop, deadline)  # the scores may be interrupted, too
        except Abandoned:
            raise
        except Interrupted:
            self._save(loop, deadline)
            raise

    def _pools(self, kept: Collection[str]) -> tuple[list[Example], list[Example]]:
        """Texts to learn, and texts to replay. Failures that the parent was shown are replayed, where there are enough others:
        else work of a new kind would have to wait its turn behind all that ever failed.
        """
        failures, successes = (
            [example for example in part if example.id in kept]
            for part in (self.material.failures, self.material.successes)
        )
        new = [example for example in failures if example.id not in self.known]
        if len(new) >= ENOUGH_NEW:
            old = [example for example in failures if example.id in self.known]
            return new, [*old, *successes, *self.replay]
        return (failures, [*successes, *self.replay]) if failures else (successes, self.replay)

    def _steps(self, loop: StepLoop, batches: BatchSampler, deadline: Deadline, stop: EarlyStopping) -> None:
        """Until all are done, the time is over, or what was set aside no longer gets better."""
        saved = time.monotonic()

        def wait() -> None:
            deadline.pause(self.pause())

        while loop.step_number < self.live.total and not deadline.over:
            if stop.should_stop(deadline.used, wait):
                _log.info("training.early_stop", step=loop.step_number, losses=[round(loss, 4) for loss in stop.losses])
                return
            groups = [
                group
                for _ in range(self.settings.training.gradient_accumulation_steps)
                for group in pieces(batches.next(), PIECE_TOKENS)
            ]
            loop.time_share = deadline.share
            self.shown |= {example.id for group in groups for example in group} & set(self.learned)
            value = loop.step(groups, wait)
            self.tokens += sum(example.rows for group in groups for example in group)
            self.losses.append(value)
            self.live.step, self.live.loss = loop.step_number, round(float(np.mean(self.losses[-10:])), 4)
            if time.monotonic() - saved > CHECKPOINT_S:
                self._save(loop, deadline)
                saved = time.monotonic()

    # ------------------------------------------------------------------------------------------------ survive a kill
    @property
    def _checkpoint(self) -> Path:
        return checkpoints.checkpoint_folder(self.folder)

    def _save(self, loop: StepLoop, deadline: Deadline) -> None:
        """Keep what a kill should not cost. A disk that has no room for it does not end the run."""
        done = {
            "ids": self.learned,
            "shown": sorted(self.shown),
            "used_s": deadline.used,
            "losses": self.losses,
            "tokens": self.tokens,
            "watched": self.watched,
        }
        try:
            save_checkpoint(self._checkpoint, loop.state, self._plan() | done)
        except OSError as error:
            _log.warning("checkpoint.not_saved", reason=str(error))

    def _plan(self) -> dict[str, Any]:
        """What shapes the weights and their way: a checkpoint made otherwise is none of this run's."""
        return {**self.origin, "recipe": self.settings.training.model_dump(mode="json", include=RECIPE)}

    def _same_work(self, about: dict[str, Any]) -> bool:
        """Whether a killed run's checkpoint is worth going on with: made in the same way, mostly on the same generations (some
        were answered since), all of which are still kept and none of which is judged on.
        """
        ids, fresh = set(about.get("ids", [])), set(self.learned)
        judges = {example.id for example in self.material.held_out}
        same = all(about.get(name) == value for name, value in self._plan().items())
        mostly = len(ids & fresh) >= SAME_WORK * len(ids | fresh)
        return same and mostly and not ids & judges and not self.data_loader.store.missing(sorted(ids))

    def _resume(self, loop: StepLoop, batches: BatchSampler) -> float:
        """Go on with a killed run's checkpoint if it was about the same work, otherwise drop it; seconds that it had worked."""
        about = read_notes(self._checkpoint)
        if about is None:
            return 0.0
        if self._same_work(about):
            try:
                loop.restore(load_checkpoint(self._checkpoint))
                for _ in range(loop.step_number * self.settings.training.gradient_accumulation_steps):
                    batches.next()
                self.learned = sorted({*about["ids"], *self.learned})
                self.shown, self.watched = set(about["shown"]), list(about["watched"])
                self.losses, self.tokens = list(about["losses"]), int(about["tokens"])
                _log.info("training.resumed", step=loop.step_number)
                return float(about["used_s"])
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                _log.warning("checkpoint.unusable", reason=str(error))
        checkpoints.forget(self._checkpoint)
        return 0.0
