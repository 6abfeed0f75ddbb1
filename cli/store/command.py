"""`specl-ctl store`: look into the failure store without SQL; export, import and purge."""

import json
import shutil
import sys
import time
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from specl.cli.store.export import export
from specl.cli.store.import_command import import_
from specl.cli.store.purge import parse_time, purge
from specl.cli.store.show import show
from specl.cli.terminal import json_line
from specl.shared.conversations import folded
from specl.shared.paths import find_paths
from specl.shared.runtime.terminal import visible
from specl.shared.store import Store
from specl.shared.store.failure import score_sql

LONG = ("prompt", "output")
PIPE_WIDTH = 140  # columns of a table that goes to a file or a pipe
OUTPUT_WIDTH = 110  # from here on answers stand beside the prompts
SORTS = {
    "newest": "g.created_at DESC",
    "oldest": "g.created_at",
    "acceptance": score_sql("g."),
    "disagreements": "f.disagreements DESC",
    "tokens": "g.output_count DESC",
    "speed": "g.tokens_per_second",
}


@click.group()
def store() -> None:
    """Look into the failure store; export, import and purge. `sqlite3 var/store.db` reads it as
    well.
    """


def _open() -> Store:
    return Store(find_paths().store, read_only=True)


def _print(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Print a table: numbers in full; the text columns share the rest of the line."""
    table = Table(box=None, padding=(0, 2, 0, 0), expand=any(column in LONG for column in columns))
    for column in columns:
        table.add_column(column.replace("_", " "), no_wrap=True, ratio=1 if column in LONG else None)
    for row in rows:
        table.add_row(*("-" if row[column] is None else _one_line(row[column]) for column in columns))
    Console(width=_width()).print(table)


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH


def _one_line(value: object) -> Text:
    return Text(visible(" ".join(str(value).split())))  # Text: what models write is no markup


@store.command()
@click.option("--json", "as_object", is_flag=True, help="One JSON object.")
def summary(as_object: bool) -> None:
    """Counts, acceptance by day and adapter, and the tokens that cost most."""
    opened = _open()
    counts = asdict(opened.summary())
    days = opened.sql("SELECT * FROM acceptance_by_day")
    costly = opened.sql("SELECT * FROM costliest_tokens LIMIT 10")
    if as_object:
        click.echo(json.dumps(counts | {"acceptance_by_day": days, "costliest_tokens": costly}))
        return
    click.echo(
        f"{counts['generations']} generations, {counts['failures']} failures ({counts['pending_failures']} not yet trained on), "
        f"{counts['disagreements']} disagreements, {counts['quarantined']} in quarantine"
    )
    if days:
        _print(days, ("day", "adapter_id", "generations", "drafted", "acceptance", "agreement", "tokens_per_second"))
    if costly:
        for row in costly:
            row["draft_text"], row["target_text"] = repr(row["draft_text"]), repr(row["target_text"])
        _print(costly, ("draft_text", "target_text", "times", "draft_confidence", "target_confidence"))


@store.command()
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Rows of a page.")
@click.option("--page", type=click.IntRange(1), default=1, show_default=True)
@click.option("--sort", type=click.Choice(list(SORTS)), default="newest", show_default=True)
@click.option("--contains", help="Only where the prompt or the answer contains this text.")
@click.option("--adapter", help="Only what this adapter drafted; `none` for the bare draft.")
@click.option("--below", type=click.FloatRange(0, 1), help="Only below this acceptance.")
@click.option("--since", help="Only newer than e.g. 90m, 12h or 30d, or than a date (2026-01-31).")
@click.option("--json", "as_object", is_flag=True, help="A JSON list.")
def failures(limit: int, page: int, sort: str, as_object: bool, **filters: Any) -> None:
    """Generations whose acceptance fell below the threshold.

    \b
    specl-ctl store failures --sort acceptance --limit 5
    specl-ctl store failures --contains SELECT --since 7d --page 2
    """
    where, values = _filter(**filters)
    source = f"FROM failures f JOIN generations g ON g.id = f.id WHERE {where}"
    opened = _open()
    total = opened.sql(f"SELECT count(*) AS n {source}", **values)[0]["n"]
    query = f"SELECT f.* {source} ORDER BY {SORTS[sort]}, g.n DESC LIMIT :limit OFFSET :start"
    rows = opened.sql(query, limit=limit, start=(page - 1) * limit, **values)
    if as_object:
        click.echo(json_line(rows))
    elif rows:
        for row in rows:
            row["id"], row["created"] = row["id"][:8], row["created"][5:16].replace("T", " ")
            row["accept"], row["agree"], row["wrong"] = row["acceptance"], row["agreement"], row["disagreements"]
            row["adapter"] = row["adapter_id"] or "none"
        columns = ("id", "created", "accept", "agree", "wrong", "tokens", "adapter", "prompt")
        _print(rows, columns if _width() < OUTPUT_WIDTH else (*columns, "output"))
        if total > len(rows):
            more = f"; `--page {page + 1}` goes on" if page * limit < total else ""
            click.echo(f"page {page} of {-(-total // limit)}, {total} failures{more}", err=True)
    else:
        click.echo(f"page {page} is beyond the last of {total} failures" if total else "no such failures are stored")


def _filter(
    contains: str | None, adapter: str | None, below: float | None, since: str | None
) -> tuple[str, dict[str, Any]]:
    """The options as a condition and its values."""
    parts: list[str] = []
    values: dict[str, Any] = {}
    if contains:
        # a chat's prompt is its template as well, which would hold many a word
        plain = "(g.messages = '[]' AND text_holds(g.prompt, :contains))"
        parts.append(f"(messages_hold(g.messages, :contains) OR text_holds(g.output, :contains) OR {plain})")
        values["contains"] = folded(contains)
    if adapter is not None:
        parts.append("g.adapter_id = :adapter")
        values["adapter"] = "" if adapter == "none" else adapter
    if below is not None:
        parts.append(f"{score_sql('g.')} < :below")
        values["below"] = below
    if since:
        parts.append("g.created_at >= :since")
        values["since"] = parse_time(since, time.time())
    return " AND ".join(parts) or "1", values


store.add_command(show)
store.add_command(export)
store.add_command(import_)
store.add_command(purge)
