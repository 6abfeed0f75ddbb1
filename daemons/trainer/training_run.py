"""One training run: gather, train LoRA from the active adapter, score on held-out conversations, pass the gate, publish.

Runs on the trainer's MLX thread in small pieces; between any two it may be told to wait or to stop. Checkpoints let a killed
run go on where it was. Every outcome becomes a `TrainingRun` record with its numbers, published or not.
"""

import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from specl.daemons.trainer.data_loader import DataLoader, TrainingData
from specl.daemons.trainer.records import adapter_record, evaluations
from specl.daemons.trainer.regression import RegressionSlice
from specl.daemons.trainer.throttle import Superseded
from specl.daemons.trainer.training_loop import Live, TrainingLoop
from specl.shared.adapters.registry import Adapters, Manifest
from specl.shared.adapters.tensors import load_adapter, write_tensors
from specl.shared.engine.core import EngineCore, LoadedAdapter
from specl.shared.errors import AdapterRejected, ModelError
from specl.shared.learning.examples import Example, hot_vocabulary
from specl.shared.learning.gate import Agreement, Lineage, Verdict, expected_rate, judge, lineage_problems, spoils
from specl.shared.learning.learner import Learner, agreement
from specl.shared.loading.costs import load_costs
from specl.shared.messaging.codes import RunTrigger, RunVerdict
from specl.shared.messaging.messages import TrainingRun
from specl.shared.models.head import HeadDraft
from specl.shared.models.lora import (
    LoraShape,
    Weights,
    attach,
    change_norm_steps,
    choose_layers,
    interpolate,
    lora_weights,
)
from specl.shared.paths import Paths
from specl.shared.retention import checkpoints
from specl.shared.runtime import log
from specl.shared.runtime.incremental import run_all
from specl.shared.settings.schema import Settings

MIN_EXAMPLES = 4
DEPTHS = 3  # of a head's own steps: scored
NEWEST = 20  # held-out generations, which say what is asked for now
SHARES = (0.9, 0.8, 0.65, 0.5)  # of the way that are tried where all of it spoils general text
_log = log.get("training")


@dataclass(slots=True)
class Outcome:
    """How a run ended, and the records that say so."""

    verdict: str
    reason: str
    adapter_id: str = ""
    path: Path | None = None
    records: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Scores:
    """One draft state on both sets that the gate looks at."""

    held_out: Agreement
    general: Agreement


def in_force(adapters: Adapters, engine: EngineCore) -> LoadedAdapter | None:
    """The adapter that CURRENT names; None where there is none, or none that fits this draft."""
    current = adapters.current()
    if not current:
        return None
    try:
        return load_adapter(adapters, adapters.folder / current, engine)[0]
    except AdapterRejected as error:
        _log.warning("adapter.unusable", adapter=current, reason=str(error))
        return None


