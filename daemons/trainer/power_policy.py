"""Whether the machine gives a reason to wait with training: on battery, or hot. Read once a minute
at most; users may override it.

`check` is for the loop thread, as it may run a command; the rest may be called from any thread.
"""

import time
from collections.abc import Callable, Hashable

from specl.shared.runtime.power import Power, read
from specl.shared.settings.schema import Training

CHECK_S = 60.0


class PowerPolicy:
    """Time and the machine are arguments, so that tests need neither."""

    def __init__(
        self, training: Training, machine: Callable[[], Power] = read, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._training, self._machine, self._clock = training, machine, clock
        self._next_check = clock()
        self._reason = ""
        self._overriding: list[Hashable] = []

    def check(self) -> None:
        """Read the machine's state where that is due."""
        if (self._training.on_battery and self._training.when_hot) or self._clock() < self._next_check:
            return
        self._next_check = self._clock() + CHECK_S
        power = self._machine()
        if power.on_battery and not self._training.on_battery:
            self._reason = "on battery"
        else:
            self._reason = "the machine is hot" if power.hot and not self._training.when_hot else ""

    @property
    def reason_to_wait(self) -> str:
        """Why training waits; empty where it need not, or must not because of an override."""
        return "" if self._overriding else self._reason

    @property
    def machine_reason(self) -> str:
        """Why training would wait without any override."""
        return self._reason

    def override(self, work: Hashable) -> None:
        """Let training go on until `work` has ended, whatever the state of the machine. `work` may
        have to wait for its turn behind other jobs.
        """
        self._overriding.append(work)

    def end_override(self, work: Hashable) -> None:
        """Remove the override for `work`; no-op if it had none."""
        if work in self._overriding:
            self._overriding.remove(work)
