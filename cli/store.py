"""`specl-ctl store`: look into the failure store without SQL; export and purge."""

import json
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from specl.cli.purge import purge
from specl.shared.paths import find_paths
from specl.shared.store import Store


@click.group()
def store() -> None:
    """Look into the failure store; export and purge. `sqlite3 var/store.db` reads it as well."""


def _open() -> Store:
    return Store(find_paths().store, read_only=True)


def _print(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="ellipsis", no_wrap=column not in ("prompt", "output"))
    for row in rows:
        table.add_row(*("-" if row[column] is None else str(row[column]).replace("\n", " ") for column in columns))
    Console().print(table)


@store.command()
@click.option("--json", "as_object", is_flag=True)
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
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True)
@click.option("--json", "as_object", is_flag=True)
def failures(limit: int, as_object: bool) -> None:
    """Generations whose acceptance fell below the threshold, newest first."""
    rows = _open().sql("SELECT * FROM failures LIMIT :limit", limit=limit)
    if as_object:
        click.echo(json.dumps(rows, ensure_ascii=False))
    elif rows:
        for row in rows:
            row["id"] = row["id"][:8]
        _print(
            rows,
            ("created", "id", "acceptance", "agreement", "disagreements", "tokens", "adapter_id", "prompt", "output"),
        )
    else:
        click.echo("no failures are stored")


@store.command()
@click.option(
    "--jsonl", "as_jsonl", is_flag=True, required=True, help="One JSON object a line, in the documented shape."
)
@click.option(
    "--out", type=click.File("w", encoding="utf-8", atomic=True), default="-", help="A file instead of stdout."
)
def export(as_jsonl: bool, out: Any) -> None:
    """Every generation: id, prompt, target_output, acceptance_rate, timestamp, disagreements."""
    for row in _open().export():
        out.write(json.dumps(row, ensure_ascii=False) + "\n")


store.add_command(purge)
