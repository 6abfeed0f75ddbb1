"""Early stopping: training ends when the loss on a few validation texts no longer falls.

Validation texts are training texts that are set aside. What an adapter is judged on afterwards
(held-out conversations, the regression slice) is never used here, or the judge would see what was
selected on its own data. Knows losses and seconds worked, not who trains.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np

from specl.shared.learning.examples import Example, collate
from specl.shared.learning.learner import Learner
from specl.shared.learning.losses import LossSettings

SHARE = 16  # one text in this many is used for validation
LEAST = 4  # fewer texts say nothing: then there is no validation
MOST = 16  # more texts would take too much of the time
EVERY_S = 30.0  # of work between two validations
PATIENCE = 3  # validations without a new lowest loss that end the training


def split_validation(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Training and validation texts: one in SHARE, chosen by id, so that a resumed run keeps nearly
    all of the choice. There is no validation text where that is fewer than LEAST.
    """
    count = min(len(examples) // SHARE, MOST)
    if count < LEAST:
        return list(examples), []
    ids = sorted({example.id for example in examples}, key=lambda id: hashlib.sha256(id.encode()).digest())
    chosen = set(ids[:count])
    return (
        [example for example in examples if example.id not in chosen],
        [example for example in examples if example.id in chosen],
    )


class EarlyStopping:
    """Validates on `texts` (of `split_validation`; without any it never stops). `losses` has one
    loss for each validation, those of earlier runs first; the very first is taken before any
    training and is the loss to fall below.
    """

    def __init__(
        self,
        learner: Learner,
        texts: Sequence[Example],
        loss: LossSettings,
        depths: int,
        every_s: float = EVERY_S,
        patience: int = PATIENCE,
        losses: Sequence[float] = (),
    ) -> None:
        self._learner, self._texts, self._settings, self._depths = learner, list(texts), loss, depths
        self._every, self._patience, self._next = every_s, patience, 0.0
        self.losses = list(losses)

    def should_stop(self, worked_s: float, pause: Callable[[], object] = lambda: None) -> bool:
        """Whether to stop. Call it before the first step and after every step; it validates once
        `every_s` more seconds were worked. `pause` is called between texts, and may wait or raise.
        """
        if not self._texts or worked_s < self._next:
            return False
        self.losses.append(self._validation_loss(pause))
        self._next = worked_s + self._every
        return self.is_over

    @property
    def is_over(self) -> bool:
        """Whether none of the last `patience` validations had a new lowest loss."""
        lowest = int(np.argmin(self.losses)) if self.losses else 0
        return len(self.losses) - 1 - lowest >= self._patience

    def _validation_loss(self, pause: Callable[[], object]) -> float:
        """Mean loss, weighted as in training. One text at a time: no forward pass is long, and
        nothing is padded.
        """
        self._learner.module.eval()
        total = weights = 0.0
        for text in self._texts:
            pause()
            loss, weight = self._learner.weighted_loss(collate([text]), self._settings, self._depths)
            weights += float(np.array(weight))
            total += float(np.array(loss)) * float(np.array(weight))
        return total / weights if weights and math.isfinite(total) else math.inf
