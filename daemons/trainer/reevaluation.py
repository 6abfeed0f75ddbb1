"""The second decision about a promoted adapter: it and its predecessor, compared on the same
answers since its promotion.

Neither has learned from those answers. An active adapter that does worse is rolled back; one that
the collapse check has rolled back and that does better is reinstated. Each adapter is reevaluated
once. Acceptance on live traffic cannot decide this: it compares answers of now with answers of before, and work that
gets harder just after a promotion would be blamed on the adapter.
"""

import time
from collections.abc import Callable
from contextlib import suppress

from specl.daemons.trainer.jobs import Outcome, ReevaluateJob
from specl.daemons.trainer.run_context import RunContext
from specl.daemons.trainer.scoring import Scorer, Scores, load_active_adapter
from specl.shared.adapters.manifest import Manifest
from specl.shared.adapters.marks import MARKS, UNDECIDED, MarkState
from specl.shared.adapters.registry import Adapters
from specl.shared.adapters.tensors import load_adapter
from specl.shared.engine.core import LoadedAdapter
from specl.shared.errors import AdapterRejected, disk_failed
from specl.shared.learning.judge import reevaluate
from specl.shared.messaging.codes import RunTrigger, RunVerdict
from specl.shared.store import Store

MIN_ANSWERS = 8  # with fewer, more are waited for
MAX_ANSWERS = 40
WAIT_S = 600.0  # after a rollback, runs are put off this long to wait for answers


def predecessor_of(manifest: Manifest) -> str:
    """The adapter that it took the place of; empty for none."""
    return str(manifest.training.get("predecessor", manifest.parent_id))


def due(adapters: Adapters) -> Manifest | None:
    """The newest adapter that was not reevaluated yet, and that is active or was rolled back to
    its predecessor, which is active.
    """
    current, marks = adapters.current(), adapters.marks.all()
    for id in reversed(adapters.ids()):
        mark = marks.get(id)
        is_undecided = id == current if mark is None else mark.state in UNDECIDED
        if not is_undecided:
            continue
        with suppress(AdapterRejected):
            manifest = adapters.manifest(id)
            if mark is None or predecessor_of(manifest) == current:
                return manifest
    return None


def answers_ready(manifest: Manifest, store: Store) -> bool:
    """Whether enough was answered since it was published."""
    rows = [
        row
        for row in store.generation_summaries(MAX_ANSWERS)
        if row.created_at > manifest.created_at and row.output_count > 1
    ]
    return sum(row.target_fingerprint == manifest.target_fingerprint for row in rows) >= MIN_ANSWERS


def rollback_is_recent(adapters: Adapters, manifest: Manifest, clock: Callable[[], float] = time.time) -> bool:
    """Whether the adapter was rolled back so recently that a run should wait: the reevaluation may
    reinstate it.
    """
    with suppress(OSError):
        marked = manifest.id in adapters.marks.all()
        return marked and 0 <= clock() - (adapters.folder / MARKS).stat().st_mtime < WAIT_S
    return False


class Reevaluation:
    """One reevaluation. `run` raises Interrupted when told to stop, OSError where the disk refuses:
    then nothing is decided yet.
    """

    def __init__(self, context: RunContext, job: ReevaluateJob) -> None:
        self.context, self.adapters, self.id = context, context.adapters, job.adapter_id
        self.report = context.report(RunTrigger.REEVALUATION, f"re-evaluation of {self.id}")
        self.was_rolled_back = self.id in self.adapters.marks.all()

    def run(self) -> Outcome:
        """Compare, decide and move CURRENT."""
        self.context.progress.state = "re-evaluating"
        manifest = self.adapters.manifest(self.id)
        self.report.parent_id = other = predecessor_of(manifest)
        try:
            adapter = self._load(self.id)
        except AdapterRejected as error:
            if not self.was_rolled_back:  # inference refuses it, and says why
                return self.report.end(RunVerdict.NO_VERDICT, str(error))
            return self._unusable(error, RunVerdict.CONFIRMED, other)
        try:
            predecessor = self._predecessor(other)
        except AdapterRejected as error:
            return self._unusable(error, RunVerdict.KEPT, other)
        answers = self.context.data_loader.since(manifest.created_at, MAX_ANSWERS, manifest.generations)
        scorer = Scorer(self.context.engine, answers, [], self.context.pause)
        before, after = scorer.with_adapter(predecessor), scorer.with_adapter(adapter)
        verdict = reevaluate(before.held_out, after.held_out, MIN_ANSWERS, self.was_rolled_back)
        self.context.pause()
        if verdict.verdict == RunVerdict.NO_VERDICT:
            return self.report.end(verdict.verdict, verdict.reason)
        if self.adapters.current() != (other if self.was_rolled_back else self.id):
            return self.report.end(RunVerdict.NO_VERDICT, "another adapter is active by now")
        self.report.add_scores(self.id, Scores(before.held_out), Scores(after.held_out), verdict)
        return self._decide(verdict.verdict, verdict.reason, other)

    def _load(self, id: str) -> LoadedAdapter:
        return load_adapter(self.adapters, self.adapters.folder / id, self.context.engine)[0]

    def _predecessor(self, id: str) -> LoadedAdapter | None:
        """The predecessor, None for none. Where it is the active adapter and its files cannot be used,
        inference drafts without an adapter, and None it is.
        """
        if self.was_rolled_back:
            return load_active_adapter(self.adapters, self.context.engine)
        return self._load(id) if id else None

    def _unusable(self, error: AdapterRejected, verdict: RunVerdict, predecessor: str) -> Outcome:
        """One of the two cannot be loaded: the other one wins. No verdict where the disk failed, or
        where another draft is configured at present.
        """
        has_other_draft = False
        with suppress(AdapterRejected):
            has_other_draft = self.adapters.manifest(self.id).base_fingerprint != self.context.engine.draft_fingerprint
        if has_other_draft or disk_failed(error):
            return self.report.end(RunVerdict.NO_VERDICT, str(error))
        return self._decide(verdict, str(error), predecessor)

    def _decide(self, verdict: RunVerdict, reason: str, predecessor: str) -> Outcome:
        """Mark the adapter, and let CURRENT name the winner."""
        marks, winner = self.adapters.marks, ""
        match verdict:
            case RunVerdict.KEPT:
                marks.set(self.id, MarkState.KEPT, reason)
            case RunVerdict.CONFIRMED:
                marks.set(self.id, MarkState.ROLLED_BACK_FINAL, reason)
            case RunVerdict.ROLLED_BACK:
                # killed in between: inference goes back from an adapter that is marked
                marks.set(self.id, MarkState.ROLLED_BACK_FINAL, reason)
                self.adapters.set_current(predecessor)
                winner = predecessor
            case RunVerdict.REINSTATED:
                # the mark first, as inference goes back from a marked one; killed in between, the
                # adapter is due again
                marks.set(self.id, MarkState.REINSTATING, reason)
                self.adapters.set_current(self.id)
                marks.set(self.id, MarkState.REINSTATED, reason)
                winner = self.id
        announce = self.adapters.folder / winner if winner else None
        return self.report.end(verdict, f"{self.id}: {reason}", announce=announce)
