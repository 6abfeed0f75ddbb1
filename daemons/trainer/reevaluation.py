"""A second look at an adapter that the watch has rolled back: it and what drafts in its place, on the same answers.

The watch compares what is drafted now with what another adapter did before. Where the kind of work has changed meanwhile, that blames
the adapter for harder work. So both are scored on the answers since it was published, which neither has learned from, those of
the watch among them. It comes back if the gate's interval of the difference lies above zero. One look an adapter, whatever it says.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from specl.daemons.trainer.training_run import DEPTHS, Outcome, Scores, TrainingJob
from specl.shared.adapters.registry import ROLLED_BACK, Adapters, Manifest
from specl.shared.adapters.tensors import load_adapter
from specl.shared.engine.core import LoadedAdapter
from specl.shared.errors import AdapterRejected, disk_failed
from specl.shared.learning.examples import Example
from specl.shared.learning.gate import Agreement, judge
from specl.shared.learning.learner import Learner, agreement
from specl.shared.messaging.codes import RunTrigger
from specl.shared.store import Store

LEAST = 8  # answers; with fewer, more are waited for
MOST = 40
PATIENCE_S = 600.0  # so long runs are put off for answers to look at
NOTHING = Agreement(np.zeros(0), np.zeros(0))


@dataclass(frozen=True, slots=True)
class Reevaluation:
    """What the trainer's thread is given to do."""

    adapter: str

    @property
    def cause(self) -> str:
        """The run's trigger in words."""
        return f"second look at {self.adapter}"


def due(adapters: Adapters) -> Manifest | None:
    """The newest adapter that was rolled back to its parent and not looked at again since."""
    current = adapters.current()
    for id in adapters.doubted():
        with suppress(AdapterRejected):
            if (manifest := adapters.manifest(id)).parent_id == current:
                return manifest
    return None


def ready(manifest: Manifest, store: Store) -> bool:
    """Whether enough was answered since it was published."""
    rows = [row for row in store.outlines(MOST) if row.created_at > manifest.created_at and row.output_count > 1]
    return sum(row.target_fingerprint == manifest.target_fingerprint for row in rows) >= LEAST


def worth_waiting(adapters: Adapters, clock: Callable[[], float] = time.time) -> bool:
    """Whether the rollback was so lately that a run had better wait: it might go on from the wrong adapter."""
    with suppress(OSError):
        return 0 <= clock() - (adapters.folder / ROLLED_BACK).stat().st_mtime < PATIENCE_S
    return False


class ReevaluationJob(TrainingJob):
    """One second look, in the trainer's place and with its gate's interval."""

    def __init__(self, look: Reevaluation, *job: Any) -> None:
        super().__init__(*job, RunTrigger.REEVALUATION, look.cause)
        self.look = look
        # the checkpoint of a run that waits to go on is not this one's to drop
        self.folder = self.folder / "second-look"

    def run(self) -> Outcome:
        """Decide. Raises Interrupted when told to stop, OSError where the disk refuses: then nothing is decided yet."""
        self.live.state = "looking again"
        parent = self._parent()
        try:
            manifest = self.adapters.manifest(self.look.adapter)
            adapter, _ = load_adapter(self.adapters, self.adapters.folder / manifest.id, self.engine)
        except AdapterRejected as error:
            return self._outcome("no_verdict", str(error)) if self._may_pass(error) else self._confirm(str(error))
        texts = self.data_loader.since(manifest.created_at, MOST, manifest.generations)
        before, after = (self._agreement_with(side, texts) for side in (parent, adapter))
        verdict = judge(before, after, LEAST)
        self._pause()
        if verdict.verdict == "no_verdict":
            return self._outcome("no_verdict", verdict.reason)
        if self.adapters.current() != manifest.parent_id:
            return self._outcome("no_verdict", "it is no longer what it replaced that is in force")
        self._keep_scores(manifest.id, Scores(before, NOTHING), Scores(after, NOTHING), verdict)
        return self._reinstate(verdict.reason) if verdict.verdict == "promoted" else self._confirm(verdict.reason)

    def _may_pass(self, error: AdapterRejected) -> bool:
        """Whether it may load another time: the disk failed for a moment, or the draft is another one for the time being."""
        with suppress(AdapterRejected):
            return (
                disk_failed(error)
                or self.adapters.manifest(self.look.adapter).base_fingerprint != self.engine.draft_fingerprint
            )
        return disk_failed(error)

    def _agreement_with(self, adapter: LoadedAdapter | None, texts: Sequence[Example]) -> Agreement:
        """The draft's score with an adapter, as drafting would compute."""
        self.engine.use_adapter(adapter)
        return agreement(Learner(self.engine.draft), texts, DEPTHS, pause=self._pause)

    def _confirm(self, reason: str) -> Outcome:
        self.adapters.confirm_rollback(self.look.adapter)
        return self._outcome("confirmed", f"the rollback of {self.look.adapter}: {reason}")

    def _reinstate(self, reason: str) -> Outcome:
        id = self.look.adapter
        self.adapters.reinstate(id)
        outcome = self._outcome("reinstated", f"{id}, which the watch had rolled back: {reason}")
        outcome.adapter_id, outcome.path = id, self.adapters.folder / id
        return outcome
