"""Progress of long work on stderr: a bar on a terminal, a line now and then elsewhere. One reporter
for all commands.
"""

import math
import sys
import time
from typing import TYPE_CHECKING

import click

from specl.shared.runtime.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as ProgressBar
    from rich.progress import TaskID

LINE_EVERY_S = 20.0  # where stderr is no terminal


class ProgressReporter:
    """`with ProgressReporter() as report: work(report)`; `report(progress)` shows a `Progress`. A
    new stage begins a new line.
    """

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None
        self._task: TaskID | None = None
        self._stage: str | None = None
        self._printed_at = 0.0

    def __enter__(self) -> "ProgressReporter":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as ProgressBar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[details]}", markup=False),
            )
            # lines printed meanwhile go above the bar, but never from a stdout that is a file to
            # stderr
            self._bar = ProgressBar(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty())
            self._bar.start()
        return self

    def __call__(self, progress: Progress) -> None:
        """Show how far the work is."""
        is_new_stage, self._stage = progress.stage != self._stage, progress.stage
        if self._bar is None:
            self._print(progress, is_new_stage)
            return
        if is_new_stage or self._task is None:
            self._task = self._bar.add_task(progress.stage, total=progress.total, details="")
        self._bar.update(self._task, completed=progress.done, total=progress.total, details=_details(progress))

    def _print(self, progress: Progress, is_new_stage: bool) -> None:
        is_due = time.monotonic() - self._printed_at >= LINE_EVERY_S
        if is_new_stage or is_due or progress.done == progress.total:
            self._printed_at = time.monotonic()
            stage = f"{progress.stage}: " if progress.stage else ""
            click.echo(f"{stage}{progress.done} of {progress.total}, {_details(progress)}", err=True)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _details(progress: Progress) -> str:
    """Time left and note."""
    left = "" if math.isinf(progress.left_s) else f"{progress.left_s / 60:.1f} min left"
    return ", ".join(part for part in (left, progress.note) if part)
