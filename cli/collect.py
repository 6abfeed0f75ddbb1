"""`specl-ctl collect`: sends a file of prompts through the running daemons, so that there is
something to learn from.

The answers are recorded like all others. With `--output` each is also a line of a file, and
`--resume` continues that file, whatever stopped the run before. Knows the client and files; the
daemons do the rest.
"""

import json
import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import click

from specl.cli.files.prompts import FilePrompt, read_prompts
from specl.cli.options import sampling_options
from specl.cli.progress import ProgressReporter
from specl.cli.terminal import echo
from specl.shared.answer_stats import AnswerTotals
from specl.shared.errors import ConfigError, DaemonUnreachable, RequestRejected, ServerBusy, SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.messaging.messages import Done
from specl.shared.runtime.atomic_files import private_opener
from specl.shared.runtime.progress import ProgressMeter

RESTART_TIMEOUT_S = 60.0  # how long a daemon that answered before may be away
RESTART_POLL_S = 1.0
BUSY_POLL_S = 0.5


@dataclass(slots=True)
class Counts:
    """What the run has done so far."""

    totals: AnswerTotals = field(default_factory=AnswerTotals)
    refused: int = 0
    unrecorded: int = 0

    def add(self, done: Done) -> None:
        """Count one answer."""
        self.totals.add(done.tokens, done.stats)
        self.unrecorded += not done.recorded

    def line(self) -> str:
        """Acceptance and speed, for people."""
        acceptance = self.totals.acceptance
        rate = "-" if acceptance is None else f"{acceptance:.3f}"
        return f"acceptance {rate}, {self.totals.tokens_per_second:.1f} tok/s"

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        totals = self.totals
        return {
            "answers": totals.answers,
            "refused": self.refused,
            "unrecorded": self.unrecorded,
            "tokens": totals.tokens,
            "drafted": totals.drafted,
            "accepted": totals.accepted,
            "acceptance": totals.acceptance,
            "tokens_per_second": round(totals.tokens_per_second, 2),
        }


@click.command()
@click.argument("file", type=click.Path(allow_dash=True))
@click.option("--limit", type=click.IntRange(1), help="The most prompts to send, from the first on.")
@click.option(
    "--column", help="The column (CSV) or key (JSON) that holds the prompt.  [default: prompt, text, question, ...]"
)
@sampling_options("temperature", "max-tokens", "seed")
@click.option("--system", help="A system message before every prompt.")
@click.option("--output", type=click.Path(dir_okay=False), help="Also write the answers here, one JSON object a line.")
@click.option("--resume", is_flag=True, help="Continue --output: the prompts that it holds are not sent again.")
@click.option("--json", "as_object", is_flag=True, help="One JSON object at the end.")
def collect(
    file: str, limit: int | None, column: str | None, output: str | None, resume: bool, as_object: bool, **options: Any
) -> None:
    """Answer every prompt of FILE: text (one a line), .jsonl, .json (a list) or .csv; `-` reads
    lines from stdin.

    \b
    specl-ctl collect prompts.txt --limit 100
    specl-ctl collect tickets.csv --column subject --output answers.jsonl
    specl-ctl collect tickets.csv --column subject --output answers.jsonl --resume

    A JSON line is a string, or has `messages` (as chat models take them) or `prompt` and perhaps
    `system`.
    """
    if resume and not output:
        raise click.UsageError("--resume needs the --output file to continue")
    prompts = read_prompts(file, column, limit)
    with AnswersFile(output, resume) as answers, Client() as client:
        missing = [prompt for prompt in prompts if prompt.key not in answers.done]
        if len(missing) < len(prompts):
            click.echo(f"{len(prompts) - len(missing)} of {len(prompts)} are answered already", err=True)
        run = _Run(client, options, answers)
        try:
            run.answer_all(missing)
        except KeyboardInterrupt:
            hint = "; the same command with --resume continues" if output else ""
            answered = run.counts.totals.answers
            click.echo(f"stopped after {answered} of {len(missing)}: {run.counts.line()}{hint}", err=True)
            raise click.Abort from None
    _report(run.counts, as_object)


