"""One training run: gather, train LoRA from the active adapter, score on held-out conversations, pass the gate, publish.

Runs on the trainer's MLX thread in small pieces; between any two it may be told to wait or to stop. Checkpoints let a killed
run go on where it was. Every outcome becomes a `TrainingRun` record with its numbers, published or not.
"""

import math
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from specl.daemons.trainer.data import Gatherer, Material, pieces
from specl.daemons.trainer.politeness import Abandoned
from specl.daemons.trainer.records import adapter_record, evaluations
from specl.daemons.trainer.regression import RegressionSlice
from specl.shared import checkpoints, log
from specl.shared.adapters import Adapters, Manifest
from specl.shared.config import Settings
from specl.shared.engine.adapter_files import load_adapter, write_files
from specl.shared.engine.engine import Engine, LoadedAdapter
from specl.shared.errors import AdapterRejected, Interrupted, ModelError
from specl.shared.learning.examples import Example, hot_vocabulary
from specl.shared.learning.gate import Agreement, Lineage, Verdict, expected_rate, judge, lineage_problems
from specl.shared.learning.learner import Learner, agreement
from specl.shared.learning.losses import LossSettings
from specl.shared.learning.steps import Batches, Deadline, StepLoop, StepSettings, about_checkpoint
from specl.shared.models.head import HeadDraft
from specl.shared.models.lora import (
    LoraShape,
    Weights,
    attach,
    change_norm,
    choose_layers,
    lora_weights,
    part_of_the_way,
)
from specl.shared.paths import Paths
from specl.shared.wire import TrainingRun

MIN_EXAMPLES = 4
PIECE_TOKENS = 256  # of one forward and backward: what a request may have to wait for
CHECKPOINT_S = 20.0
SAME_WORK = 0.75  # of the generations of a checkpoint and a new run that both have
DEPTHS = 3  # of a head's own steps: scored
SHARES = (1.0, 0.9, 0.8, 0.65, 0.5)  # of the way that are tried where all of it spoils general text
TRAINED_DEPTHS = 2  # and trained, as `draft build` does: the third costs half as much time again
RECIPE = {
    "lora",
    "loss",
    "learning_rate",
    "batch_size",
    "gradient_accumulation_steps",
    "replay_ratio",
    "num_epochs",
    "max_minutes",
}
_log = log.get("training")


@dataclass(slots=True)
class Outcome:
    """How a run ended, and the records that say so."""

    verdict: str
    reason: str
    adapter_id: str = ""
    path: Path | None = None
    records: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class Live:
    """What `status` shows of a run under way."""

    state: str = "idle"
    step: int = 0
    total: int = 0
    loss: float | None = None

    def tell(self, step: int, total: int) -> None:
        """How far its present work is."""
        self.step, self.total = step, total


@dataclass(frozen=True, slots=True)
class Scores:
    """One draft state on both sets that the gate looks at."""

    held_out: Agreement
    general: Agreement


