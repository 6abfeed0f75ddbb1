"""Whether the machine objects to training: on battery, or hot. Looked at once a minute at most; who insists is not held up.

`look` is for the loop thread, as it may run a command; the rest may be called from any.
"""

import time
from collections.abc import Callable, Hashable

from specl.shared.runtime.power import Power, read
from specl.shared.settings.schema import Training

LOOK_S = 60.0


class PowerPolicy:
    """What `objection` says is why training waits. Time and the machine are arguments, so that tests need neither."""

    def __init__(
        self, training: Training, machine: Callable[[], Power] = read, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._training, self._machine, self._clock = training, machine, clock
        self._next_look = clock()
        self._objection = ""
        self._insisting: list[Hashable] = []  # work that somebody wants in spite of it

    def look(self) -> None:
        """Look at the machine where that is due."""
        if (self._training.on_battery and self._training.when_hot) or self._clock() < self._next_look:
            return
        self._next_look = self._clock() + LOOK_S
        found = self._machine()
        if found.on_battery and not self._training.on_battery:
            self._objection = "on battery"
        else:
            self._objection = "the machine is hot" if found.hot and not self._training.when_hot else ""

    @property
    def objection(self) -> str:
        """Why training waits; empty where it need not, or must not because somebody insists."""
        return "" if self._insisting else self._objection

    @property
    def objects(self) -> bool:
        """Whether it would hold up who does not insist."""
        return bool(self._objection)

    def insist(self, work: Hashable) -> None:
        """Until `work` has ended, nothing is held up: it may have to wait for its turn behind something that is."""
        self._insisting.append(work)

    def relent(self, work: Hashable) -> None:
        """It has ended; of work that nobody insisted on nothing is to be said."""
        if work in self._insisting:
            self._insisting.remove(work)
