"""What the trainer's MLX thread is given to do, by name: nothing of how."""

from specl.daemons.trainer.trial import Trial

Job = str | Trial  # a run's name is what triggered it
RUN, IMPORT = "run", "import"
BY_HAND = "by hand"
NOW = "by hand, now"  # also while the machine objects


def kind_of_work(job: Job) -> str:
    """`score`, `regression`, `import`, or a training run, whatever triggered it."""
    if isinstance(job, Trial):
        return IMPORT
    return job if job in ("score", "regression") else RUN
