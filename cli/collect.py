"""`specl-ctl collect`: a file of prompts through the running daemons, so that there is something to learn from.

The answers are recorded like all others. With `--output` each is also a line of a file, and `--resume` goes on where that
file ends, whatever ended it.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import click

from specl.cli.files.prompts import FilePrompt, read_prompts
from specl.cli.options import sampling_options
from specl.shared.errors import ConfigError, DaemonUnreachable, RequestRejected, ServerBusy, SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.messaging.messages import Done

PATIENCE_S = 60.0  # for a daemon that is being restarted
BUSY_S = 0.5
TELL_S = 20.0  # between lines where nobody watches


@dataclass(slots=True)
class Tally:
    """What came so far. Acceptance is the model drafter's alone."""

    answers: int = 0
    refused: int = 0
    unrecorded: int = 0
    tokens: int = 0
    decode_s: float = 0.0
    drafted: int = 0
    accepted: int = 0

    def add(self, done: Done) -> None:
        """Count one answer."""
        stats = done.stats
        self.answers += 1
        self.tokens += done.tokens
        self.decode_s += done.tokens / stats.tokens_per_second if stats.tokens_per_second else 0.0
        self.drafted += stats.model_drafted
        self.accepted += stats.model_accepted
        self.unrecorded += not done.recorded

    @property
    def acceptance(self) -> float | None:
        """Of everything drafted so far."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def speed(self) -> float:
        """Tokens a second of decoding."""
        return self.tokens / self.decode_s if self.decode_s else 0.0

    def line(self) -> str:
        """For a person."""
        share = "-" if self.acceptance is None else f"{self.acceptance:.3f}"
        return f"acceptance {share}, {self.speed:.1f} tok/s"


@click.command()
@click.argument("file", type=click.Path(allow_dash=True))
@click.option("--limit", type=click.IntRange(1), help="Only the first so many prompts.")
@click.option(
    "--column", help="The column (CSV) or key (JSON) that holds the prompt.  [default: prompt, text, question, ...]"
)
@sampling_options("temperature", "max-tokens", "seed")
@click.option("--system", help="A system message before every prompt.")
@click.option("--output", type=click.Path(dir_okay=False), help="Also write the answers here, one JSON object a line.")
@click.option("--resume", is_flag=True, help="Go on with --output: what it holds is not asked again.")
@click.option("--json", "as_object", is_flag=True, help="One JSON object at the end.")
def collect(
    file: str, limit: int | None, column: str | None, output: str | None, resume: bool, as_object: bool, **wish: Any
) -> None:
    """Answer every prompt of FILE: text (one a line), .jsonl, .json (a list) or .csv; `-` reads lines from stdin.

    \b
    specl-ctl collect prompts.txt --limit 100
    specl-ctl collect tickets.csv --column subject --output answers.jsonl
    specl-ctl collect tickets.csv --column subject --output answers.jsonl --resume

    A JSON line is a string, or has `messages` (as chat models take them) or `prompt` and perhaps `system`.
    """
    if resume and not output:
        raise click.UsageError("--resume needs the --output file to go on with")
    prompts = read_prompts(file, column, limit)
    with _Output(output, resume) as kept, Client() as client:
        todo = [item for item in prompts if item.key not in kept.done]
        if len(todo) < len(prompts):
            click.echo(f"{len(prompts) - len(todo)} of {len(prompts)} are answered already", err=True)
        run = _Run(client, wish, kept)
        try:
            run.all(todo)
        except KeyboardInterrupt:
            hint = "; the same command with --resume goes on" if output else ""
            click.echo(f"stopped after {run.tally.answers} of {len(todo)}: {run.tally.line()}{hint}", err=True)
            raise click.Abort from None
    _report(run.tally, as_object)


def _report(tally: Tally, as_object: bool) -> None:
    if as_object:
        names = ("answers", "refused", "unrecorded", "tokens", "drafted", "accepted")
        found = {name: getattr(tally, name) for name in names}
        click.echo(json.dumps(found | {"acceptance": tally.acceptance, "tokens_per_second": round(tally.speed, 2)}))
    else:
        click.echo(f"{tally.answers} prompts answered, {tally.tokens} tokens, {tally.line()}")
    if tally.unrecorded:
        click.echo(f"{tally.unrecorded} answers were not recorded; `specl-ctl status` says why", err=True)
    if tally.refused:
        raise SpecLoraError(f"{tally.refused} prompts were refused")


class _Run:
    """The prompts, one after the other."""

    def __init__(self, client: Client, wish: dict[str, Any], output: "_Output") -> None:
        self.client, self.output = client, output
        self.wish = wish
        self.tally = Tally()

    def all(self, prompts: list[FilePrompt]) -> None:
        """Ask them all; refusals are told and counted. Raises DaemonUnreachable once patience ends."""
        with _Progress(len(prompts)) as tell:
            for item in prompts:
                try:
                    done = self._patiently(item)
                except RequestRejected as error:
                    self.tally.refused += 1
                    click.echo(f"prompt {item.line}: {error}", err=True)
                else:
                    self.tally.add(done)
                    self.output.write(item, done)
                tell(self.tally)

    def _patiently(self, item: FilePrompt) -> Done:
        """Ask again while the queue is full, or while a daemon that was there is away for a moment."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.client.ask(item.messages, **self.wish)
            except ServerBusy:
                pause = BUSY_S
            except DaemonUnreachable:
                if not self.tally.answers or time.monotonic() > end:
                    raise
                self.client.close()
                pause = 1.0
            time.sleep(pause)


