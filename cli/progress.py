"""How a long measurement says how far it is."""

import sys
import time

import click

from specl.shared.bench.progress import Progress


class Teller:
    """Progress on stderr: a line that changes on a terminal, a line every 20 s elsewhere."""

    def __init__(self) -> None:
        self._terminal, self._said = sys.stderr.isatty(), 0.0

    def __call__(self, progress: Progress) -> None:
        """Say it, if it is time to."""
        if time.monotonic() - self._said < (0.3 if self._terminal else 20.0) and progress.done < progress.total:
            return
        self._said = time.monotonic()
        line = f"{progress.done} of {progress.total} answers, {progress.left_s / 60:.1f} min left, {progress.note}"
        click.echo(f"\r\033[K{line}" if self._terminal else line, err=True, nl=not self._terminal)
        if self._terminal and progress.done == progress.total:
            click.echo(err=True)
