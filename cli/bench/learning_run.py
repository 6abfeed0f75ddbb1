"""Runs a measurement of `bench learning` and reports it: prints lines, writes learning.json and
learning.png, cleans up.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from specl.cli.progress import ProgressReporter
from specl.cli.version import lines as version_lines
from specl.shared.bench.learning_bench import GainBench, StreamBench
from specl.shared.errors import SpecLoraError

Lines = Callable[[dict[str, Any]], Iterator[str]]  # a report for a person


class LearningRun:
    """One invocation. `options` are those of the command line, which the report quotes."""

    def __init__(
        self,
        bench: StreamBench | GainBench,
        reporter: ProgressReporter,
        out: Path,
        console: Console,
        options: dict[str, Any],
    ) -> None:
        self.bench, self.out, self.console, self.options = bench, out, console, options
        self._reporter = reporter
        self._cut_short = ""

    def run(self, lines: Lines, *, keep: bool, as_object: bool, with_plot: bool = False) -> None:
        """Measure, report, clean up. What was measured before a failure or Ctrl-C is reported too."""
        failure: BaseException | None = None
        # a time limit from outside is no reason to lose what was measured either
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            try:
                with self._reporter:
                    self.bench.measure()
                    self.bench.score()
            except (KeyboardInterrupt, SpecLoraError) as error:
                failure, self._cut_short = error, str(error) or "stopped by hand"
            if self.bench.has_rows():
                self._report(lines, as_object, with_plot)
        finally:
            if keep:
                self.console.print(f"kept: {self.bench.folder}")
            else:
                shutil.rmtree(self.bench.folder, ignore_errors=True)
        if failure is not None:
            raise failure
        if problem := self.bench.problem():
            raise SpecLoraError(problem)

    def _report(self, lines: Lines, as_object: bool, with_plot: bool) -> None:
        report = self.bench.report()
        for line in lines(report):
            self.console.print(line)
        self._write(report, as_object)
        if with_plot and isinstance(self.bench, StreamBench):
            from specl.shared.bench.curves import draw_stream

            file = self.out / "learning.png"
            draw_stream(self.bench.passes, self.bench.shift_at, file)
            self.console.print(f"drawn: {file}")

    def _write(self, report: dict[str, Any], as_object: bool) -> None:
        """learning.json, and the report on standard output where that was asked for."""
        bench = self.bench
        values = {
            "made_with": version_lines(),
            "cores": os.cpu_count(),
            "models": bench.settings.models.model_dump(mode="json"),
            "training": bench.small_settings.training.model_dump(mode="json"),
            "options": self.options,
            "cut_short": self._cut_short,
            "report": report,
        }
        file = self.out / "learning.json"
        try:
            file.write_text(json.dumps(values | {"passes": bench.rows_as_json()}, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise SpecLoraError(f"cannot write {file}: {error.strerror}") from error
        self.console.print(f"written: {file}")
        if as_object:
            click.echo(json.dumps(values))
