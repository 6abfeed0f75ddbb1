"""`specl-ctl bench learning`: does live traffic make it faster? A stream through real daemons, learning on and off.

Scratch run directories only; the user's store and adapters are not touched. Measured calibrations (costs, the regression
slice, states of the texts to replay) are taken over from the user's run directory where they are, and from one pass to the
next: both sides choose their draft lengths by the same costs.
"""

import json
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from specl.cli.progress import ProgressReporter
from specl.cli.version import lines as versions
from specl.shared.errors import ConfigError, SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.paths import Paths, find_paths
from specl.shared.prompts import reserved
from specl.shared.settings.load import load_settings
from specl.shared.settings.schema import Settings

if TYPE_CHECKING:
    from specl.shared.bench.stream import Pass, StreamRow

STREAM_REQUESTS, GAIN_REQUESTS = 200, 100
STREAM_MINUTES, GAIN_MINUTES = 1.5, 5.0
STREAM_HELD_OUT = 0.3  # at least: a short stream has few conversations to judge by
RUNS = 5  # training runs that a stream has room for, unless --trigger says otherwise
TAKEN_OVER = ("costs", "regression")
WAIT_FACTOR, WAIT_S = 6, 1800  # a run waits for others, and makes the regression slice first


class _Kinds(click.ParamType):
    """Reserved kinds with commas between."""

    name = "KIND,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        kinds = tuple(part.strip() for part in value.split(",") if part.strip())
        if unknown := [kind for kind in kinds if kind not in reserved.KINDS]:
            self.fail(f"there is no kind {unknown[0]!r}; known: {', '.join(reserved.KINDS)}", param, ctx)
        if not kinds or len(set(kinds)) < len(kinds):
            self.fail("name at least one kind, and each once", param, ctx)
        return kinds


