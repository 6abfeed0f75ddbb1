"""Records of version 1 in today's shape. Outboxes and quarantines may hold them for as long as a collector was away.

Works on the plain values that msgpack gave, before the codec checks them: what it does not understand it leaves as it is, and
the check refuses it.
"""

from dataclasses import asdict
from typing import Any

from specl.shared.answer_stats import AnswerStats
from specl.shared.messaging.codes import ActivationEvent, ActivationReason, RunTrigger

_STATS = asdict(AnswerStats())
_REASONS = {
    "announced": ActivationReason.ANNOUNCED,
    "restart": ActivationReason.RESTART,
    "by hand": ActivationReason.BY_HAND,
    "by hand, once more": ActivationReason.BY_HAND_AGAIN,
    "rolled back by hand": ActivationReason.ROLLED_BACK_BY_HAND,
    "reinstated by a second look": ActivationReason.REINSTATED,
}
_TRIGGERS = {"by hand": RunTrigger.BY_HAND, "by hand, now": RunTrigger.BY_HAND_NOW}


def upgrade_v1(kind: str, body: Any) -> Any:
    """The fields of a record of version 1 as version 2 has them."""
    if not isinstance(body, dict):
        return body
    if kind == "Generation" and isinstance(stats := body.get("stats"), dict):
        # version 1 had no schema for `stats`: absent fields get their defaults; an imported record has none at all
        return body | {"stats": {name: stats.get(name, default) for name, default in _STATS.items()} if stats else None}
    if kind == "Activation" and isinstance(note := body.get("reason"), str):
        return body | {"reason": activation_reason_v1(body.get("event", ""), note), "note": note}
    if kind == "TrainingRun" and isinstance(cause := body.get("trigger"), str):
        return body | {"trigger": run_trigger_v1(cause), "cause": cause}
    return body


def activation_reason_v1(event: str, note: str) -> ActivationReason:
    """The code of a sentence that version 1 wrote as the reason of an activation."""
    if event == ActivationEvent.REJECTED:
        return ActivationReason.VERIFICATION
    if event == ActivationEvent.ROLLED_BACK:
        return ActivationReason.LIVE_ACCEPTANCE
    if note.startswith("adapter ") and note.endswith(" was rolled back"):
        return ActivationReason.ROLLBACK
    return _REASONS.get(note, ActivationReason.OTHER)


def run_trigger_v1(cause: str) -> RunTrigger:
    """The code of a sentence that version 1 wrote as the trigger of a run."""
    if cause.startswith("import "):
        return RunTrigger.IMPORT
    if cause.startswith("second look at "):
        return RunTrigger.REEVALUATION
    if cause[:1].isdecimal() and cause.endswith(" failures"):
        return RunTrigger.FAILURES
    return _TRIGGERS.get(cause, RunTrigger.OTHER)
