"""When the trainer may work: not while inference answers, and not at once after, and not while the machine objects. Knows time,
one flag and a reason not to, nothing else.

After ten minutes of deferral it takes a quarter of the time, so that a daemon that is always busy learns too. Deferral is
waiting beyond that quarter: it grows while work waits, pauses between requests that are too short to work in included, and
every second of work pays three of it back. Time in which the machine objects is none of it.
"""

import threading
import time
from collections.abc import Callable

from specl.shared.errors import Interrupted

DEFER_S = 600.0
DUTY = 0.25
SILENCE_S = 10.0  # inference says every two seconds whether it is busy: one that says nothing for so long is not there
NAP_S = 0.1
HELD_NAP_S = 1.0  # on battery every awakening costs; a stop waits 1.5 s
LONGEST_PIECE_S = 30.0  # what lies longer between two passes was no piece of work but a time without any


class Abandoned(Interrupted):
    """The run under way must end, and leave nothing to go on with."""


class Superseded(Interrupted):
    """What the run goes on from is no longer in force: its outcome would be refused."""


class Throttle:
    """`wait_for_turn` is called between two pieces of work. Time is an argument, so that tests need not wait."""

    def __init__(
        self,
        idle_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        objection: Callable[[], str] = lambda: "",
    ) -> None:
        self._idle_s, self._clock, self._sleep, self._objection = idle_s, clock, sleep, objection
        self._busy = False
        self._heard_at = self._quiet_since = clock()
        self._passed_at = clock()
        self._deferred_s = 0.0
        self._stop = threading.Event()
        self._abandon = threading.Event()

    def heard(self, busy: bool) -> None:
        """Inference became busy or idle."""
        self._heard_at = self._clock()
        if self._busy and not busy:
            self._quiet_since = self._heard_at
        self._busy = busy

    def stop(self) -> None:
        """Whoever passes from now on is told to stop."""
        self._stop.set()

    def abandon(self) -> None:
        """Whoever passes next ends its run for good."""
        self._abandon.set()

    def abandoned(self) -> None:
        """The run has ended, one way or another: the next one may pass."""
        self._abandon.clear()

    @property
    def abandoning(self) -> bool:
        """Whether a run has been told to end and has not yet."""
        return self._abandon.is_set()

    @property
    def quiet(self) -> bool:
        """Whether inference has been idle long enough, or away."""
        now = self._clock()
        if self._busy:
            return now - self._heard_at >= SILENCE_S
        return now - self._quiet_since >= self._idle_s

    def wait_for_turn(self) -> float:
        """Wait until work may go on; seconds waited. Raises Interrupted when told to stop."""
        start = self._clock()
        worked = min(start - self._passed_at, LONGEST_PIECE_S)
        deferred = max(0.0, self._deferred_s - worked * (1 - DUTY) / DUTY)
        held = 0.0
        while True:
            if self._stop.is_set():
                raise Interrupted("the trainer is stopping")
            if self._abandon.is_set():
                raise Abandoned("what it learned from is to be forgotten")
            now = self._clock()
            if self._objection():
                self._sleep(HELD_NAP_S)
                held += self._clock() - now
                continue
            waited = now - start - held
            if self.quiet or deferred + waited >= DEFER_S:
                self._passed_at = now
                self._deferred_s = min(deferred + waited, DEFER_S)
                return waited + held
            self._sleep(NAP_S)
