"""An adapter made elsewhere before the same gate as a trained one: read, score against what is in force, promote or refuse.

A trial trains nothing and uses up no failures. Its verdict is a `TrainingRun` record like any other.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from specl.daemons.trainer.records import adapter_record
from specl.daemons.trainer.training_run import Outcome, Scores, TrainingJob
from specl.shared.adapters.external import ExternalAdapter, read_external
from specl.shared.adapters.registry import Manifest
from specl.shared.adapters.tensors import write_tensors
from specl.shared.errors import AdapterRejected
from specl.shared.learning.gate import Lineage, Verdict, lineage_problems
from specl.shared.learning.learner import Learner
from specl.shared.messaging.codes import RunTrigger
from specl.shared.models.lora import change_norm_steps
from specl.shared.runtime.incremental import run_all


@dataclass(frozen=True, slots=True)
class AdapterEvaluation:
    """A staged adapter that somebody wants tried. `name` is the user's word for it."""

    run_id: str
    folder: str
    name: str

    @property
    def cause(self) -> str:
        """The run's trigger in words."""
        return f"import {self.name}"


class AdapterEvaluationJob(TrainingJob):
    """One trial, in the trainer's place and with its gate."""

    def __init__(self, trial: AdapterEvaluation, *job: Any) -> None:
        super().__init__(*job, RunTrigger.IMPORT, trial.cause)
        self.run_id, self.trial = trial.run_id, trial
        self.folder = self.folder / "trial"  # the checkpoint of a run that waits to go on is not this one's to drop

    def run(self) -> Outcome:
        """Judge it. Raises Interrupted when told to stop."""
        self.live.state = "checking"
        try:
            foreign = read_external(self.adapters.staged(self.trial.folder), self.engine)
            self.in_force = self.adapters.current()
            if problems := lineage_problems(self._claimed(foreign), self._here()):
                raise AdapterRejected("; ".join(problems))
        except AdapterRejected as error:
            return self._outcome("rejected", str(error))
        return self._scored(foreign)

    def _while_in_force(self) -> float:
        """A trial is short, and refused rather than repeated where another adapter is in force at its end."""
        return self._pause()

    def _here(self) -> Lineage:
        return Lineage(self.engine.draft_fingerprint, self.engine.target.tokenizer_fingerprint, self.in_force)

    def _claimed(self, foreign: ExternalAdapter) -> Lineage:
        """An adapter is a change of the pristine draft: one that names no parent was made from that and fits beside any."""
        if foreign.manifest is None:
            return self._here()
        parent = foreign.manifest.parent_id or self.in_force
        return Lineage(foreign.manifest.base_fingerprint, foreign.manifest.tokenizer_fingerprint, parent)

    def _scored(self, foreign: ExternalAdapter) -> Outcome:
        self.live.state = "gathering"
        material = self.data_loader.material()
        # nothing of it is trained on, so no failure is used up
        self.material = replace(material, failures=[], successes=[], last_generation="")
        minimum = self.settings.training.min_heldout_generations
        if len(material.held_out) < minimum:
            held = f"{len(material.held_out)} held-out generations of the {minimum} that a verdict needs"
            return self._outcome("no_verdict", f"{held}; import it again when there are more")
        self.general = self._regression()
        self.live.state = "scoring"
        before = self._with(self._parent)
        after = self._with(lambda: foreign.adapter)
        self.pristine = self._without_adapter()
        return self._pass(foreign, before, after, self._verdict(before, after))

    def _with(self, adapter: Callable[[], Any]) -> Scores:
        """The draft's scores with an adapter, as drafting would compute."""
        self.engine.use_adapter(adapter())
        return self._score(Learner(self.engine.draft))

    def _pass(self, foreign: ExternalAdapter, before: Scores, after: Scores, verdict: Verdict) -> Outcome:
        """Publish if the gate says so."""
        self._pause()
        if problems := lineage_problems(self._here(), replace(self._here(), parent=self.adapters.current())):
            verdict = replace(verdict, verdict="rejected", reason="; ".join(problems))
        promoted = verdict.verdict == "promoted"
        id = self.adapters.next_id() if promoted else "candidate"
        self._keep_scores(id, before, after, verdict)
        if not promoted:
            return self._outcome(verdict.verdict, verdict.reason)
        self._publish(id, foreign, before, after, verdict)
        self.records.append(adapter_record(self.adapters, self.adapters.manifest(id)))
        outcome = self._outcome("promoted", verdict.reason, id)
        outcome.path = self.adapters.folder / id
        return outcome

    def _publish(self, id: str, foreign: ExternalAdapter, before: Scores, after: Scores, verdict: Verdict) -> None:
        """A directory of our own making around the foreign tensors; nothing else of what came with them is kept."""
        shape, weights, hot = foreign.adapter.shape, foreign.adapter.weights, foreign.adapter.hot
        scratch = self.adapters.scratch(id)
        write_tensors(scratch, shape, weights, hot)
        held = {
            "heldout_before": round(verdict.before, 5),
            "heldout_after": round(verdict.after, 5),
            "heldout_before_by_depth": [round(value, 5) for value in before.held_out.by_depth],
            "heldout_after_by_depth": [round(value, 5) for value in after.held_out.by_depth],
            "heldout_generations": len(self.material.held_out),
            "heldout_positions": int(after.held_out.positions.sum()),
            "gate": verdict.numbers(),
        }
        manifest = Manifest(
            id=id,
            kind="lora",
            created_at=time.time(),
            base_model=self.engine.draft.name,
            base_fingerprint=self.engine.draft_fingerprint,
            target_fingerprint=self.engine.target.fingerprint,
            tokenizer_fingerprint=self.engine.target.tokenizer_fingerprint,
            parent_id=foreign.manifest.parent_id if foreign.manifest is not None else "",
            training_run_id=self.run_id,
            rank=shape.rank,
            alpha=shape.alpha,
            modules=list(shape.keys),
            change_norm=round(run_all(change_norm_steps(shape, weights)), 6),
            metrics=held,
            training={"imported": self.trial.name, "generations": _learned_from(foreign)},
        )
        self.adapters.publish(scratch, manifest)


def _learned_from(foreign: ExternalAdapter) -> list[str]:
    """Generations that its manifest says it learned from: a purge of one of them takes it along."""
    return foreign.manifest.generations if foreign.manifest is not None else []
