"""Caches the store's figures for `status`, and decides when to make them again.

On a full store they take long, and the daemon's one thread also commits records: it must not spend
its time on figures. Knows how long they took, nothing of what they are.
"""

import time
from collections.abc import Callable

from specl.shared.errors import StoreError
from specl.shared.messaging.daemon_status import StoreSummary

MAX_AGE_S = 1.0  # age from which cheap figures are made again
TIME_SHARE = 30  # figures that are not cheap take at most a thirtieth of the daemon's time
CHEAP_S = 0.15  # seconds up to which figures are cheap: they are made for each request of `status`


class SummaryCache:
    """The last `summary` that `make` gave. `error`: why there is no newer one, else empty."""

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
        self._due_at = start + MAX_AGE_S  # applies if the next line fails
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
        """Make the figures now if they are cheap, and stale or old."""
        if self._took_s < CHEAP_S and (self._is_stale or self._clock() - self._made_at > MAX_AGE_S):
            self.refresh()
