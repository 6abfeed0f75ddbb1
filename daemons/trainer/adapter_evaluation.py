"""Judges an adapter made elsewhere by the rule for trained ones: read it, score it against the
active adapter, promote or reject.

An evaluation trains nothing and uses up no failures. Its verdict is a `TrainingRun` record
like any other.
"""

from dataclasses import replace

from specl.daemons.trainer.jobs import EvaluateAdapterJob, Outcome
from specl.daemons.trainer.publish import Tensors, held_out_metrics, publish_adapter
from specl.daemons.trainer.run_context import RunContext
from specl.daemons.trainer.run_report import RunReport
from specl.daemons.trainer.scoring import Scorer, Scores, load_active_adapter
from specl.shared.adapters.external import ExternalAdapter, read_external
from specl.shared.errors import AdapterRejected
from specl.shared.learning.judge import Lineage, Verdict, lineage_problems
from specl.shared.messaging.codes import RunTrigger, RunVerdict


def evaluate_adapter(context: RunContext, job: EvaluateAdapterJob) -> Outcome:
    """Judge a staged adapter. Raises Interrupted when told to stop."""
    report = replace(context.report(RunTrigger.IMPORT, f"import {job.name}"), run_id=job.run_id)
    context.progress.state = "checking"
    active_id = context.adapters.current()
    try:
        external = read_external(context.adapters.staged(job.folder), context.engine)
        if problems := lineage_problems(_claimed(context, external, active_id), context.lineage(active_id)):
            raise AdapterRejected("; ".join(problems))
    except AdapterRejected as error:
        return report.end(RunVerdict.REJECTED, str(error))
    context.progress.state = "gathering"
    held_out = context.data_loader.load().held_out
    minimum = context.settings.training.min_heldout_generations
    if len(held_out) < minimum:
        counted = f"{len(held_out)} held-out generations of the {minimum} that a verdict needs"
        return report.end(RunVerdict.NO_VERDICT, f"{counted}; import it again when there are more")
    scorer = Scorer(context.engine, held_out, context.regression_slice(), context.pause)
    context.progress.state = "scoring"
    adapter = load_active_adapter(context.adapters, context.engine)
    report.parent_id = adapter.id if adapter is not None else ""
    before, after = scorer.with_adapter(adapter), scorer.with_adapter(external.adapter)
    verdict = context.judge(before, after, scorer.pristine(), active_id)
    context.pause()
    if problems := lineage_problems(context.lineage(active_id), context.lineage(context.adapters.current())):
        verdict = replace(verdict, verdict=RunVerdict.REJECTED, reason="; ".join(problems))
    return _end(context, job, report, external, before, after, verdict)


def _claimed(context: RunContext, external: ExternalAdapter, active_id: str) -> Lineage:
    """What the adapter says it was made for. One that names no parent was made from the pristine
    draft: it fits beside any.
    """
    if external.manifest is None:
        return context.lineage(active_id)
    parent = external.manifest.parent_id or active_id
    return Lineage(external.manifest.base_fingerprint, external.manifest.tokenizer_fingerprint, parent)


def _end(
    context: RunContext,
    job: EvaluateAdapterJob,
    report: RunReport,
    external: ExternalAdapter,
    before: Scores,
    after: Scores,
    verdict: Verdict,
) -> Outcome:
    """Publish if the verdict is to promote: a directory around the external tensors; nothing else that came
    with them is kept.
    """
    if verdict.verdict != RunVerdict.PROMOTED:
        report.add_scores("candidate", before, after, verdict)
        return report.end(verdict.verdict, verdict.reason)
    manifest, adapter = external.manifest, external.adapter
    id = publish_adapter(
        context.adapters,
        context.engine,
        report.run_id,
        manifest.parent_id if manifest is not None else "",
        Tensors(adapter.shape, adapter.weights, adapter.hot),
        held_out_metrics(before, after, verdict),
        # a purge of a generation that it learned from takes it along
        {"imported": job.name, "generations": manifest.generations if manifest is not None else []}
        | {"predecessor": report.parent_id},
    )
    report.add_scores(id, before, after, verdict)
    return report.promoted(context.adapters, id, verdict.reason)
