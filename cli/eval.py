"""`specl-ctl eval`: does an adapter help on these prompts? Loads the models here; the daemons are
not asked or disturbed.
"""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from specl.cli.files.prompts import read_prompts
from specl.cli.options import TEMPERATURE
from specl.cli.progress import ProgressReporter
from specl.shared.adapters.registry import Adapters
from specl.shared.errors import ConfigError, SpecLoraError
from specl.shared.paths import find_paths
from specl.shared.settings.load import load_settings

if TYPE_CHECKING:
    from specl.shared.bench.compare_adapters import AdapterResults, Difference
    from specl.shared.bench.prompt_sets import BenchPrompt
    from specl.shared.engine.core import EngineCore

NONE = "none"


@click.command("eval")
@click.argument("file", type=click.Path(allow_dash=True))
@click.option("--adapter", default="current", show_default=True, help="An id, current, latest, best or none.")
@click.option("--against", default=NONE, show_default=True, help="What it is compared with, named alike.")
@click.option("--limit", type=click.IntRange(1), help="The most prompts to evaluate, from the first on.")
@click.option("--column", help="The column (CSV) or key (JSON) that holds the prompt.")
@click.option("--max-tokens", type=click.IntRange(2), default=64, show_default=True, help="Most tokens of an answer.")
@click.option("--temperature", type=TEMPERATURE, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--json", "as_object", is_flag=True, help="One JSON object.")
def evaluate(
    file: str,
    adapter: str,
    against: str,
    limit: int | None,
    column: str | None,
    max_tokens: int,
    temperature: float,
    as_object: bool,
) -> None:
    """Compare two adapters on the prompts of FILE (text, .jsonl, .json or .csv, as for `collect`).

    \b
    specl-ctl eval prompts.txt                                  # the active adapter against the bare draft
    specl-ctl eval prompts.txt --adapter 000007 --against 000006

    acceptance: of 4 tokens drafted each round, n-gram drafts off. agreement: how often the draft's first choice is the
    target's next token; at depth 2 and 3, where the guesses before it were right. speed: as served, draft length chosen
    by cost. Nothing is recorded.
    """
    prompts = read_prompts(file, column, limit)
    names = _resolve(adapter), _resolve(against)
    if names[0] == names[1]:
        raise ConfigError(f"--adapter and --against both mean {names[0]}", _hint(adapter))
    engine = _load()
    from specl.shared.bench import compare_adapters
    from specl.shared.bench.prompt_sets import BenchPrompt
    from specl.shared.sampling_params import SamplingParams

    items = [BenchPrompt(str(item.line), file, item.messages) for item in prompts]
    results = [compare_adapters.AdapterResults(name, _adapter(engine, name)) for name in names]
    sampling = SamplingParams(temperature=temperature)
    items = _fitting(engine, items, max_tokens)
    with ProgressReporter() as report_progress:
        plain = compare_adapters.measure_adapters(engine, items, max_tokens, sampling, results, report_progress)
    report(results, compare_adapters.difference(results[0], results[1]), plain, len(items), as_object)


def _resolve(name: str) -> str:
    """The id that `name` stands for; `none` for the bare draft. Raises SpecLoraError for a name
    that nothing has.
    """
    adapters = Adapters(find_paths().adapters)
    if name == NONE or (name == "current" and not adapters.current()):
        return NONE
    id = adapters.resolve(name)
    if not id:
        raise ConfigError(f"there is no adapter {name!r}", "`specl-ctl adapters list` names them")
    return id


def _hint(name: str) -> str:
    return "no adapter is active; `specl-ctl train --now` makes one" if name == "current" else "name two that differ"


def _load() -> "EngineCore":
    from specl.cli.memory_check import check_memory, local_pair
    from specl.shared.loading.costs import load_or_calibrate
    from specl.shared.loading.engine import load_engine
    from specl.shared.models import blas  # noqa: F401 - binds the BLAS before mlx loads
    from specl.shared.models.report import to_stderr

    paths, settings = find_paths(), load_settings()
    target, draft = local_pair(settings, paths.models)
    check_memory(settings, paths, target, draft, "loading the models a second time")
    engine = load_engine(settings, paths.models, to_stderr)
    if engine.draft is None:
        raise ConfigError("there is no draft to evaluate", "set models.draft.name")
    load_or_calibrate(engine, paths.costs)
    return engine


def _adapter(engine: "EngineCore", name: str) -> Any:
    from specl.shared.adapters.tensors import load_adapter

    adapters = Adapters(find_paths().adapters)
    return None if name == NONE else load_adapter(adapters, adapters.folder / name, engine)[0]


def _fitting(engine: "EngineCore", items: "list[BenchPrompt]", limit: int) -> "list[BenchPrompt]":
    """The prompts that leave room for an answer in the target's context."""
    room = engine.target.context_length - limit
    kept = [item for item in items if len(engine.encode_chat(item.messages)[1]) <= room]
    if len(kept) < len(items):
        click.echo(f"{len(items) - len(kept)} prompts are too long for {engine.target.name} and left out", err=True)
    if not kept:
        raise SpecLoraError("no prompt is left")
    return kept


# ------------------------------------------------------------------------------------------------ the report
def report(results: "list[AdapterResults]", change: "Difference", plain: float, prompts: int, as_object: bool) -> None:
    """The figures side by side, and a sentence."""
    if as_object:
        found = {"prompts": prompts, "plain_tokens_per_second": plain, "agreement_difference": asdict(change)}
        click.echo(json.dumps(found | {"sides": [one.figures() for one in results]}))
        return
    click.echo(f"{'':24}" + "".join(f"{one.name:>12}" for one in results))
    for name, text in _rows(results, plain):
        click.echo(f"{name:24}" + "".join(f"{value:>12}" for value in text))
    click.echo(sentence(results, change, prompts))


def _rows(results: "list[AdapterResults]", plain: float) -> list[tuple[str, list[str]]]:
    depths = range(max(len(one.by_depth) for one in results))  # as far as any draft got
    return [
        ("acceptance (k=4)", [_share(one.acceptance) for one in results]),
        ("agreement", [_share(one.agreement) for one in results]),
        *((f"  at depth {d + 1}", [_share(dict(enumerate(one.by_depth)).get(d)) for one in results]) for d in depths),
        ("tokens a second", [f"{one.tokens_per_second:.1f}" for one in results]),
        ("  against no draft", [f"{one.tokens_per_second / plain:.2f}x" if plain else "-" for one in results]),
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def sentence(results: "list[AdapterResults]", change: "Difference", prompts: int) -> str:
    """What the difference in agreement says, and what it does not."""
    span = f"{change.value:+.3f} (95% interval {change.low:+.3f} to {change.high:+.3f}, {prompts} prompts)"
    first, second = (f"adapter {one.name}" if one.name != NONE else "the bare draft" for one in results)
    if change.low > 0:
        return f"{first} agrees more with the target than {second}: {span}"
    if change.high < 0:
        return f"{first} agrees less with the target than {second}: {span}"
    return f"no difference that these prompts can show: {span}"
