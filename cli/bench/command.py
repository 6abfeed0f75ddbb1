"""`specl-ctl bench`: the same prompts through mlx-lm and through this engine, interleaved in one
run; tables, JSON and a plot.
"""

import contextlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from specl.cli.bench.learning import learning
from specl.cli.options import TEMPERATURE, TOP_P
from specl.cli.progress import ProgressReporter
from specl.shared.errors import ConfigError
from specl.shared.paths import Paths, find_paths
from specl.shared.settings.load import load_settings
from specl.shared.settings.schema import Models, Settings

if TYPE_CHECKING:
    from specl.shared.bench.arms import Arm
    from specl.shared.bench.measure import Run
    from specl.shared.bench.prompt_sets import BenchPrompt
    from specl.shared.bench.scratch_daemons import ScratchDaemons
    from specl.shared.engine.core import EngineCore

SETS = ("general", "code", "structured", "copy", "adversarial")
WIDE = 120  # columns of tables that go to a file
FIXED_K = "0,1,2,3,4,6"
MLX_K = "1,2,3,4,5,6"


class _Numbers(click.ParamType):  # type: ignore[type-arg]  # click 8.2 cannot subscript it
    """Numbers separated by commas."""

    name = "N,N,..."

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers like 1,2,4", param, ctx)
        if any(not self.low <= number <= self.high for number in numbers):
            self.fail(f"every number must lie between {self.low} and {self.high}", param, ctx)
        return numbers


@click.group(invoke_without_command=True)
@click.option(
    "--set",
    "sets",
    type=click.Choice(SETS),
    multiple=True,
    help="A frozen prompt set; may be repeated.  [default: all]",
)
@click.option(
    "--prompts",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Prompts of each set, spread evenly over it.",
)
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Most tokens of an answer.")
@click.option("--prompt", help="Your own prompt instead of the sets.")
@click.option(
    "--iterations", type=click.IntRange(1), default=1, show_default=True, help="How often each prompt is answered."
)
@click.option("--target", help="A folder, a hub name or smollm2-135m; the settings' target otherwise.")
@click.option("--draft", help="A draft folder or name, `none` for none; the settings' draft otherwise.")
@click.option(
    "--temperature",
    type=TEMPERATURE,
    default=0.0,
    show_default=True,
    help="0 is greedy; texts are compared only then.",
)
@click.option("--top-p", type=TOP_P, default=1.0, show_default=True)
@click.option(
    "--k", "fixed", type=_Numbers(0, 16), default=FIXED_K, show_default=True, help="Fixed draft lengths to measure."
)
@click.option(
    "--mlx-k",
    type=_Numbers(1, 16),
    default=MLX_K,
    show_default=True,
    help="mlx-lm's draft lengths, where the draft is a model of its own.",
)
@click.option(
    "--stock", is_flag=True, help="Also mlx-lm on a copy without our kernels (loads the target twice; Linux CPU)."
)
@click.option("--no-daemon", is_flag=True, help="Leave out the run through scratch daemons.")
@click.option("--suite", is_flag=True, help="Target only, base draft, adapted draft (the active adapter).")
@click.option(
    "--clients", type=_Numbers(1, 32), help="Total tokens a second of this many clients at once, against mlx_lm.server."
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False), help="Write everything here; `-` for standard output."
)
@click.option("--plot", type=click.Path(dir_okay=False), help="Write a picture of the ratios here (PNG).")
@click.pass_context
def bench(ctx: click.Context, /, **options: Any) -> None:
    """Measure speed and equality: the same prompts through mlx-lm and through this engine, interleaved in one run.

    \b
    specl-ctl bench --set general --prompts 8 --tokens 64
    specl-ctl bench --prompt "Why is the sky blue?" --iterations 5
    specl-ctl bench --suite
    specl-ctl bench --clients 1,2,4,8
    specl-ctl bench learning --help

    Ratios are to mlx-lm plain, prompt by prompt: median (smallest to largest). Close other programs first; the plain
    rate of a busy machine says nothing.
    """
    if ctx.invoked_subcommand is not None:
        return
    if options["plot"]:
        from specl.shared.bench.plot import require_matplotlib

        require_matplotlib()
    with contextlib.ExitStack() as stack:
        _Bench(stack, **options).run()


bench.add_command(learning)


