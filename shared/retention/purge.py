"""A purge: finds the generations that a request means and removes them, and what derives from them,
from every file of a run directory.

Each daemon removes what is its own; where one is down, this process does it under that daemon's
lock. SQLite overwrites what is deleted (`secure_delete`) and its write-ahead logs are cut to
nothing. An adapter learned from text but does not hold it: those are named, and dropped on request.
The models folder is not touched: nothing of a user's is in it.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from specl.shared.adapters.registry import Adapters
from specl.shared.errors import DaemonUnreachable, SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.messaging.messages import Envelope, Purge, Reply
from specl.shared.messaging.outbox import Outbox
from specl.shared.paths import PRODUCERS, Paths
from specl.shared.retention import checkpoints
from specl.shared.retention.answer_files import AnswerFiles
from specl.shared.retention.chat_history import empty_history, erase_history, history_file
from specl.shared.retention.delegate import through_daemon
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.retention.purge_journal import PurgeJournal, PurgeRequest
from specl.shared.retention.purge_matching import purge_matches, texts_in
from specl.shared.retention.purged_text import PurgedText, erase_from_logs
from specl.shared.runtime.atomic_files import erase_file
from specl.shared.store import PURGE_MOST, Store

COMMAND = "specl-ctl store purge"
MOST_ROUNDS = 50  # records may be on their way from an outbox to the store
TRAINER_TIMEOUT_S = 60.0  # a trainer that loads its models notices a purge only then


@dataclass(slots=True)
class PurgeOutcome:
    """What a purge did: rows of the store, ids in all, adapters that learned from them, those
    dropped and which one is active instead.
    """

    stored: int = 0
    forgotten: int = 0
    adapters: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    active: str | None = None
    retraining: bool | None = None
    ids: list[str] = field(default_factory=list)


@contextmanager
def stores(paths: Paths) -> Iterator[tuple[Store | None, list[Outbox]]]:
    """The store (to read) and the outboxes, as far as they exist."""
    store = Store(paths.store, read_only=True) if paths.store.exists() else None
    outboxes = [Outbox(paths.outbox(name)) for name in PRODUCERS if paths.outbox(name).exists()]
    try:
        yield store, outboxes
    finally:
        if store is not None:
            store.close()
        for outbox in outboxes:
            outbox.close()


def full_ids(paths: Paths, prefixes: Iterable[str], forgotten: Iterable[str] = ()) -> list[str]:
    """The ids that begin with `prefixes`, in the store or an outbox; a prefix that is a whole id
    means that one.

    A prefix of an id that was just `forgotten` has none any more. Raises SpecLoraError for any
    other that has none or several.
    """
    ids: list[str] = []
    with stores(paths) as (store, outboxes):
        undelivered = [id for outbox in outboxes for id in outbox.matching(lambda row: True)]
        for prefix in prefixes:
            matches = {id for id in undelivered if id.startswith(prefix)}
            matches.update(store.beginning(prefix) if store is not None else ())
            if prefix in matches:
                matches = {prefix}
            if not matches and any(id.startswith(prefix) for id in forgotten):
                continue
            if len(matches) != 1:
                raise SpecLoraError(f"no single generation begins with {prefix!r}")
            ids += matches
    return ids


class Purger:
    """One purge of one run directory. `report` is called with a line for each thing worth saying."""

    def __init__(self, client: Client, report: Callable[[str], None]) -> None:
        self.client, self.paths, self._report = client, client.paths, report
        self._journal = PurgeJournal(self.paths.pending_purge)
        self._ids: set[str] = set()
        self._outcome = PurgeOutcome()

    def run(self, request: PurgeRequest) -> PurgeOutcome:
        """Purge what `request` means. Raises SpecLoraError while anything is left; `resume` then
        goes on.
        """
        self._journal.begin(request)
        return self._finish(request)

    def resume(self) -> PurgeOutcome | None:
        """Finish a purge that was stopped half-way; None where there was none.

        What was stored since the request is newer than it, and not part of "everything" as it was
        meant.
        """
        request = self._journal.request()
        if request is None:
            self._journal.end()
            return None
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(request.begun))
        self._report(f"finishing the purge of {begun}, which was stopped half-way")
        self._ids = set(self._journal.noted())
        # an earlier version noted texts and erased them last
        self._erase_texts(self._journal.noted("texts"), self._journal.noted("typed"), request.pattern)
        before = None if request.before is None else min(request.before, request.begun)
        return self._finish(replace(request, before=before))

    def _finish(self, request: PurgeRequest) -> PurgeOutcome:
        self._outcome.stored = self._remove_records(request)
        self._outcome.forgotten, self._outcome.ids = len(self._ids), sorted(self._ids)
        self._report(
            f"{self._outcome.stored} generations removed from the store, {self._outcome.forgotten} forgotten in all"
        )
        self._wait_for_trainer()
        self._remove_backups()
        self._handle_adapters(request)
        if request.everything:
            empty_history(history_file(self.paths))
        self._journal.end()
        self._report(f"what they held is erased under {self.paths.root}")
        return self._outcome

    # ------------------------------------------------------------------------------------------------ records
    def _remove_records(self, request: PurgeRequest) -> int:
        """Every record, a portion at a time, with what hangs on its id. How many the store had."""
        stored = self._remove_ids(sorted(self._ids))  # noted before the purge was stopped
        self._ids.update(request.ids)
        rounds = 0
        while rounds < MOST_ROUNDS:
            portion = self._next_portion(request)
            for role in PRODUCERS:  # outboxes first: what they hold may be on its way to the store
                reply = self._purge(role, Purge(request.ids, request.before, request.pattern))
                undelivered = set(reply.ids)
                self._ids |= undelivered
                portion |= undelivered - set(request.ids)
            stored += self._remove_ids(sorted(portion))
            if not portion:
                break
            rounds += len(portion) < PURGE_MOST
        return stored

    def _next_portion(self, request: PurgeRequest) -> set[str]:
        """Find the next ids and note them, then remove their texts from logs and history while they
        can still be read.
        """
        purge = Purge(request.ids, request.before, request.pattern)
        texts: set[str] = {request.pattern}
        typed: set[str] = set()

        def collect(row: Envelope) -> bool:
            if not purge_matches(purge, row):
                return False
            row_texts, row_typed = texts_in(row)
            texts.update(row_texts)
            typed.update(row_typed)
            return True

        with stores(self.paths) as (store, outboxes):
            ids = set(store.matching(purge.ids, purge.before, purge.pattern)) if store is not None else set()
            if store is not None:
                stored_texts, stored_typed = store.texts(sorted(ids))
                texts.update(stored_texts)
                typed.update(stored_typed)
            for outbox in outboxes:
                ids |= set(outbox.matching(collect))
        if ids:
            self._journal.note(ids)
            self._ids |= ids
        if ids or request.pattern:
            self._erase_texts(texts, typed, request.pattern)
        return ids

    def _erase_texts(self, texts: Iterable[str], typed: Iterable[str], pattern: str) -> None:
        history, purged = history_file(self.paths), PurgedText(texts)
        erase_from_logs((path for path in sorted(self.paths.logs.glob("*")) if path != history), purged)
        erase_history(history, typed, purged, pattern)

    def _remove_ids(self, ids: list[str]) -> int:
        """Remove these from the store, then their hidden states, checkpoints and evaluations. How
        many the store had.

        There is always at least one request to the store: it cuts the write-ahead log.
        """
        stored = 0
        for start in range(0, max(1, len(ids)), PURGE_MOST):
            portion = Purge(ids[start : start + PURGE_MOST], None, "")
            stored += len(self._purge("collector", portion).ids)
            for role in PRODUCERS if portion.ids else ():
                self._purge(role, portion)
        return stored

    def _purge(self, role: str, purge: Purge) -> Reply:
        """Have a daemon forget, or forget in its place. Raises SpecLoraError where it could not."""
        locally = self._purge_store if role == "collector" else lambda purge: self._purge_producer(role, purge)
        reply = through_daemon(self.client, role, purge, lambda: locally(purge), COMMAND)
        if not reply.ok:
            raise SpecLoraError(f"{role}: {reply.message}")
        return reply

    def _purge_store(self, purge: Purge) -> Reply:
        if not self.paths.store.exists():
            return Reply(True, "there is no store")
        store = Store(self.paths.store)
        try:
            ids = store.matching(purge.ids, purge.before, purge.pattern)
            store.purge(ids)
        finally:
            store.close()
        return Reply(True, "", ids=ids)

    def _purge_producer(self, role: str, purge: Purge) -> Reply:
        ids: list[str] = []
        if self.paths.outbox(role).exists():
            outbox = Outbox(self.paths.outbox(role))
            try:
                ids = outbox.matching(lambda row: purge_matches(purge, row))
                outbox.purge(ids)
            finally:
                outbox.close()
        forgotten = [*purge.ids, *ids]
        if role == "inference":
            HiddenSpool(self.paths.hidden, 0).purge(forgotten)
            AnswerFiles(self.paths.answers).purge()
        elif forgotten:
            checkpoints.forget(checkpoints.checkpoint_folder(self.paths.training))
        return Reply(True, "", ids=ids)

    # ------------------------------------------------------------------------------------- what derives from them
    def _wait_for_trainer(self) -> None:
        """Wait until no training run holds them: one that is told to end does so between two steps,
        and may write till then.
        """
        checkpoint = checkpoints.checkpoint_folder(self.paths.training)
        end = time.monotonic() + TRAINER_TIMEOUT_S
        while self._is_run_ending() or self._ids & checkpoints.generations_in(checkpoint):
            if time.monotonic() > end:
                raise SpecLoraError("the trainer did not end its run in time", "or stop the trainer")
            time.sleep(0.1)

    def _is_run_ending(self) -> bool:
        trainer = self.client.status().trainer
        return trainer is not None and trainer.training.abandoning

    def _remove_backups(self) -> None:
        """Remove the copies of the store from before an upgrade, one that was cut short included:
        any may hold the text.
        """
        for path in sorted([*self.paths.root.glob("store.db.backup-*"), *self.paths.root.glob(".store.db.backup-*")]):
            erase_file(path)
            self._report(f"{path.name} is removed: a copy of the store from before an upgrade may hold the text")

    def _handle_adapters(self, request: PurgeRequest) -> None:
        """Name the adapters that learned from the purged text; drop them and train anew where that
        was asked for.
        """
        adapters = Adapters(self.paths.adapters)
        learned = adapters.trained_on(sorted(self._ids))
        self._outcome.adapters = learned
        if not learned:
            return
        if not request.drop_adapters:
            options = "--drop-adapters removes them, --retrain replaces them"
            self._report(f"adapters that learned from them: {', '.join(learned)} ({options})")
            return
        if adapters.current() in learned:
            active = self._fall_back(adapters, learned)
            self._outcome.active = active
            self._report(f"drafting with adapter {active}" if active else "drafting without an adapter")
        adapters.drop(learned)
        self._outcome.dropped = learned
        self._report(f"adapters removed: {', '.join(learned)}")
        if request.retrain:
            self._report(self._train(adapters.current()))

    def _fall_back(self, adapters: Adapters, learned: list[str]) -> str:
        """Draft with the newest adapter that never saw the text and was not rolled back, or with
        none (""). Which.
        """
        excluded = {*learned, *adapters.rolled_back()}
        for id in [*(id for id in reversed(adapters.ids()) if id not in excluded), ""]:
            try:
                reply = self.client.set_adapter(id)
            except DaemonUnreachable:  # the daemon reads CURRENT when it starts
                adapters.set_current(id)
                return id
            if reply.ok:
                return id
        raise SpecLoraError(f"inference keeps its adapter: {reply.message}")

    def _train(self, parent: str) -> str:
        """Ask for a training run on what is left, from the active adapter; what became of
        it.
        """
        try:
            reply = self.client.train(now=True)
        except DaemonUnreachable:
            return "the trainer does not run; start it, then `specl-ctl train --now`"
        self._outcome.retraining = reply.ok
        if not reply.ok:
            return f"not trained anew: {reply.message}; then `specl-ctl train --now`"
        start = f"adapter {parent}" if parent else "the draft as it was shipped"
        return f"training on what is left, from {start}: {reply.message}"
