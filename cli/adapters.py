"""`specl-ctl adapters`: what was learned, what is active, and a way back. Reads manifests from disk; changes go through inference."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from specl.cli.adapter_import import import_
from specl.shared.adapters import Adapters, Manifest
from specl.shared.client import Client
from specl.shared.errors import AdapterRejected, DaemonUnreachable, SpecLoraError
from specl.shared.paths import find_paths


@click.group()
def adapters() -> None:
    """List, show, import, activate, roll back and unload adapters."""


adapters.add_command(import_)


def _all() -> tuple[Adapters, list[tuple[str, Manifest | str]]]:
    """Every published adapter with its manifest, or why that cannot be read."""
    known = Adapters(find_paths().adapters)
    rows: list[tuple[str, Manifest | str]] = []
    for id in known.ids():
        try:
            rows.append((id, known.manifest(id)))
        except AdapterRejected as error:
            rows.append((id, str(error)))
    return known, rows


def _date(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M")


def _number(value: Any, digits: int = 4) -> str:
    """A figure out of a manifest, which may hold anything there."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:.{digits}f}" if usable else "-"


def _figure(figures: dict[str, Any], name: str) -> str:
    return _number(figures.get(name))


@adapters.command("list")
@click.option("--json", "as_object", is_flag=True, help="A JSON list of manifests.")
def list_(as_object: bool) -> None:
    """Every adapter, with held-out agreement before and after."""
    known, rows = _all()
    current, best = known.current(), known.resolve("best")
    if as_object:
        click.echo(json.dumps([asdict(m) | {"current": id == current} for id, m in rows if isinstance(m, Manifest)]))
        return
    if not rows:
        click.echo("no adapters yet; `specl-ctl train --now` makes one from what is stored")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("id", "made (UTC)", "parent", "agreement before", "after", "examples", "norm", ""):
        table.add_column(column)
    for id, manifest in rows:
        marks = ", ".join(
            name for name, it in (("current", current), ("best", best), ("latest", rows[-1][0])) if it == id
        )
        if isinstance(manifest, str):
            table.add_row(id, "-", "-", "-", "-", "-", "-", f"[red]{manifest}[/]")
            continue
        metrics = manifest.metrics
        table.add_row(
            id,
            _date(manifest.created_at),
            manifest.parent_id or "none",
            _figure(metrics, "heldout_before"),
            _figure(metrics, "heldout_after"),
            str(len(manifest.generations)),
            f"{manifest.change_norm:.3f}",
            marks,
        )
    Console().print(table)


@adapters.command()
@click.argument("name", default="current")
@click.option("--json", "as_object", is_flag=True, help="The manifest as JSON.")
def show(name: str, as_object: bool) -> None:
    """One adapter in full: NAME is an id, current, latest or best."""
    known = Adapters(find_paths().adapters)
    id = known.resolve(name)
    if not id:
        raise SpecLoraError(f"there is no adapter {name!r}", "`specl-ctl adapters list` names them")
    manifest = known.manifest(id)
    if as_object:
        click.echo(json.dumps(asdict(manifest) | {"path": str(known.folder / id)}))
        return
    for key, value in _facts(manifest, str(known.folder / id), known.current() == id):
        click.echo(f"{key:<24}{value}")


def _facts(manifest: Manifest, path: str, current: bool) -> list[tuple[str, Any]]:
    metrics, training = manifest.metrics, manifest.training
    by_depth = metrics.get("heldout_after_by_depth")
    depth = ", ".join(_number(value, 3) for value in by_depth) if isinstance(by_depth, list) else "-"
    return [
        ("adapter", manifest.id + (" (current)" if current else "")),
        ("made (UTC)", _date(manifest.created_at)),
        ("path", path),
        ("draft it changes", f"{manifest.base_model} ({manifest.base_fingerprint})"),
        ("parent", manifest.parent_id or "none"),
        ("LoRA", f"rank {manifest.rank}, alpha {manifest.alpha:g}, on {', '.join(manifest.modules)}"),
        ("weight change, norm", f"{manifest.change_norm:.4f}"),
        ("held-out agreement", f"{_figure(metrics, 'heldout_before')} -> {_figure(metrics, 'heldout_after')}"),
        (
            "",
            f"{metrics.get('heldout_generations', 0)} generations, {metrics.get('heldout_positions', 0)} positions; by depth {depth}",
        ),
        (
            "trained on",
            f"{len(manifest.generations)} generations, {training.get('tokens', 0)} tokens, {training.get('steps', 0)} steps",
        ),
        ("loss", f"{_figure(training, 'loss_first')} -> {_figure(training, 'loss_last')}"),
        ("training run", manifest.training_run_id),
    ]


def _change(wish: str) -> None:
    with Client() as client:
        try:
            reply = client.set_adapter(wish)
        except DaemonUnreachable:
            raise DaemonUnreachable(
                "the inference daemon does not run, so nothing can be switched", "start it with `honcho start`"
            ) from None
        if not reply.ok:
            raise SpecLoraError(reply.message)
        click.echo(reply.message)


@adapters.command()
@click.argument("name")
def activate(name: str) -> None:
    """Draft with NAME (an id, latest or best) from the next round on."""
    _change(name)


@adapters.command()
def rollback() -> None:
    """Go back to the adapter that was active before."""
    _change("previous")


@adapters.command()
def unload() -> None:
    """Draft without any adapter."""
    _change("")