class _Bench:
    """One invocation."""

    def __init__(self, stack: contextlib.ExitStack, **options: Any) -> None:
        from specl.shared.sampling_params import SamplingParams

        self.options, self.stack = options, stack
        self.paths: Paths = find_paths()
        self.settings = _settings(options["target"], options["draft"])
        self.sampling = SamplingParams(temperature=options["temperature"], top_p=options["top_p"])
        # a report on standard output stands alone there
        self.console = Console(stderr=options["json_file"] == "-", highlight=False)
        if not self.console.is_terminal:
            self.console = Console(stderr=options["json_file"] == "-", highlight=False, width=WIDE)

    def run(self) -> None:
        """Load, measure, report."""
        engine = self._engine()
        items = self._prompts()
        if self.options["clients"]:
            return self._write({"clients": self._concurrent(engine, items)})
        from specl.shared.bench.measure import Plan, measure
        from specl.shared.bench.report import as_json

        arms = self._suite(engine) if self.options["suite"] else self._arms(engine)
        self.console.print(
            f"{len(items)} prompts x {self.options['iterations']}, {len(arms)} arms, up to {self.options['tokens']} tokens an answer"
        )
        plan = Plan(items, self.options["tokens"], self.options["iterations"], arms)
        with ProgressReporter() as report_progress:
            runs = measure(engine, plan, self.sampling.greedy, report_progress)
        report = as_json(runs)
        _print_tables(self.console, runs, report)
        self._write(report)
        if self.options["plot"]:
            from specl.shared.bench.plot import draw

            draw(runs, Path(self.options["plot"]))

    def _engine(self) -> "EngineCore":
        from specl.shared.loading.costs import load_or_calibrate
        from specl.shared.loading.engine import load_engine
        from specl.shared.models import blas
        from specl.shared.models.report import to_stderr

        engine = load_engine(self.settings, self.paths.models, to_stderr)
        load_or_calibrate(engine, self.paths.costs)
        draft = engine.draft.name if engine.draft else "none"
        self.console.print(
            f"target {engine.target.name} ({engine.target.fingerprint}), draft {draft} ({engine.draft_fingerprint})"
        )
        self.console.print(
            f"{engine.target.kernels.description}; BLAS {blas.BOUND.name}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}"
        )
        return engine

    def _prompts(self) -> "list[BenchPrompt]":
        from specl.shared.bench import prompt_sets

        if self.options["prompt"]:
            return [
                prompt_sets.BenchPrompt(
                    "prompt", prompt_sets.FROM_OPTION, [{"role": "user", "content": self.options["prompt"]}]
                )
            ]
        names = self.options["sets"] or SETS
        self.hashes = {name: prompt_sets.sha256(name) for name in names}
        for name, digest in self.hashes.items():
            self.console.print(f"set {name}: sha256 {digest[:16]}")
        return [item for name in names for item in prompt_sets.pick(name, self.options["prompts"])]

    def _arms(self, engine: "EngineCore") -> "list[Arm]":
        from specl.shared.bench.arms import STOCK, EngineArm, MlxSpeculativeArm, PlainArm, stock_copy
        from specl.shared.models.language_model import LanguageModel

        sampling, top_k = self.sampling, self.settings.training.loss.top_k_logits
        arms: list[Any] = [PlainArm(engine.target, sampling)]
        if self.options["stock"]:
            arms.append(PlainArm(stock_copy(engine.target, self.paths.models), sampling, STOCK))
        if isinstance(engine.draft, LanguageModel):
            arms += [MlxSpeculativeArm(engine.target, engine.draft, k, sampling) for k in self.options["mlx_k"]]
        # without a draft a fixed length would go to the n-gram drafter: only 0 means anything
        fixed = self.options["fixed"] if engine.draft is not None else [k for k in self.options["fixed"] if k == 0]
        arms += [EngineArm(f"k={k}", engine, sampling, k, ngram=False) for k in fixed]
        arms.append(EngineArm("auto fast, no n-gram", engine, sampling, None, ngram=False))
        arms.append(EngineArm("auto fast", engine, sampling, None, ngram=True))
        arms.append(EngineArm("auto detailed", engine, sampling, None, ngram=True, capture_k=top_k))
        if not self.options["no_daemon"]:
            from specl.shared.bench.arms import DaemonArm

            client = self.stack.enter_context(self._daemons(engine).client())
            arms.append(DaemonArm(client, sampling))
        return arms

    def _suite(self, engine: "EngineCore") -> "list[Arm]":
        from specl.shared.adapters.registry import Adapters
        from specl.shared.adapters.tensors import load_adapter
        from specl.shared.bench.arms import EngineArm, PlainArm

        if engine.draft is None:
            raise ConfigError("--suite compares drafts, and there is no draft", "set models.draft.name")
        sampling, adapters = self.sampling, Adapters(self.paths.adapters)
        arms: list[Any] = [
            PlainArm(engine.target, sampling),
            EngineArm("target only", engine, sampling, 0, ngram=False),
        ]
        arms.append(EngineArm("base draft", engine, sampling, None, ngram=False))
        arms.append(EngineArm("base draft, k=4", engine, sampling, 4, ngram=False))
        current = adapters.current()
        if not current:
            self.console.print("there is no active adapter: the adapted draft is left out")
            return arms
        adapter, _ = load_adapter(adapters, adapters.folder / current, engine)
        arms.append(EngineArm("adapted draft", engine, sampling, None, ngram=False, adapter=adapter))
        arms.append(EngineArm("adapted draft, k=4", engine, sampling, 4, ngram=False, adapter=adapter))
        return arms

    def _daemons(self, engine: "EngineCore") -> "ScratchDaemons":
        from specl.shared.bench.scratch_daemons import ScratchDaemons, with_models

        folder = getattr(engine.draft, "folder", None) or getattr(engine.draft, "path", None)
        settings = with_models(self.settings, engine.target.path, str(folder) if folder else None)
        roles = ("inference", "collector")
        daemons = ScratchDaemons(settings, self.paths.models, roles, costs=self.paths.costs)
        return self.stack.enter_context(daemons)

    def _concurrent(self, engine: "EngineCore", items: "list[BenchPrompt]") -> list[dict[str, Any]]:
        from dataclasses import asdict

        from specl.shared.bench.concurrency import measure_concurrency
        from specl.shared.bench.mlx_server import MlxServer

        server = self.stack.enter_context(MlxServer(engine.target))
        rows = measure_concurrency(
            self._daemons(engine),
            server,
            items,
            self.options["clients"],
            self.options["tokens"],
            self.sampling,
            self.options["iterations"],
            lambda note: click.echo(note, err=True),
        )
        table = Table("clients", "ours tok/s", "mlx_lm.server tok/s", "ratio of each turn")
        for row in rows:
            table.add_row(
                str(row.clients),
                f"{row.ours:.1f}",
                f"{row.theirs:.1f}",
                ", ".join(f"{value:.2f}" for value in row.ratios),
            )
        self.console.print(table)
        return [asdict(row) for row in rows]

    def _write(self, report: dict[str, Any]) -> None:
        """Write the JSON file, with what is needed to read it."""
        file = self.options["json_file"]
        if not file:
            return
        about = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
        about |= {"mlx": version("mlx"), "mlx_lm": version("mlx-lm")}
        options = {name: value for name, value in self.options.items() if name not in ("json_file", "plot")}
        models = {"target": self.settings.models.target.name, "draft": self.settings.models.draft.name}
        whole = {"about": about, "models": models, "options": options, "sets": getattr(self, "hashes", {})} | report
        text = json.dumps(whole, indent=1)
        if file == "-":
            click.echo(text)
        else:
            Path(file).write_text(text + "\n", encoding="utf-8")


