"""Removes what is older, or more, than the settings keep: generations with their hidden states,
and copies of the store. A little at a time, because producers wait meanwhile.
"""

import time
from collections.abc import Callable

from specl.shared.errors import StoreError
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.runtime import log
from specl.shared.settings.schema import Records
from specl.shared.store import Store

INTERVAL_S = 300.0
MAX_ROWS = 500  # removed at once: some tens of milliseconds
_log = log.get("collector")


class Expiry:
    """`due_at` says when to call `run` next, in seconds of `time.monotonic`."""

    def __init__(self, records: Records, spool: HiddenSpool) -> None:
        self._records, self._spool = records, spool
        self._wal_needs_truncation = False  # a purge failed after deleting rows: their bytes are still in the log
        self.due_at = 0.0

    def run(self, store: Callable[[], Store], now: float) -> bool:
        """Remove a portion; whether the store has changed. Where the disk or a reader refuses it is
        tried again later.
        """
        self.due_at = now + INTERVAL_S
        try:
            return self._remove(store(), time.time(), now)
        except (StoreError, OSError) as error:
            _log.warning("retention.postponed", reason=str(error))
            return False

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
