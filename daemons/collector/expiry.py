"""Removes what is older, or more, than the settings keep: generations with their hidden states,
copies of the store, and the chat's history where it may not be kept. A little at a time, because
producers wait meanwhile.
"""

import time
from collections.abc import Callable
from pathlib import Path

from specl.daemons.collector.trusted_clock import TrustedClock
from specl.shared.errors import StoreError
from specl.shared.retention.chat_history import history_is_kept
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.runtime import log
from specl.shared.runtime.atomic_files import erase_file
from specl.shared.settings.schema import Records
from specl.shared.store import Store

INTERVAL_S = 300.0
MAX_ROWS = 500  # removed at once: some tens of milliseconds
_log = log.get("collector")


class Expiry:
    """`due_at` says when to call `run` next, in seconds of `time.monotonic`. `history` is the file
    of the chat's history.
    """

    def __init__(self, records: Records, spool: HiddenSpool, history: Path) -> None:
        self._records, self._spool, self._history = records, spool, history
        self._clock = TrustedClock(records.retention_days)
        self._wal_needs_truncation = False  # a purge failed after deleting rows: their bytes are still in the log
        self.due_at = 0.0

    def run(self, store: Callable[[], Store], now: float) -> bool:
        """Remove a portion; whether the store has changed. Where the disk or a reader refuses it is
        tried again later.
        """
        self.due_at = now + INTERVAL_S
        try:
            if not history_is_kept(self._records):
                erase_file(self._history)
            return self._remove(store(), self._today(store(), now), now)
        except (StoreError, OSError) as error:
            _log.warning("retention.postponed", reason=str(error))
            return False

    def _today(self, store: Store, now: float) -> float:
        if not self._records.retention_days:
            return time.time()
        if not self._clock.started:
            self._clock.start(store.last_known_time(), now)
        return self._clock.now(time.time(), now)

    def _remove(self, store: Store, today: float, now: float) -> bool:
        records = self._records
        store.drop_backups(records.retention_days, today)
        expired = store.expired(records.retention_days, records.max_generations, records.max_store_mb, today)
        if not expired and not self._wal_needs_truncation:
            return False
        portion = expired[:MAX_ROWS]
        # hidden states first: a row that stays is found again, an id that is gone is not
        self._spool.purge(portion)
        self._wal_needs_truncation = True
        store.purge(portion)
        self._wal_needs_truncation = False
        if len(portion) < len(expired):
            self.due_at = now
        _log.info("retention.removed", generations=len(portion), left=len(expired) - len(portion))
        return True
