"""When the trainer may work: not while inference answers, nor at once after, nor while the machine
gives a reason to wait. Knows time, one flag and that reason, nothing else.

After ten minutes of deferral it takes a quarter of the time, so that a daemon that is always busy
learns too. Deferral is waiting beyond that quarter: it grows while work waits, also between
requests that are too close together to work in, and every second of work pays three of it back.
Time in which the machine gives a reason to wait is no deferral.
"""

import threading
import time
from collections.abc import Callable

from specl.shared.errors import Interrupted

DEFER_S = 600.0
TRAINER_SHARE = 0.25  # of the time, for the trainer, once it has been deferred for DEFER_S
SILENCE_S = 10.0  # inference reports every two seconds; after this long without a report it counts as gone
POLL_S = 0.1
POWER_POLL_S = 1.0  # on battery every awakening costs; a stop waits 1.5 s
MAX_PIECE_S = 30.0  # gaps longer than this are idle time, not work, and are not charged


class Abandoned(Interrupted):
    """The run under way must end, and leave nothing to go on with."""


class Superseded(Interrupted):
    """The adapter that the run started from is no longer active: its outcome would be refused."""


class Throttle:
    """`wait_for_turn` is called between two pieces of work. Time is an argument, so that tests need
    not wait.
    """

    def __init__(
        self,
        idle_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        reason_to_wait: Callable[[], str] = lambda: "",
    ) -> None:
        self._idle_s, self._clock, self._sleep, self._reason_to_wait = idle_s, clock, sleep, reason_to_wait
        self._busy = False
        self._heard_at = self._quiet_since = clock()
        self._worked_until = clock()
        self._deferred_s = 0.0
        self._stop = threading.Event()
        self._abandon = threading.Event()

    def set_busy(self, busy: bool) -> None:
        """Inference has said whether it is busy."""
        self._heard_at = self._clock()
        if self._busy and not busy:
            self._quiet_since = self._heard_at
        self._busy = busy

    def stop(self) -> None:
        """The next `wait_for_turn` raises Interrupted."""
        self._stop.set()

    def abandon(self) -> None:
        """The next `wait_for_turn` raises Abandoned."""
        self._abandon.set()

    def clear_abandon(self) -> None:
        """The run has ended, one way or another: the next one may work."""
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
        """Wait until work may go on; seconds waited. Raises Interrupted when told to stop,
        Abandoned when the run must end.
        """
        start = self._clock()
        worked = min(start - self._worked_until, MAX_PIECE_S)
        deferred = max(0.0, self._deferred_s - worked * (1 - TRAINER_SHARE) / TRAINER_SHARE)
        held_up = 0.0  # by the machine
        while True:
            if self._stop.is_set():
                raise Interrupted("the trainer is stopping")
            if self._abandon.is_set():
                raise Abandoned("what it learned from is purged")
            now = self._clock()
            if self._reason_to_wait():
                self._sleep(POWER_POLL_S)
                held_up += self._clock() - now
                continue
            waited = now - start - held_up
            if self.quiet or deferred + waited >= DEFER_S:
                self._worked_until = now
                self._deferred_s = min(deferred + waited, DEFER_S)
                return waited + held_up
            self._sleep(POLL_S)
