"""What the trainer's MLX thread is given to do, by name: nothing of how."""

from specl.daemons.trainer.trial import Trial

Job = str | Trial  # a run's name is what triggered it
RUN, IMPORT = "run", "import"
NOW = "by hand, now"  # a run that does not wait for the machine


def kind_of_work(job: Job) -> str:
    """`score`, `regression`, `import`, or a training run, whatever triggered it."""
    if isinstance(job, Trial):
        return IMPORT
    return job if job in ("score", "regression") else RUN


def is_insisted_on(job: Job) -> bool:
    """Whether somebody waits for it, so that it does not wait for mains power or for the machine to cool."""
    return job == NOW or isinstance(job, Trial)
