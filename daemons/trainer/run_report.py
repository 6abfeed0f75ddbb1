"""What one run leaves in the store: scores of the draft states that it compared, and the run itself
with its verdict.
"""

import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specl.daemons.trainer.jobs import Outcome
from specl.daemons.trainer.records import adapter_record, evaluations
from specl.daemons.trainer.scoring import Scores
from specl.shared.adapters.registry import Adapters
from specl.shared.learning.judge import Verdict
from specl.shared.messaging.codes import RunTrigger, RunVerdict
from specl.shared.messaging.messages import Record, TrainingRun
from specl.shared.settings.schema import Training


@dataclass(frozen=True, slots=True)
class TrainedOn:
    """Counts of the texts that a run learned from. `replay`: texts that came with the draft. Each
    loss is that of one step.
    """

    failures: int = 0
    successes: int = 0
    replay: int = 0
    tokens: int = 0
    losses: tuple[float, ...] = ()
    last_generation: str = ""  # the newest that was looked at

    @property
    def first_and_last_loss(self) -> tuple[float | None, float | None]:
        """The first step's loss and the mean of the last ten."""
        if not self.losses:
            return None, None
        last = self.losses[-10:]
        return self.losses[0], round(sum(last) / len(last), 4)

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of texts by kind."""
        return {"failures": self.failures, "successes": self.successes, "replay": self.replay}

    @property
    def steps(self) -> dict[str, Any]:
        """The numbers of steps and tokens, and the losses."""
        first, last = self.first_and_last_loss
        return {"steps": len(self.losses), "tokens": self.tokens, "loss_first": first, "loss_last": last}


@dataclass(slots=True)
class RunReport:
    """Collects the records of one run. `cause` is the trigger in words; `parent_id` is the adapter
    that it is compared with.
    """

    trigger: RunTrigger
    cause: str
    settings: Training
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    parent_id: str = ""
    trained_on: TrainedOn = TrainedOn()
    created_at: float = field(default_factory=time.time)
    records: list[Record] = field(default_factory=list)

    def add_scores(self, adapter_id: str, before: Scores, after: Scores, verdict: Verdict) -> None:
        """The scores of both draft states; those of `adapter_id` carry the verdict's numbers."""
        self.records += evaluations(self.run_id, self.parent_id, before.held_out, before.general, {})
        self.records += evaluations(self.run_id, adapter_id, after.held_out, after.general, verdict.numbers())

    def promoted(self, adapters: Adapters, id: str, reason: str) -> Outcome:
        """End the run with a published adapter."""
        self.records.append(adapter_record(adapters, adapters.manifest(id)))
        return self.end(RunVerdict.PROMOTED, reason, id, adapters.folder / id)

    def end(self, verdict: RunVerdict, reason: str, adapter_id: str = "", announce: Path | None = None) -> Outcome:
        """End the run. `announce`: the adapter that CURRENT has moved to."""
        data = self.trained_on
        consumed = verdict in (RunVerdict.PROMOTED, RunVerdict.REJECTED)
        run = TrainingRun(
            id=self.run_id,
            created_at=self.created_at,
            finished_at=time.time(),
            trigger=self.trigger,
            cause=self.cause,
            verdict=verdict,
            reason=reason,
            parent_id=self.parent_id,
            adapter_id=adapter_id,
            examples=data.failures + data.successes,
            **data.steps,
            last_generation=data.last_generation if consumed else "",
            settings=self.settings.model_dump(mode="json") | {"data": data.counts},
        )
        return Outcome(verdict, reason, adapter_id, announce, (*self.records, run))
