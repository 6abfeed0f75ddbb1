"""What a user's request to train leads to: a refusal, a run, or leave for the run under way. Pure:
the trainer's state in, a decision with its sentence out.
"""

from dataclasses import dataclass
from enum import Enum


class TrainAction(Enum):
    """What the trainer is to do."""

    REFUSE = "refuse"
    QUEUE_RUN = "queue_run"
    OVERRIDE_RUNNING = "override_running"  # the run under way goes on whatever the machine's state


@dataclass(frozen=True, slots=True)
class TrainState:
    """The trainer at the moment of the request."""

    keeps_texts: bool  # `records.keep` is not `statistics`
    record_problem: str | None  # why the last run's outcome could not be recorded; None where it was
    is_running: bool  # a run is under way and will not be abandoned
    has_begun: bool  # its work has begun
    progress: str
    is_queued: bool  # a run that a user asked for waits behind other work
    reason_to_wait: str  # why the machine should not be loaded now; empty for none
    pending_failures: int
    min_failures: int


@dataclass(frozen=True, slots=True)
class TrainDecision:
    """The action and the sentence for the user."""

    action: TrainAction
    text: str


def decide_train(state: TrainState, now: bool) -> TrainDecision:
    """The decision about a request to train; `now`: on what there is, and whatever the machine's
    state.
    """
    if refusal := _refusal(state, now):
        return TrainDecision(TrainAction.REFUSE, refusal)
    reason = state.reason_to_wait
    if state.is_running:
        text = f"{reason}; the run under way goes on all the same ({state.progress})"
        return TrainDecision(TrainAction.OVERRIDE_RUNNING, text)
    text = "the run starts as soon as inference is idle"
    if reason:
        waits = f"training waits: {reason} (--now trains all the same)"
        text += f"; {reason}, trains all the same" if now else f"; {waits}"
    return TrainDecision(TrainAction.QUEUE_RUN, text)


def _refusal(state: TrainState, now: bool) -> str:
    """Why nothing is to be done; empty where something is."""
    if not state.keeps_texts:
        return "records.keep is statistics: no text is kept, so there is nothing to learn from"
    if state.record_problem is not None:
        return f"the last run's outcome could not be recorded: {state.record_problem}"
    if state.is_running and now and state.reason_to_wait:
        return ""
    if state.is_running and state.has_begun:
        return f"a run is under way ({state.progress})"
    if state.is_queued or state.is_running:
        return "a run waits already: it starts as soon as inference is idle"
    if not now and state.pending_failures < state.min_failures:
        return f"{state.pending_failures} of {state.min_failures} failures are there; --now trains on what there is"
    return ""