class TrainingJob:
    """One run. `pause` is called between pieces: it waits while inference is busy, and raises Interrupted to stop."""

    def __init__(
        self,
        engine: EngineCore,
        data_loader: DataLoader,
        adapters: Adapters,
        paths: Paths,
        settings: Settings,
        live: Live,
        pause: Callable[[], float],
        trigger: RunTrigger,
        cause: str,
    ) -> None:
        self.engine, self.data_loader, self.adapters = engine, data_loader, adapters
        self.paths, self.folder = paths, paths.training
        self.settings, self.live, self._pause, self.trigger = settings, live, pause, trigger
        self.cause = cause
        self.run_id, self.created_at = uuid.uuid4().hex, time.time()
        self.loop: TrainingLoop | None = None
        self.replayed = 0  # texts of the draft's own replay set
        self.material = TrainingData([], [], [], "")
        self.general: list[Example] = []
        self.pristine = 0.0  # agreement on it without any adapter
        self._start: Weights | None = None  # A and B that training began with, where they are an adapter's
        self.parent_id = self.in_force = ""  # they differ where what CURRENT names cannot be used
        self.records: list[Any] = []

    # ------------------------------------------------------------------------------------------------ the run
    def run(self) -> Outcome:
        """Do it. Raises Interrupted when told to stop; the checkpoint stays and the next run goes on with it."""
        self.live.state = "gathering"
        rows = self.data_loader.sorted()
        if short := self._short(len(rows.failures), len(rows.successes), len(rows.judges)):
            return short  # before any text is read and any state computed
        material = self.material = self.data_loader.material(rows)
        if short := self._short(len(material.failures), len(material.successes), len(material.held_out)):
            return short  # some were repeats
        self.live.state = "preparing"
        replay = self.data_loader.replay(self.folder, self.live.tell)
        self.replayed = len(replay)
        self.general = self._regression()
        parent = self._parent()
        self.engine.use_adapter(parent)
        learner = Learner(self.engine.draft)
        self.live.state = "scoring"
        before = self._score(learner)
        self.pristine = self._without_adapter() if parent is not None else before.general.value
        shape = self._prepare(learner, parent, replay)
        origin = {"parent": self.parent_id, "draft": self.engine.draft_fingerprint}
        self.loop = TrainingLoop(
            material, replay, self.settings, self.folder, self.data_loader, origin, self._known(), self.live, self._while_in_force
        )  # fmt: skip
        try:
            self.loop.run(learner)
        except FloatingPointError as error:
            return self._outcome("failed", str(error))
        self.live.state = "scoring"
        return self._judge(learner, shape, before, *self._weighed(learner, before))

    def _known(self) -> set[str]:
        """Generations that the parent was shown; adapters of before that was counted say what they might have been shown."""
        with suppress(AdapterRejected):
            manifest = self.adapters.manifest(self.parent_id)
            return set(manifest.training.get("shown", manifest.generations))
        return set()

    def _while_in_force(self) -> float:
        """`pause`. Raises Superseded, too: the checkpoint stays, for what was rolled back may be reinstated."""
        waited = self._pause()
        if self.adapters.current() != self.in_force:
            raise Superseded(f"it goes on from adapter {self.parent_id or 'none'}, which is no longer in force")
        return waited

    def _short(self, failures: int, successes: int, held_out: int) -> Outcome | None:
        """What is missing yet: to train on, or to judge by, without which the training would be for nothing."""
        minimum, counts = self.settings.training.min_heldout_generations, f"{failures} failures, {successes} successes"
        if failures + successes < MIN_EXAMPLES:
            return self._outcome("no_data", f"too little to train on yet: {counts}")
        if held_out < minimum:
            held = f"{held_out} held-out generations of the {minimum} that a verdict needs"
            return self._outcome("no_verdict", f"{held}, beside {counts}: collecting goes on")
        return None

    def _score(self, learner: Learner) -> Scores:
        """The draft as it is now, on held-out traffic and on the regression slice."""
        held_out = agreement(learner, self.material.held_out, DEPTHS, pause=self._while_in_force)
        return Scores(held_out, self._score_general(learner))

    def _score_general(self, learner: Learner) -> Agreement:
        """On the regression slice alone; nobody asks for its deeper steps."""
        return agreement(learner, self.general, pause=self._while_in_force)

    def _without_adapter(self) -> float:
        self.engine.use_adapter(None)
        return self._score_general(Learner(self.engine.draft)).value

    def _regression(self) -> list[Example]:
        """The regression slice, made where it is missing; empty for a target that cannot be run in batches."""
        wanted = self.settings.training.regression_prompts
        try:
            return RegressionSlice(self.paths.regression, self.engine, wanted, self._pause).examples()
        except ModelError as error:
            _log.warning("regression.impossible", reason=str(error))
            return []

    def _parent(self) -> LoadedAdapter | None:
        """The adapter that CURRENT names, to go on from."""
        self.in_force = self.adapters.current()
        adapter = in_force(self.adapters, self.engine)
        self.parent_id = adapter.id if adapter is not None else ""
        return adapter

    def _prepare(self, learner: Learner, parent: LoadedAdapter | None, replay: list[Example]) -> LoraShape:
        """Wrap the pristine draft's layers, with the parent's A and B where its shape is the same; refresh the hot vocabulary."""
        lora = self.settings.training.lora
        self.engine.use_adapter(None)
        module = self.engine.draft_module
        shape = LoraShape(lora.rank, lora.alpha, lora.dropout, choose_layers(module, lora.target_modules))
        module.freeze()  # what is attached next is all that trains
        same = parent is not None and (parent.shape.rank, parent.shape.keys, parent.shape.alpha) == (
            shape.rank,
            shape.keys,
            shape.alpha,
        )
        self._start = parent.weights if same else None
        attach(module, shape, self._start)
        draft = self.engine.draft
        if isinstance(draft, HeadDraft):
            old = parent.hot if parent is not None and parent.hot is not None else draft.hot
            texts = [*self.material.failures, *self.material.successes, *replay]
            learner.set_hot(
                hot_vocabulary(texts, draft.shape.hot_size, int(draft.target.config["vocab_size"]), keep=old)
            )
        return shape

    # ------------------------------------------------------------------------------------------------ the end of it
    def _weighed(self, learner: Learner, before: Scores) -> tuple[Scores, Verdict]:
        """What was learned before the gate; where that spoils general text and nothing else is against it, less of the way.

        Half of a change keeps more than half of what is gained and loses far less than half of the rest (docs/learning.md).
        No chance is given to what learned nothing: the gain must be proven on all of the way first.
        """
        learned, after = lora_weights(learner.module), self._score(learner)
        verdict = self._verdict(before, after)
        if not verdict.only_spoils:
            return after, verdict
        # where it is all adapters before it as well that cost too much, the way begins without any
        start = None if verdict.drifted else self._start
        _log.info("gate.spoils", reason=verdict.reason)
        for share in SHARES:
            learner.module.load_weights(list(interpolate(learned, share, start).items()), strict=False)
            general = self._score_general(learner)
            if spoils(before.general.value, general.value, self.pristine):
                continue
            part = Scores(agreement(learner, self.material.held_out, DEPTHS, pause=self._while_in_force), general)
            less = self._verdict(before, part).of(share)
            return (part, less) if less.verdict == "promoted" else (after, verdict)
        return after, verdict

    def _judge(self, learner: Learner, shape: LoraShape, before: Scores, after: Scores, verdict: Verdict) -> Outcome:
        """Publish if the gate says so."""
        self._while_in_force()  # the last chance to be told that the material is to be forgotten
        id = self.adapters.next_id() if verdict.verdict == "promoted" else "candidate"
        self._keep_scores(id, before, after, verdict)
        if verdict.verdict != "promoted":
            return self._outcome(verdict.verdict, verdict.reason)
        self._write(id, learner, shape, (before.held_out, after.held_out), verdict)
        self.records.append(adapter_record(self.adapters, self.adapters.manifest(id)))
        outcome = self._outcome("promoted", verdict.reason, id)
        outcome.path = self.adapters.folder / id
        return outcome

    def _keep_scores(self, id: str, before: Scores, after: Scores, verdict: Verdict) -> None:
        """Both as records."""
        for scored, scores, numbers in ((self.parent_id, before, {}), (id, after, verdict.numbers())):
            self.records += evaluations(self.run_id, scored, scores.held_out, scores.general, numbers)

    def _verdict(self, before: Scores, after: Scores) -> Verdict:
        """What the gate says, with tokens a second through the costs that inference has measured, where it has."""
        engine, most = self.engine, self.settings.speculative.max_draft_tokens
        mine = Lineage(engine.draft_fingerprint, engine.target.tokenizer_fingerprint, self.in_force)
        now = Lineage(mine.base, mine.tokenizer, self.adapters.current())
        costs = load_costs(engine, self.paths.costs)
        rates = [expected_rate(costs, score.held_out.by_depth, most) for score in (before, after)]
        return judge(
            before.held_out,
            after.held_out,
            self.settings.training.min_heldout_generations,
            (before.general, after.general) if self.general else None,
            self.pristine,
            (rates[0], rates[1]),
            lineage_problems(mine, now),
        )

    def _write(
        self, id: str, learner: Learner, shape: LoraShape, scores: tuple[Agreement, Agreement], verdict: Verdict
    ) -> Manifest:
        before, after = scores
        weights = lora_weights(learner.module)
        draft = self.engine.draft
        manifest = Manifest(
            id=id,
            kind="lora",
            created_at=time.time(),
            base_model=draft.name,
            base_fingerprint=self.engine.draft_fingerprint,
            target_fingerprint=self.engine.target.fingerprint,
            tokenizer_fingerprint=self.engine.target.tokenizer_fingerprint,
            parent_id=self.parent_id,
            training_run_id=self.run_id,
            rank=shape.rank,
            alpha=shape.alpha,
            modules=list(shape.keys),
            change_norm=round(run_all(change_norm_steps(shape, weights)), 6),
            metrics={
                "heldout_before": round(verdict.before, 5),
                "heldout_after": round(after.value, 5),
                "heldout_before_by_depth": [round(v, 5) for v in before.by_depth],
                "heldout_after_by_depth": [round(v, 5) for v in after.by_depth],
                "heldout_before_newest": [
                    round(float(part[:NEWEST].sum()), 3) for part in (before.hits, before.positions)
                ],
                "heldout_generations": len(self.material.held_out),
                "heldout_positions": int(after.positions.sum()),
                "gate": verdict.numbers(),
            },
            training={
                **self._course(),
                "watched": [round(loss, 4) for loss in self.loop.watched] if self.loop else [],
                "generations": self.loop.learned if self.loop else [],
                "shown": sorted(self.loop.shown) if self.loop else [],
                **self._data(),
            },
        )
        scratch = self.adapters.scratch(id)
        hot = draft.hot if isinstance(draft, HeadDraft) else None
        try:
            write_tensors(scratch, shape, weights, hot)
            self.adapters.publish(scratch, manifest)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # what a full disk has left; a published one has been renamed
        return manifest

    def _course(self) -> dict[str, Any]:
        """How the steps went, where there were any."""
        losses = self.loop.losses if self.loop else []
        first, last = (losses[0], round(float(np.mean(losses[-10:])), 4)) if losses else (None, None)
        tokens = self.loop.tokens if self.loop else 0
        return {"steps": len(losses), "tokens": tokens, "loss_first": first, "loss_last": last}

    def _data(self) -> dict[str, int]:
        """What was learned from, counted."""
        counts = (len(self.material.failures), len(self.material.successes), self.replayed)
        return dict(zip(("failures", "successes", "replay"), counts, strict=True))

    def _outcome(self, verdict: str, reason: str, adapter_id: str = "") -> Outcome:
        """End the run: its checkpoint has served."""
        checkpoints.forget(checkpoints.checkpoint_folder(self.folder))
        training = self.settings.training
        consumed = verdict in ("promoted", "rejected")
        run = TrainingRun(
            id=self.run_id,
            created_at=self.created_at,
            finished_at=time.time(),
            trigger=self.trigger,
            cause=self.cause,
            verdict=RunVerdict(verdict),
            reason=reason,
            parent_id=self.parent_id,
            adapter_id=adapter_id,
            examples=len(self.material.fresh_ids),
            **self._course(),
            last_generation=self.material.last_generation if consumed else "",
            settings=training.model_dump(mode="json") | {"data": self._data()},
        )
        return Outcome(verdict, reason, adapter_id, None, [*self.records, run])
