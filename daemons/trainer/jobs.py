"""What the trainer's MLX thread is given to do, by name: nothing of how."""

from specl.daemons.trainer.adapter_evaluation import Trial
from specl.daemons.trainer.reevaluation import SecondLook

Job = str | Trial | SecondLook  # a run's name is what triggered it
RUN, IMPORT, LOOK = "run", "import", "second look"
BY_HAND = "by hand"
STOP = "stop"  # the last one
NOW = "by hand, now"  # also while the machine objects


def kind_of_work(job: Job) -> str:
    """`score`, `regression`, `import`, `second look`, or a training run, whatever triggered it."""
    match job:
        case Trial():
            return IMPORT
        case SecondLook():
            return LOOK
        case "score" | "regression":
            return job
        case _:
            return RUN