def _settings(target: str | None, draft: str | None) -> Settings:
    """The settings, with other models where they are named."""
    settings = load_settings()
    models = settings.models.model_dump()
    if target:
        models["target"]["name"] = target
    if draft:
        models["draft"]["name"] = None if draft == "none" else draft
    return settings.model_copy(update={"models": Models.model_validate(models)})


# ------------------------------------------------------------------------------------------------ tables
def _print_tables(console: Console, runs: "list[Run]", report: dict[str, Any]) -> None:
    for name, rows in report["groups"].items():
        console.print(_group_table(name, rows))
    for name, row in report["hindsight"].items():
        shares = ", ".join(f"{arm} {value:.3f}" for arm, value in row.items() if arm != "best_fixed")
        console.print(f"{name}: best fixed length of hindsight {row['best_fixed']}; {shares} of it")
    apart = report["apart"]
    if apart["looping"] or apart["short"]:
        console.print(
            f"reported separately: {apart['looping']} looping answers; left out: {apart['short']} under 16 tokens"
        )
    for arm, row in report["equality"].items():
        console.print(equality_line(arm, row))


def _group_table(name: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "arm",
        "tok/s",
        "ratio (min to max)",
        "TTFT ms",
        "accepted",
        "by depth",
        "tok/round",
        title=f"{name}: {rows[0]['ratio']['n']} answers",
    )
    for row in rows:
        ratio = row["ratio"]
        spread = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio["n"] else "-"
        depth = " ".join(f"{value:.2f}" for value in row["acceptance_by_depth"][:4])
        accepted = f"{row['acceptance']:.2f}" if row["acceptance"] is not None else "-"
        each = f"{row['tokens_a_round']:.2f}" if row["tokens_a_round"] else "-"
        table.add_row(
            row["arm"], f"{row['tokens_per_second']:.1f}", spread, f"{row['ttft_ms']:.0f}", accepted, depth, each
        )
    return table


def equality_line(arm: str, row: dict[str, Any]) -> str:
    """One arm's texts against the reference's, in one line."""
    counts = ", ".join(
        f"{row[verdict]} {verdict}" for verdict in ("equal", "tie", "different", "unchecked") if row[verdict]
    )
    note = "" if row["conclusive"] else f" INCONCLUSIVE ({row['drafted']} drafted, {row['rejected']} rejected)"
    return f"texts of {arm}: {counts}{note}"
