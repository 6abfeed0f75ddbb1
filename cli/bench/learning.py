"""`specl-ctl bench learning`: does live traffic make it faster? The command's options, and which
measurement they ask for.
"""

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from specl.cli.progress import ProgressReporter
from specl.shared.errors import ConfigError
from specl.shared.paths import find_paths
from specl.shared.prompts import reserved
from specl.shared.settings.load import load_settings

STREAM_REQUESTS, GAIN_REQUESTS = 200, 100
STREAM_MINUTES, GAIN_MINUTES = 1.5, 5.0
RUNS = 5  # training runs that a stream has room for, unless --trigger says otherwise


class _Kinds(click.ParamType):  # type: ignore[type-arg]  # click 8.2 cannot subscript it
    """Reserved kinds separated by commas."""

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
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), help="End a pass after this many minutes, done or not."
)
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
def learning(**options: Any) -> None:
    """Does live traffic make it faster? The same stream with learning on and off, through daemons of its own.

    \b
    specl-ctl bench learning --requests 300
    specl-ctl bench learning --shift --kinds record-to-json,sql-from-a-sentence --requests 400
    specl-ctl bench learning --gain --kinds sql-from-a-sentence

    Kinds are those that no draft was trained on; answers are greedy, so that the words are the same. Training starts by
    itself, as often as failures allow, and works in the gaps; the judge decides. Written to --out: every request, and
    acceptance, agreement and speed over time. Ctrl-C keeps what was measured. Close other programs first.
    """
    _check(options)
    out = Path(options["out"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror}", "--out names a folder") from error
    if not options["no_plot"] and not options["gain"]:
        from specl.shared.bench.plot import require_matplotlib

        require_matplotlib()
    _run(options, out)


def _run(options: dict[str, Any], out: Path) -> None:
    from specl.cli.bench.learning_lines import gain_lines, stream_lines
    from specl.cli.bench.learning_run import LearningRun
    from specl.shared.bench.learning_bench import GainBench, LearningOptions, StreamBench
    from specl.shared.bench.scratch_daemons import scratch_folder

    settings = load_settings()
    if settings.models.draft.name is None:
        raise ConfigError("there is no draft to train", "set models.draft.name")
    # a report on standard output stands alone there
    console = Console(stderr=options["as_object"], highlight=False, markup=False, soft_wrap=True)
    kept = {name: value for name, value in options.items() if name not in ("as_object", "keep")}
    wanted = LearningOptions(
        options["kinds"],
        options["requests"],
        options["gap"],
        options["tokens"],
        options["minutes"],
        options["train_minutes"],
        options["trigger"],
        options["shift"],
        options["ngram"],
        not options["no_off"],
        options["unseen"],
        options["plain_every"],
    )
    given = (settings, find_paths(), scratch_folder(), wanted, console.print)
    ends = {"keep": options["keep"], "as_object": options["as_object"]}
    reporter = ProgressReporter()
    if options["gain"]:
        LearningRun(GainBench(*given, reporter), reporter, out, console, kept).run(gain_lines, **ends)
    else:
        bench = StreamBench(*given, reporter)
        LearningRun(bench, reporter, out, console, kept).run(stream_lines, with_plot=not options["no_plot"], **ends)


def _check(options: dict[str, Any]) -> None:
    """Fill in defaults. Raises ConfigError for options that contradict each other."""
    kinds = options["kinds"] = options["kinds"] or (reserved.KINDS[:2] if options["shift"] else reserved.KINDS[:1])
    if options["shift"] and len(kinds) < 2:
        raise ConfigError("--shift needs two kinds to change between", "--kinds record-to-json,sql-from-a-sentence")
    if options["gain"] and (
        extra := [name for name in ("shift", "ngram", "no_off", "minutes", "trigger") if options[name]]
    ):
        raise ConfigError(f"--{extra[0].replace('_', '-')} is about a stream, and --gain sends none")
    options["requests"] = options["requests"] or (GAIN_REQUESTS if options["gain"] else STREAM_REQUESTS)
    options["train_minutes"] = options["train_minutes"] or (GAIN_MINUTES if options["gain"] else STREAM_MINUTES)
    options["trigger"] = options["trigger"] or max(8, options["requests"] // RUNS)
