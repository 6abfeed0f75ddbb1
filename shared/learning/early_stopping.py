"""When to stop training before its time: the loss on a few of its own texts that were set aside no longer falls.

They are training texts: what judges an adapter afterwards (held-out conversations, the regression slice) is never looked at
here, or the gate would be shown what was chosen to please it. Knows losses and seconds worked, not who trains.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np

from specl.shared.learning.examples import Example, collate
from specl.shared.learning.learner import Learner
from specl.shared.learning.losses import LossSettings

SHARE = 16  # one text in so many is set aside
LEAST = 4  # fewer say nothing, and none is set aside
MOST = 16  # more would take too much of the time
EVERY_S = 30.0  # of work between two looks
PATIENCE = 3  # looks without a new lowest loss that end the training


def set_aside(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """What to train on, and what to look at: one in SHARE, chosen by id, so that a run that goes on elsewhere keeps nearly all
    of the choice. Nothing is set aside where that is fewer than LEAST.
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
    """Looks at `texts` (what `set_aside` gave; none: never stops) as training goes on. Made before the first step, whose loss
    is the one to fall below.
    """

    def __init__(
        self,
        learner: Learner,
        texts: Sequence[Example],
        loss: LossSettings,
        depths: int,
        every_s: float = EVERY_S,
        patience: int = PATIENCE,
        known: Sequence[float] = (),
    ) -> None:
        self._learner, self._texts, self._settings, self._depths = learner, list(texts), loss, depths
        self._every, self._patience, self._next = every_s, patience, 0.0
        self.losses = list(known)  # one a look, the first before any training; of a run that goes on, `known` before

    def look(self, worked_s: float, pause: Callable[[], object] = lambda: None) -> bool:
        """Whether to stop. Call it before the first step and after every step; it scores when `every_s` more seconds were
        worked. `pause` is called between texts, and may wait or raise.
        """
        if not self._texts or worked_s < self._next:
            return False
        self.losses.append(self._score(pause))
        self._next = worked_s + self._every
        return self.over

    @property
    def over(self) -> bool:
        """Whether the last `patience` looks had no lower loss than some look before them."""
        lowest = int(np.argmin(self.losses)) if self.losses else 0
        return len(self.losses) - 1 - lowest >= self._patience

    def _score(self, pause: Callable[[], object]) -> float:
        """Mean loss, weighted as in training. A text at a time: no piece is long, and nothing is padded."""
        self._learner.module.eval()
        total = weights = 0.0
        for text in self._texts:
            pause()
            loss, weight = self._learner.weighed_loss(collate([text]), self._settings, self._depths)
            weights += weight.item()
            total += loss.item() * weight.item()
        return total / weights if weights and math.isfinite(total) else math.inf
