"""One training run: gather, train LoRA from the active adapter, score on held-out conversations,
judge, publish.

Runs on the trainer's MLX thread in small pieces; between any two it may be told to wait or to stop.
A run that was killed is resumed from its checkpoint. Every outcome becomes a `TrainingRun` record with
its numbers, published or not.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from specl.daemons.trainer.data_loader import TrainingData
from specl.daemons.trainer.jobs import Outcome, TrainJob
from specl.daemons.trainer.publish import Tensors, held_out_metrics, publish_adapter
from specl.daemons.trainer.run_context import RunContext
from specl.daemons.trainer.run_report import TrainedOn
from specl.daemons.trainer.scoring import Scorer, Scores, learner_of, load_active_adapter
from specl.daemons.trainer.throttle import Superseded
from specl.daemons.trainer.training_loop import TrainingLoop
from specl.shared.engine.core import LoadedAdapter
from specl.shared.errors import AdapterRejected
from specl.shared.learning.examples import Example, hot_vocabulary
from specl.shared.learning.judge import Regression, Verdict
from specl.shared.learning.learner import Learner
from specl.shared.messaging.codes import RunVerdict
from specl.shared.models.head import HeadDraft
from specl.shared.models.lora import LoraShape, Weights, attach, choose_layers, interpolate, lora_weights
from specl.shared.retention import checkpoints
from specl.shared.runtime import log

MIN_EXAMPLES = 4
ALPHAS = (0.9, 0.8, 0.65, 0.5)  # of the change that are tried where all of it makes general text worse
_log = log.get("training")


@dataclass(slots=True)
class Parent:
    """The adapter that a run starts from. `active_id`: the adapter that CURRENT named. `id` and
    `adapter` are empty where its files cannot be used.
    """

    active_id: str
    adapter: LoadedAdapter | None

    @property
    def id(self) -> str:
        """Its id; empty for none."""
        return self.adapter.id if self.adapter is not None else ""


@dataclass(frozen=True, slots=True)
class TrainedDraft:
    """The draft with LoRA layers attached. `start`: the parent's A and B, where training began from
    them; else None.
    """

    learner: Learner
    shape: LoraShape
    start: Weights | None


class AdapterTraining:
    """One run. `run` raises Interrupted when told to stop, and Superseded where the parent is
    no longer the active adapter; then the checkpoint stays, and the next run goes on with it.
    """

    def __init__(self, context: RunContext, job: TrainJob) -> None:
        self.context, self.engine, self.settings = context, context.engine, context.settings
        self.report = context.report(job.trigger, job.cause)
        self.parent = Parent("", None)

    def run(self) -> Outcome:
        """Train, judge and publish, then remove the checkpoint."""
        outcome = self._run()
        checkpoints.forget(checkpoints.checkpoint_folder(self.context.paths.training))
        return outcome

    def _run(self) -> Outcome:
        loader, progress = self.context.data_loader, self.context.progress
        progress.state = "gathering"
        split = loader.split()
        if reason := self._too_little(len(split.failures), len(split.successes), len(split.eval_rows)):
            return self.report.end(*reason)  # before any text is read and any state computed
        data = loader.load(split)
        self.report.trained_on = TrainedOn(
            len(data.failures), len(data.successes), last_generation=data.last_generation
        )
        if reason := self._too_little(len(data.failures), len(data.successes), len(data.held_out)):
            return self.report.end(*reason)  # some were repeats
        progress.state = "preparing"
        replay = loader.replay(self.context.paths.training, progress.set_step)
        scorer = Scorer(self.engine, data.held_out, self.context.regression_slice(), self.pause_while_active)
        self.use_active_as_parent()
        progress.state = "scoring"
        before = scorer.with_adapter(self.parent.adapter)
        pristine = scorer.pristine() if self.parent.adapter is not None else before.general.value
        trained = self._attach(data, replay)
        loop = self._loop(data, replay)
        try:
            loop.run(trained.learner)
        except FloatingPointError as error:
            return self._end(loop, RunVerdict.FAILED, str(error))
        progress.state = "scoring"
        judge = CandidateJudge(self.context, scorer, self.parent.active_id, before, pristine)
        return self._judge(loop, trained, before, *judge.verdict(trained))

    def _too_little(self, failures: int, successes: int, held_out: int) -> tuple[RunVerdict, str] | None:
        """Why the run cannot go on yet: too little to train on, or too little to judge the result by.
        None where there is enough.
        """
        minimum, counts = self.settings.training.min_heldout_generations, f"{failures} failures, {successes} successes"
        if failures + successes < MIN_EXAMPLES:
            return RunVerdict.NO_DATA, f"too little to train on yet: {counts}"
        if held_out < minimum:
            held = f"{held_out} held-out generations of the {minimum} that a verdict needs"
            return RunVerdict.NO_VERDICT, f"{held}, beside {counts}: collecting goes on"
        return None

    # ------------------------------------------------------------------------------------------------ the parent
    def use_active_as_parent(self) -> None:
        """Make the active adapter the parent."""
        adapters = self.context.adapters
        self.parent = Parent(adapters.current(), load_active_adapter(adapters, self.engine))
        self.report.parent_id = self.parent.id

    def pause_while_active(self) -> float:
        """Pause as `RunContext.pause` does. Raises Superseded where another adapter is active by now:
        the checkpoint stays, because the parent may be reinstated.
        """
        waited = self.context.pause()
        if self.context.adapters.current() != self.parent.active_id:
            raise Superseded(f"it started from adapter {self.parent.id or 'none'}, which is no longer active")
        return waited

    def _parent_seen_ids(self) -> set[str]:
        """Ids of the generations that the parent was trained on. Manifests of earlier versions name all
        that it may have been trained on.
        """
        with suppress(AdapterRejected):
            manifest = self.context.adapters.manifest(self.parent.id)
            return set(manifest.training.get("seen_ids", manifest.training.get("shown", manifest.generations)))
        return set()

    # ------------------------------------------------------------------------------------------------ the training
    def _attach(self, data: TrainingData, replay: list[Example]) -> TrainedDraft:
        """Wrap the pristine draft's layers, with the parent's A and B where its shape is the same;
        refresh the hot vocabulary.
        """
        lora, parent = self.settings.training.lora, self.parent.adapter
        self.engine.use_adapter(None)
        learner = learner_of(self.engine)
        module = learner.module
        shape = LoraShape(lora.rank, lora.alpha, lora.dropout, choose_layers(module, lora.target_modules))
        module.freeze()  # what is attached next is all that trains
        start = parent.weights if parent is not None and replace(parent.shape, dropout=lora.dropout) == shape else None
        attach(module, shape, start)
        draft = self.engine.draft
        if isinstance(draft, HeadDraft):
            old = parent.hot if parent is not None and parent.hot is not None else draft.hot
            texts = [*data.failures, *data.successes, *replay]
            size, vocabulary = draft.shape.hot_size, int(draft.target.config["vocab_size"])
            learner.set_hot(hot_vocabulary(texts, size, vocabulary, keep=old))
        return TrainedDraft(learner, shape, start)

    def _loop(self, data: TrainingData, replay: list[Example]) -> TrainingLoop:
        return TrainingLoop(
            data=data,
            replay=replay,
            settings=self.settings,
            folder=self.context.paths.training,
            store=self.context.data_loader.store,
            base={"parent": self.parent.id, "draft": self.engine.draft_fingerprint},
            parent_seen_ids=self._parent_seen_ids(),
            progress=self.context.progress,
            pause=self.pause_while_active,
        )

    # ------------------------------------------------------------------------------------------------ the end
    def _judge(
        self, loop: TrainingLoop, trained: TrainedDraft, before: Scores, after: Scores, verdict: Verdict
    ) -> Outcome:
        """Publish if the verdict is to promote."""
        self.pause_while_active()  # raises where the data was purged meanwhile
        if verdict.verdict != RunVerdict.PROMOTED:
            self.report.add_scores("candidate", before, after, verdict)
            return self._end(loop, verdict.verdict, verdict.reason)
        self._add_steps(loop)
        draft = self.engine.draft
        hot = draft.hot if isinstance(draft, HeadDraft) else None
        id = publish_adapter(
            self.context.adapters,
            self.engine,
            self.report.run_id,
            self.parent.id,
            Tensors(trained.shape, lora_weights(trained.learner.module), hot),
            held_out_metrics(before, after, verdict),
            self._training_of(loop),
        )
        self.report.add_scores(id, before, after, verdict)
        return self.report.promoted(self.context.adapters, id, verdict.reason)

    def _end(self, loop: TrainingLoop, verdict: RunVerdict, reason: str) -> Outcome:
        self._add_steps(loop)
        return self.report.end(verdict, reason)

    def _add_steps(self, loop: TrainingLoop) -> None:
        self.report.trained_on = replace(
            self.report.trained_on, replay=len(loop.replay), tokens=loop.tokens, losses=tuple(loop.losses)
        )

    def _training_of(self, loop: TrainingLoop) -> dict[str, Any]:
        """The manifest's `training`: how the steps went, and which generations the weights may have
        or have seen.
        """
        return {
            **self.report.trained_on.steps,
            **self.report.trained_on.counts,
            "validation_losses": [round(loss, 4) for loss in loop.validation_losses],
            "generations": loop.eligible_ids,
            "seen_ids": sorted(loop.seen_ids),
        }


@dataclass(frozen=True, slots=True)
class CandidateJudge:
    """Judges a trained candidate, and parts of its change where the whole is rejected."""

    context: RunContext
    scorer: Scorer
    active_id: str
    before: Scores
    pristine: float

    def verdict(self, trained: TrainedDraft) -> tuple[Scores, Verdict]:
        """The trained weights' scores and verdict. Where they fail on general text alone, weights
        between the old and the trained ones are tried (WiSE-FT, arXiv 2109.01903); the first that
        pass are left in the learner.

        Half of a change keeps more than half of the gain and loses far less than half of the rest
        (docs/learning.md). Interpolation is tried only if the full change's gain interval is above
        zero, so that chance is given no more tries.
        """
        trained_weights = lora_weights(trained.learner.module)
        after = self._scores(trained.learner)
        verdict = self._verdict(after)
        if not verdict.fails_only_regression:
            return after, verdict
        # where this adapter and all before it together have cost too much, interpolate from the draft
        # without any adapter
        drifted = verdict.regression is not None and verdict.regression.drifted
        start = None if drifted else trained.start
        _log.info("judge.regression_failed", reason=verdict.reason)
        for alpha in ALPHAS:
            weights = interpolate(trained_weights, alpha, start)
            trained.learner.module.load_weights(list(weights.items()), strict=False)
            general = self.scorer.on_general(trained.learner)
            if Regression(self.before.general.value, general.value, self.pristine).rejection_reason:
                continue
            part = Scores(self.scorer.on_held_out(trained.learner), general)
            interpolated = self._verdict(part).at_alpha(alpha)
            return (part, interpolated) if interpolated.verdict == RunVerdict.PROMOTED else (after, verdict)
        return after, verdict

    def _scores(self, learner: Learner) -> Scores:
        return Scores(self.scorer.on_held_out(learner), self.scorer.on_general(learner))

    def _verdict(self, after: Scores) -> Verdict:
        return self.context.judge(self.before, after, self.pristine, self.active_id)