class _Output:
    """Answers as JSON lines, each on disk before the next prompt is asked; `done` has the prompts that it held before."""

    def __init__(self, path: str | None, resume: bool) -> None:
        self.path = Path(path) if path else None
        self.done: set[str] = set()
        self._file: IO[str] | None = None
        if self.path is None:
            return
        if self.path.exists() and not resume:
            raise ConfigError(f"{self.path} exists", "--resume goes on with it; or name another file")
        try:
            if self.path.exists():
                self._read()
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror}") from error

    def _read(self) -> None:
        """The prompts answered; a last line that was cut off is taken away. Raises ConfigError for another kind of file."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.done.add(json.loads(line)["prompt_key"])
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{self.path}:{number} was not written by `collect`, so it is left alone") from None
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))

    def write(self, item: FilePrompt, done: Done) -> None:
        """One answer: what `store import` reads, and what `--resume` needs."""
        if self._file is None:
            return
        row = {
            "id": done.generation_id,
            "prompt": item.messages[-1]["content"],
            "target_output": done.text,
            "acceptance_rate": done.stats.acceptance_rate,
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "tokens": done.tokens,
            "tokens_per_second": done.stats.tokens_per_second,
            "adapter_id": done.adapter_id,
            "line": item.line,
            "prompt_key": item.key,
        }
        try:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise SpecLoraError(f"{self.path} cannot be written: {error.strerror}", "--resume goes on later") from error

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


# ---------------------------------------------------------------------------------------------------- progress
class _Progress:
    """`with _Progress(n) as tell`: a bar with time left on a terminal, a line now and then elsewhere; on stderr."""

    def __init__(self, total: int) -> None:
        self.total, self._bar, self._task = total, None, None
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Callable[[Tally], None]:
        if not sys.stderr.isatty():
            return self._line
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._bar.start()
        self._task = self._bar.add_task("", total=self.total, note="")
        return self._draw

    def _draw(self, tally: Tally) -> None:
        self._bar.update(self._task, completed=tally.answers + tally.refused, note=tally.line())

    def _line(self, tally: Tally) -> None:
        now, done = time.monotonic(), tally.answers + tally.refused
        if now - self._said < TELL_S:
            return
        self._said = now
        left = (now - self._started) / done * (self.total - done)
        click.echo(f"{done} of {self.total}, {left / 60:.1f} min left, {tally.line()}", err=True)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
