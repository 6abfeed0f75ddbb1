"""What the trainer's MLX thread is given to do, by name: nothing of how."""

from specl.daemons.trainer.adapter_evaluation import AdapterEvaluation
from specl.daemons.trainer.reevaluation import Reevaluation

Job = str | AdapterEvaluation | Reevaluation  # a run's name is what triggered it
RUN, IMPORT, LOOK = "run", "import", "second look"
BY_HAND = "by hand"
STOP = "stop"  # the last one
NOW = "by hand, now"  # also while the machine objects


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
