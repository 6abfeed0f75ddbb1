"""What the trainer's MLX thread is given to do, by name: nothing of how."""

from specl.daemons.trainer.adapter_evaluation import AdapterEvaluation
from specl.daemons.trainer.reevaluation import Reevaluation
from specl.shared.messaging.codes import RunTrigger

Job = str | AdapterEvaluation | Reevaluation  # a run's name is what triggered it
RUN, IMPORT, LOOK = "run", "import", "second look"
BY_HAND = "by hand"
STOP = "stop"  # the last one
NOW = "by hand, now"  # also while the machine objects


def trigger_of(job: str) -> RunTrigger:
    """What set off a training run of this name."""
    return {BY_HAND: RunTrigger.BY_HAND, NOW: RunTrigger.BY_HAND_NOW}.get(job, RunTrigger.FAILURES)


def kind_of_work(job: Job) -> str:
    """`score`, `regression`, `import`, `second look`, or a training run, whatever triggered it."""
    match job:
        case AdapterEvaluation():
            return IMPORT
        case Reevaluation():
            return LOOK
        case "score" | "regression":
            return job
        case _:
            return RUN
