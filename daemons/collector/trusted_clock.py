"""The time by which records expire: the system's clock, unless that has just jumped ahead.

A clock that is ahead for a moment (before the network has set it, after a dead battery) would make
everything older than `records.retention_days`, and what is removed is gone for good. Knows times
only, nothing of records.
"""

from specl.shared.runtime import log

DAY_S = 86400.0
TOLERANCE_S = DAY_S  # a jump that is smaller is believed at once
LASTING_S = 3600.0  # a jump that has lasted so long is believed
_log = log.get("collector")


class TrustedClock:
    """`now` takes both clocks as arguments: `wall` in seconds since 1970, `monotonic` since any
    moment. `days` is the shortest age that matters: what a tenth of it cannot change is believed.
    """

    def __init__(self, days: float) -> None:
        self._tolerance = min(TOLERANCE_S, days * DAY_S / 10)
        self._lasting = min(LASTING_S, days * DAY_S / 10)
        self._believed: float | None = None
        self._at = 0.0  # when that was, in monotonic seconds
        self._ahead_since: float | None = None

    @property
    def started(self) -> bool:
        """Whether any time is known."""
        return self._believed is not None

    def start(self, known: float, monotonic: float) -> None:
        """Begin with a time that has certainly come: that of the newest record, say."""
        self._believed, self._at = known, monotonic

    def now(self, wall: float, monotonic: float) -> float:
        """`wall`, or where that has jumped ahead, the time as it went on from before."""
        if self._believed is None:
            self.start(wall, monotonic)
            return wall
        expected = self._believed + monotonic - self._at
        if wall <= expected + self._tolerance:
            self._ahead_since = None
        elif self._ahead_since is None:
            self._ahead_since = monotonic
            _log.warning("clock.jumped", days=round((wall - expected) / DAY_S, 1), believed_in_s=self._lasting)
        if self._ahead_since is not None and monotonic - self._ahead_since < self._lasting:
            return expected
        self._believed, self._at, self._ahead_since = wall, monotonic, None
        return wall