def in_force(adapters: Adapters, engine: Engine) -> LoadedAdapter | None:
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
        engine: Engine,
        gatherer: Gatherer,
        adapters: Adapters,
        paths: Paths,
        settings: Settings,
        live: Live,
        pause: Callable[[], float],
        trigger: str,
    ) -> None:
        self.engine, self.gatherer, self.adapters = engine, gatherer, adapters
        self.paths, self.folder = paths, paths.training
        self.settings, self.live, self._pause, self.trigger = settings, live, pause, trigger
        self.run_id, self.created_at = uuid.uuid4().hex, time.time()
        self.learned: list[str] = []  # generations that the weights have seen, a resumed run's included
        self.losses: list[float] = []
        self.tokens = 0
        self.replayed = 0  # texts of the draft's own replay set
        self.material = Material([], [], [], "")
        self.general: list[Example] = []
        self._start: Weights | None = None  # A and B that training began with, where they are an adapter's
        self.parent_id = self.in_force = ""  # they differ where what CURRENT names cannot be used
        self.records: list[Any] = []

    # ------------------------------------------------------------------------------------------------ the run
    def run(self) -> Outcome:
        """Do it. Raises Interrupted when told to stop; the checkpoint stays and the next run goes on with it."""
        self.live.state = "gathering"
        self.material = self.gatherer.material()
        material = self.material
        self.learned = sorted(material.fresh_ids)
        minimum = self.settings.training.min_heldout_generations
        counts = f"{len(material.failures)} failures, {len(material.successes)} successes"
        if len(material.failures) + len(material.successes) < MIN_EXAMPLES:
            return self._outcome("no_data", f"too little to train on yet: {counts}")
        if len(material.held_out) < minimum:  # before the training, which would be for nothing
            held = f"{len(material.held_out)} held-out generations of the {minimum} that a verdict needs"
            return self._outcome("no_verdict", f"{held}, beside {counts}: collecting goes on")
        self.live.state = "preparing"
        replay = self.gatherer.replay(self.folder, self.live.tell)
        self.replayed = len(replay)
        self.general = self._regression()
        parent = self._parent()
        self.engine.use_adapter(parent)
        learner = Learner(self.engine.draft)
        self.live.state = "scoring"
        before = self._score(learner)
        shape = self._prepare(learner, parent, replay)
        try:
            self._train(learner, replay)
        except FloatingPointError as error:
            return self._outcome("failed", str(error))
        self.live.state = "scoring"
        return self._judge(learner, shape, before, *self._weighed(learner, before))

    def _score(self, learner: Learner) -> Scores:
        """The draft as it is now, on held-out traffic and on the regression slice."""
        sets = (self.material.held_out, self.general)
        return Scores(*[agreement(learner, examples, DEPTHS, pause=self._pause) for examples in sets])

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

    def _train(self, learner: Learner, replay: list[Example]) -> None:
        training = self.settings.training
        fresh = self.material.failures or self.material.successes
        again = [*(self.material.successes if self.material.failures else []), *replay]
        batches = Batches(fresh, again, training.batch_size, training.replay_ratio, seed=0)
        fresh_a_step = training.batch_size * training.gradient_accumulation_steps * max(batches.fresh_share, 0.1)
        total = max(1, math.ceil(len(fresh) * training.num_epochs / fresh_a_step))
        loss = LossSettings(training.loss.type, training.loss.temperature, training.loss.alpha)
        checkpointing = self.settings.memory.gradient_checkpointing
        steps = StepSettings(training.learning_rate, total, depths=TRAINED_DEPTHS, checkpointing=checkpointing)
        loop = StepLoop(learner, loss, steps)
        checkpoint = checkpoints.checkpoint_folder(self.folder)
        used = self._resume(loop, checkpoint, batches)
        self.live.state, self.live.step, self.live.total = "training", loop.step_number, total
        deadline = Deadline(training.max_minutes * 60, used)
        try:
            self._steps(loop, batches, deadline, checkpoint)
        except Abandoned:
            raise
        except Interrupted:
            self._save(loop, checkpoint, deadline)
            raise

    def _steps(self, loop: StepLoop, batches: Batches, deadline: Deadline, checkpoint: Path) -> None:
        """Until all are done or the time is over."""
        training, saved = self.settings.training, time.monotonic()
        while loop.step_number < self.live.total and not deadline.over:
            groups = [
                group
                for _ in range(training.gradient_accumulation_steps)
                for group in pieces(batches.next(), PIECE_TOKENS)
            ]
            loop.time_share = deadline.share
            value = loop.step(groups, lambda: deadline.pause(self._pause()))
            self.tokens += sum(example.rows for group in groups for example in group)
            self.losses.append(value)
            self.live.step, self.live.loss = loop.step_number, round(float(np.mean(self.losses[-10:])), 4)
            if time.monotonic() - saved > CHECKPOINT_S:
                self._save(loop, checkpoint, deadline)
                saved = time.monotonic()

    def _save(self, loop: StepLoop, checkpoint: Path, deadline: Deadline) -> None:
        """Keep what a kill should not cost. A disk that has no room for it does not end the run."""
        done = {"used_s": deadline.used, "losses": self.losses, "tokens": self.tokens}
        try:
            loop.save(checkpoint, self._about() | done)
        except OSError as error:
            _log.warning("checkpoint.not_saved", reason=str(error))

    def _about(self) -> dict[str, Any]:
        """What a checkpoint belongs to."""
        names = ("parent", "draft", "recipe")
        same = (self.parent_id, self.engine.draft_fingerprint, self._recipe())
        return dict(zip(names, same, strict=True)) | {"ids": self.learned}

    def _recipe(self) -> dict[str, Any]:
        """What shapes the weights and their way: a checkpoint made otherwise is none of this run's."""
        return self.settings.training.model_dump(mode="json", include=RECIPE)

    def _same_work(self, about: dict[str, Any]) -> bool:
        """Whether a killed run's checkpoint is worth going on with: from the same parent, mostly on the same generations (some
        were answered since), all of which are still kept and none of which is judged on.
        """
        ids, fresh = set(about.get("ids", [])), set(self.material.fresh_ids)
        judges = {example.id for example in self.material.held_out}
        mine = self._about()
        same = all(about.get(name) == mine[name] for name in ("parent", "draft", "recipe"))
        mostly = len(ids & fresh) >= SAME_WORK * len(ids | fresh)
        return same and mostly and not ids & judges and not self.gatherer.store.missing(sorted(ids))

    def _resume(self, loop: StepLoop, checkpoint: Path, batches: Batches) -> float:
        """Go on with a killed run's checkpoint if it was about the same work, otherwise drop it; seconds that it had worked."""
        about = about_checkpoint(checkpoint)
        if about is None:
            return 0.0
        if self._same_work(about):
            try:
                loop.resume(checkpoint)
                for _ in range(loop.step_number * self.settings.training.gradient_accumulation_steps):
                    batches.next()
                self.learned = sorted({*about["ids"], *self.learned})
                self.losses, self.tokens = list(about["losses"]), int(about["tokens"])
                _log.info("training.resumed", step=loop.step_number)
                return float(about["used_s"])
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                _log.warning("checkpoint.unusable", reason=str(error))
        checkpoints.forget(checkpoint)
        return 0.0

    # ------------------------------------------------------------------------------------------------ the end of it
    def _weighed(self, learner: Learner, before: Scores) -> tuple[Scores, Verdict]:
        """What was learned before the gate; where that spoils general text and nothing else is against it, less of the way.

        Half of a change keeps more than half of what is gained and loses far less than half of the rest (docs/learning.md).
        No chance is given to what learned nothing: the gain must be proven on all of the way first.
        """
        learned = lora_weights(learner.module)
        tried: list[tuple[Scores, Verdict]] = []
        for share in SHARES:
            learner.module.load_weights(list(part_of_the_way(learned, share, self._start).items()), strict=False)
            after = self._score(learner)
            tried.append((after, self._verdict(before, after).of(share)))
            if not tried[-1][1].only_spoils:
                break
            _log.info("gate.spoils", share=share, reason=tried[-1][1].reason)
        return tried[-1] if tried[-1][1].verdict == "promoted" else tried[0]

    def _judge(self, learner: Learner, shape: LoraShape, before: Scores, after: Scores, verdict: Verdict) -> Outcome:
        """Publish if the gate says so."""
        self._pause()  # the last chance to be told that the material is to be forgotten
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
        costs = engine.known_costs(self.paths.costs)
        rates = [expected_rate(costs, score.held_out.by_depth, most) for score in (before, after)]
        return judge(
            before.held_out,
            after.held_out,
            self.settings.training.min_heldout_generations,
            (before.general, after.general) if self.general else None,
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
            change_norm=round(change_norm(shape, weights), 6),
            metrics={
                "heldout_before": round(verdict.before, 5),
                "heldout_after": round(after.value, 5),
                "heldout_before_by_depth": [round(v, 5) for v in before.by_depth],
                "heldout_after_by_depth": [round(v, 5) for v in after.by_depth],
                "heldout_generations": len(self.material.held_out),
                "heldout_positions": int(after.positions.sum()),
                "gate": verdict.numbers(),
            },
            training={
                "steps": len(self.losses),
                "tokens": self.tokens,
                "loss_first": self.losses[0] if self.losses else None,
                "loss_last": self.live.loss,
                "generations": self.learned,
                **self._data(),
            },
        )
        scratch = self.adapters.scratch(id)
        hot = draft.hot if isinstance(draft, HeadDraft) else None
        try:
            write_files(scratch, shape, weights, hot)
            self.adapters.publish(scratch, manifest)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # what a full disk has left; a published one has been renamed
        return manifest

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
            verdict=verdict,
            reason=reason,
            parent_id=self.parent_id,
            adapter_id=adapter_id,
            examples=len(self.material.fresh_ids),
            steps=len(self.losses),
            tokens=self.tokens,
            loss_first=self.losses[0] if self.losses else None,
            loss_last=self.live.loss if self.losses else None,
            last_generation=self.material.last_generation if consumed else "",
            settings=training.model_dump(mode="json") | {"data": self._data()},
        )
        return Outcome(verdict, reason, adapter_id, None, [*self.records, run])