@click.command()
@click.option("--kinds", type=_Kinds(), help=f"Kinds of request, of {', '.join(reserved.KINDS)}.  [default: the first]")
@click.option(
    "--requests",
    type=click.IntRange(8, 5000),
    help=f"Requests of a pass; with --gain: generations collected.  [default: {STREAM_REQUESTS}; {GAIN_REQUESTS}]",
)
@click.option(
    "--gap", type=click.FloatRange(0.1, 600), default=1.0, show_default=True, help="Seconds between requests."
)
@click.option("--tokens", type=click.IntRange(8), default=64, show_default=True, help="Most tokens of an answer.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="End a pass after so many, done or not.")
@click.option(
    "--train-minutes",
    type=click.FloatRange(0, min_open=True),
    help=f"Most minutes that a training run computes.  [default: {STREAM_MINUTES}; with --gain {GAIN_MINUTES}]",
)
@click.option("--trigger", type=click.IntRange(8), help="Failures that start a run.  [default: a fifth of --requests]")
@click.option("--shift", is_flag=True, help="Change from the first kind to the others half-way.")
@click.option("--ngram", is_flag=True, help="A second pair of passes with n-gram drafting on.")
@click.option("--no-off", is_flag=True, help="Leave out the passes without learning.")
@click.option("--gain", is_flag=True, help="Instead of a stream: unseen prompts before and after one training run.")
@click.option("--unseen", type=click.IntRange(2), default=40, show_default=True, help="With --gain: how many of them.")
@click.option(
    "--plain-every",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Measure plain decoding beside every n-th.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    default="bench-learning",
    show_default=True,
    help="Folder for learning.json and learning.png.",
)
@click.option("--no-plot", is_flag=True, help="No picture (it needs matplotlib).")
@click.option("--json", "as_object", is_flag=True, help="Print the report as one JSON object; the rest goes to stderr.")
@click.option("--keep", is_flag=True, help="Keep the scratch run directories to look into.")
def learning(**wish: Any) -> None:
    """Does live traffic make it faster? The same stream with learning on and off, through daemons of its own.

    \b
    specl-ctl bench learning --requests 300
    specl-ctl bench learning --shift --kinds record-to-json,sql-from-a-sentence --requests 400
    specl-ctl bench learning --gain --kinds sql-from-a-sentence

    Kinds are those that no draft was trained on; answers are greedy, so that the words are the same. Training starts by
    itself, as often as failures allow, and works in the gaps; the gate decides. Written to --out: every request, and
    acceptance, agreement and speed over time. Ctrl-C keeps what was measured. Close other programs first.
    """
    _check(wish)
    out = Path(wish["out"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror}", "--out names a folder") from error
    if not wish["no_plot"] and not wish["gain"]:
        from specl.shared.bench.plot import require_matplotlib

        require_matplotlib()
    from specl.cli.bench.gain import Gain

    (Gain if wish["gain"] else _Streams)(wish, out).run()


def _check(wish: dict[str, Any]) -> None:
    """Defaults, and wishes that contradict each other. Raises ConfigError."""
    kinds = wish["kinds"] = wish["kinds"] or (reserved.KINDS[:2] if wish["shift"] else reserved.KINDS[:1])
    if wish["shift"] and len(kinds) < 2:
        raise ConfigError("--shift needs two kinds to change between", "--kinds record-to-json,sql-from-a-sentence")
    if wish["gain"] and (extra := [name for name in ("shift", "ngram", "no_off", "minutes", "trigger") if wish[name]]):
        raise ConfigError(f"--{extra[0].replace('_', '-')} is about a stream, and --gain sends none")
    wish["requests"] = wish["requests"] or (GAIN_REQUESTS if wish["gain"] else STREAM_REQUESTS)
    wish["train_minutes"] = wish["train_minutes"] or (GAIN_MINUTES if wish["gain"] else STREAM_MINUTES)
    wish["trigger"] = wish["trigger"] or max(8, wish["requests"] // RUNS)


class Learning:
    """What both measurements share: scratch daemons, agreement afterwards, one report."""

    def __init__(self, wish: dict[str, Any], out: Path) -> None:
        from specl.shared.bench.scratch_daemons import scratch_folder

        self.wish, self.out = wish, out
        self.settings, self.own = load_settings(), find_paths()
        if self.settings.models.draft.name is None:
            raise ConfigError("there is no draft to train", "set models.draft.name")
        # a report on standard output stands alone there
        self.console = Console(stderr=wish["as_object"], highlight=False, markup=False, soft_wrap=True)
        self.folder = scratch_folder()
        self.calibrated = self.own.root
        self.cut = ""

    def run(self) -> None:
        """Measure, report, clean up; what was measured before a failure or Ctrl-C is reported too."""
        trouble: BaseException | None = None
        signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # a time limit from outside is no reason to lose it either
        try:
            try:
                self.measure()
                self.score()
            except (KeyboardInterrupt, SpecLoraError) as error:
                trouble, self.cut = error, str(error) or "stopped by hand"
            if self.has_rows():
                self.tell()
        finally:
            if self.wish["keep"]:
                self.console.print(f"kept: {self.folder}")
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
        if trouble is not None:
            raise trouble

    def measure(self) -> None:
        """Run the daemons and ask."""
        raise NotImplementedError

    def score(self) -> None:
        """Fill in agreement."""
        raise NotImplementedError

    def has_rows(self) -> bool:
        """Whether there is anything to report."""
        raise NotImplementedError

    def tell(self) -> None:
        """Write and print."""
        raise NotImplementedError

    @contextmanager
    def daemons(self, name: str, settings: Settings) -> Iterator[Client]:
        """Three daemons in a run directory `name`, with the calibrations known so far; it stays until the end."""
        from specl.shared.bench.scratch_daemons import scratch_daemons

        folder = self.folder / name
        folder.mkdir()
        for part in TAKEN_OVER:
            if (self.calibrated / part).is_dir():
                shutil.copytree(self.calibrated / part, folder / part)
        (folder / "training").mkdir(parents=True, exist_ok=True)
        for part in (self.calibrated / "training").glob("replay-*.npz"):
            shutil.copy(part, folder / "training")
        with scratch_daemons(settings, self.own.models, folder=folder) as client:
            self.calibrated = folder
            yield client

    def teacher(self, parts: "Sequence[tuple[str, list[StreamRow]]]") -> None:
        """Agreement of rows, each with the run directory whose adapters drafted them."""
        from specl.shared.adapters.registry import Adapters
        from specl.shared.bench.rescore import Teacher
        from specl.shared.loading.engine import load_engine
        from specl.shared.models import blas  # noqa: F401 - binds the BLAS before mlx loads

        self.console.print("agreement, teacher-forced")
        teacher = Teacher(load_engine(self.settings, self.own.models))
        missing = 0
        for name, rows in parts:
            adapters = Adapters(Paths(self.folder / name, self.own.models).adapters)
            with ProgressReporter() as report_progress:
                missing += teacher.score(rows, adapters, report_progress)
        if missing:
            self.console.print(f"{missing} answers have no agreement: their adapters were pruned meanwhile")

    def write(self, passes: dict[str, Any], report: dict[str, Any], settings: Settings) -> None:
        """learning.json, and the report on standard output where that was asked for."""
        whole = {
            "made_with": versions(),
            "cores": os.cpu_count(),
            "models": self.settings.models.model_dump(mode="json"),
            "training": settings.training.model_dump(mode="json"),
            "options": {name: value for name, value in self.wish.items() if name not in ("as_object", "keep")},
            "cut_short": self.cut,
            "report": report,
        }
        file = self.out / "learning.json"
        try:
            file.write_text(json.dumps(whole | {"passes": passes}, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise SpecLoraError(f"cannot write {file}: {error.strerror}") from error
        self.console.print(f"written: {file}")
        if self.wish["as_object"]:
            click.echo(json.dumps(whole))


class _Streams(Learning):
    """One stream, two or four passes."""

    def __init__(self, wish: dict[str, Any], out: Path) -> None:
        super().__init__(wish, out)
        self.columns = ("n-gram off", "n-gram on") if wish["ngram"] else ("n-gram off",)
        self.sides = ("on",) if wish["no_off"] else ("on", "off")
        self.passes: dict[str, dict[str, Pass]] = {column: {} for column in self.columns}

    def _settings(self, column: str, side: str) -> Settings:
        from specl.shared.bench.stream import scaled

        wish = self.wish
        share = max(self.settings.training.heldout_share, STREAM_HELD_OUT)
        is_on = {"learning": side == "on", "ngram": column == "n-gram on"}
        return scaled(self.settings, wish["trigger"], share, wish["train_minutes"], wish["gap"], **is_on)

    def measure(self) -> None:
        """See Learning. A pass without learning answers what the one with it had time for."""
        from specl.shared.bench.stream import Pace, Pass, items, stream

        wish = self.wish
        pace = Pace(wish["gap"], wish["tokens"], wish["plain_every"], wish["minutes"])
        for column in self.columns:
            wanted = items(wish["kinds"], wish["requests"], wish["shift"])
            for side in self.sides:
                self.console.print(f"{column}, learning {side}: {len(wanted)} requests")
                found = self.passes[column][side] = Pass()
                daemons = self.daemons(self._name(column, side), self._settings(column, side))
                with daemons as client, ProgressReporter() as report_progress:
                    stream(client, wanted, pace, found, report_progress)
                wanted = wanted[: len(found.rows)]

    def _name(self, column: str, side: str) -> str:
        return f"{self.columns.index(column)}-{side}"

    def score(self) -> None:
        """See Learning."""
        parts = [(self._name(c, side), part.rows) for c, sides in self.passes.items() for side, part in sides.items()]
        self.teacher(parts)

    def has_rows(self) -> bool:
        """See Learning."""
        return any(part.rows for sides in self.passes.values() for part in sides.values())

    def tell(self) -> None:
        """See Learning."""
        from specl.shared.bench.learning_report import report

        shift_at = self.wish["requests"] // 2 if self.wish["shift"] else None
        found = {
            column: report(sides["on"], sides.get("off"), shift_at)
            for column, sides in self.passes.items()
            if "on" in sides and sides["on"].rows
        }
        for column, row in found.items():
            for line in stream_lines(column, row):
                self.console.print(line)
        passes = {column: {side: asdict(part) for side, part in sides.items()} for column, sides in self.passes.items()}
        self.write(passes, found, self._settings(self.columns[0], "on"))
        if not self.wish["no_plot"]:
            from specl.shared.bench.curves import draw_stream

            file = self.out / "learning.png"
            draw_stream(self.passes, shift_at, file)
            self.console.print(f"drawn: {file}")


# ------------------------------------------------------------------------------------------------ words
FIGURES = (
    ("tokens a second", "tokens_per_second", "speed", "{:.1f}"),
    ("against plain decoding", "speed_to_plain", "speed_to_plain", "{:.2f}x"),
    ("agreement", "agreement", "agreement", "{:.3f}"),
    ("acceptance", "acceptance", "acceptance", "{:.3f}"),
    ("tokens a round", "tokens_a_round", "", "{:.2f}"),
)


def stream_lines(column: str, row: dict[str, Any]) -> Iterator[str]:
    """A stream's report for a person."""
    for name, window in row["windows"].items():
        start, stop = window["requests"]
        if start == stop:
            continue
        yield f"{f'{column}, {name} ({start} to {stop - 1})':44}" + cells("on", "off", "on / off, on - off (95%)")
        changes = window.get("on_against_off", {})
        for label, figure, change, form in FIGURES:
            sides = [one(window.get(side, {}).get(figure), form) for side in ("on", "off")]
            yield f"  {label:42}" + cells(*sides, spread(changes.get(change), change))
    if row["words"]:
        yield f"texts that differ between on and off: {row['words']['different']} of {row['words']['compared']}"
    for item in row["adapters"]:
        yield f"adapter {item['adapter'] or 'none'}: from request {item['from_request']}, {item['requests']} requests"
    for event in row["training"]:
        yield f"training run, by request {event['n']}: {event['verdict']}: {event['reason']}"


def cells(first: str, second: str, third: str) -> str:
    """Three columns behind a label."""
    return f"{first:>9}{second:>9}  {third}"


def one(value: float | None, form: str) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else form.format(value)


def spread(change: dict[str, Any] | None, name: str) -> str:
    """An estimate with its interval; speeds are ratios, the rest differences."""
    if not change or change["value"] is None:
        return ""
    form = "{:.2f}x ({:.2f} to {:.2f})" if name.startswith("speed") else "{:+.3f} ({:+.3f} to {:+.3f})"
    return form.format(change["value"], change["low"], change["high"])