def _report(counts: Counts, as_object: bool) -> None:
    if as_object:
        click.echo(json.dumps(counts.as_json()))
    else:
        click.echo(f"{counts.totals.answers} prompts answered, {counts.totals.tokens} tokens, {counts.line()}")
    if counts.unrecorded:
        click.echo(f"{counts.unrecorded} answers were not recorded; `specl-ctl status` says why", err=True)
    if counts.refused:
        raise SpecLoraError(f"{counts.refused} prompts were refused")


class _Run:
    """Sends prompts one after the other and counts what comes back."""

    def __init__(self, client: Client, options: dict[str, Any], answers: "AnswersFile") -> None:
        self.client, self.options, self.answers = client, options, answers
        self.counts = Counts()

    def answer_all(self, prompts: list[FilePrompt]) -> None:
        """Send all prompts. Refusals are reported and counted; raises DaemonUnreachable if the
        daemon stays away.
        """
        with ProgressReporter() as report:
            meter = ProgressMeter("", len(prompts), report)
            for prompt in prompts:
                try:
                    done = self._ask_with_retries(prompt)
                except RequestRejected as error:
                    self.counts.refused += 1
                    echo(f"prompt {prompt.line}: {error}", err=True)
                else:
                    self.counts.add(done)
                    self.answers.write(prompt, done)
                meter.advance(note=self.counts.line())

    def _ask_with_retries(self, prompt: FilePrompt) -> Done:
        """Ask again while the server is busy, and for RESTART_TIMEOUT_S while a daemon that has
        answered before is away.
        """
        end = time.monotonic() + RESTART_TIMEOUT_S
        while True:
            try:
                return self.client.ask(prompt.messages, **self.options)
            except ServerBusy:
                time.sleep(BUSY_POLL_S)
            except DaemonUnreachable:
                if not self.counts.totals.answers or time.monotonic() > end:
                    raise
                self.client.close()
                time.sleep(RESTART_POLL_S)


class AnswersFile:
    """Answers as JSON lines; each is in the file before the next prompt is sent. `done`: keys of
    the prompts it held at first.
    """

    def __init__(self, path: str | None, resume: bool) -> None:
        """Open the file, or none without a path. Raises ConfigError for a file that exists, unless
        `resume`.
        """
        self.path = Path(path) if path else None
        self.done: set[str] = set()
        self._file: IO[str] | None = None
        if self.path is None:
            return
        if self.path.exists() and not resume:
            raise ConfigError(f"{self.path} exists", "--resume continues it; or name another file")
        try:
            if self.path.exists():
                self._read(self.path)
            self._file = open(self.path, "a", encoding="utf-8", opener=private_opener)  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror}") from error

    def _read(self, path: Path) -> None:
        """Read which prompts are answered, and cut off an incomplete last line. Raises ConfigError
        for another kind of file.
        """
        data = path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                self.done.add(json.loads(line)["prompt_key"])
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{path}:{number} was not written by `collect`, so it is left alone") from None
        if len(complete) < len(data):
            os.truncate(path, len(complete))

    def write(self, prompt: FilePrompt, done: Done) -> None:
        """Append an answer, with the fields that `store import` and `--resume` read."""
        if self._file is None:
            return
        row = {
            "id": done.generation_id,
            "prompt": prompt.messages[-1]["content"],
            "target_output": done.text,
            "acceptance_rate": done.stats.acceptance_rate,
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "tokens": done.tokens,
            "tokens_per_second": done.stats.tokens_per_second,
            "adapter_id": done.adapter_id,
            "line": prompt.line,
            "prompt_key": prompt.key,
        }
        try:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise SpecLoraError(
                f"{self.path} cannot be written: {error.strerror}", "--resume continues later"
            ) from error

    def __enter__(self) -> "AnswersFile":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
