"""The store's figures for `status`: made again when they are out of date, but no more often than
they are worth.

On a full store they take long, and the daemon's one thread also commits records. Knows how long
they took, not what they are.
"""

import time
from collections.abc import Callable

from specl.shared.errors import StoreError
from specl.shared.messaging.daemon_status import StoreSummary

MAX_AGE_S = 1.0  # of figures that are cheap
TIME_SHARE = 30  # figures that are not cheap take at most one part in so many of the daemon's time
CHEAP_S = 0.15  # figures that take no longer are made for each request of `status`


class SummaryCache:
    """The last `summary` that `make` gave, and why there is no newer one (`error`, empty if there
    is).
    """

    def __init__(self, make: Callable[[], StoreSummary], clock: Callable[[], float] = time.monotonic) -> None:
        self._make, self._clock = make, clock
        self.summary: StoreSummary | None = None
        self.error = ""
        self._is_stale = True
        self._made_at = self._took_s = 0.0
        self._due_at = 0.0

    def invalidate(self) -> None:
        """Say that the store has changed."""
        self._is_stale = True

    @property
    def due_at(self) -> float | None:
        """When to make stale figures again between commits; None while they are not stale."""
        return self._due_at if self._is_stale else None

    def make(self) -> None:
        """Make the figures now. Raises StoreError."""
        start = self._clock()
        self._due_at = start + MAX_AGE_S  # where it fails
        self.summary = self._make()
        self._made_at = self._clock()
        self._took_s = self._made_at - start
        self._due_at = self._made_at + TIME_SHARE * self._took_s
        self._is_stale, self.error = False, ""

    def refresh(self) -> None:
        """Make the figures now; where the store refuses, keep the old ones and say why in `error`."""
        try:
            self.make()
        except StoreError as error:
            self.error = str(error)

    def refresh_if_cheap(self) -> None:
        """Make the figures for somebody who waits, if that is quick and they are stale or old."""
        if self._took_s < CHEAP_S and (self._is_stale or self._clock() - self._made_at > MAX_AGE_S):
            self.refresh()
