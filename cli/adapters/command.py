"""`specl-ctl adapters`: the trained adapters, the active one, and how to change it.

Reads manifests and the store from disk. Changes go through the inference daemon.
"""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from specl.cli.adapters import figures
from specl.cli.adapters.figures import Row
from specl.cli.adapters.import_command import import_
from specl.cli.terminal import echo
from specl.shared.adapters.manifest import Manifest
from specl.shared.adapters.registry import Adapters
from specl.shared.errors import AdapterRejected, DaemonUnreachable, SpecLoraError, StoreError
from specl.shared.messaging.client import Client
from specl.shared.paths import find_paths
from specl.shared.runtime.terminal import all_visible
from specl.shared.store import Store


@click.group()
def adapters() -> None:
    """List, show, import, activate, roll back and unload adapters."""


adapters.add_command(import_)


def _history() -> tuple[list[Row], dict[str, list[Row]]]:
    """The trainer's runs, newest first, and the activations of each adapter; empty while there is
    no store.
    """
    try:
        store = Store(find_paths().store, read_only=True)
    except StoreError:
        return [], {}
    try:
        activations: dict[str, list[Row]] = {}
        for row in store.sql("SELECT * FROM adapter_activations"):
            activations.setdefault(row.pop("adapter_id"), []).append(row)
        return store.adapter_runs(), activations
    finally:
        store.close()


@adapters.command("list")
@click.option("--all", "everything", is_flag=True, help="Also the candidates that the judge did not promote.")
@click.option("--json", "as_object", is_flag=True, help="A JSON list: manifest, run and activations of each adapter.")
def list_(everything: bool, as_object: bool) -> None:
    """Every adapter: the adapter that it was trained from, and what the judge measured before and
    after.

    held-out: agreement with the target on conversations that were never trained on. gain: its 95%
    interval. general: the change on general text, which may fall by less than 0.005.
    """
    registry = Adapters(find_paths().adapters)
    runs, activations = _history()
    refused = [run for run in runs if not run["adapter_id"]] if everything else []
    if as_object:
        click.echo(json.dumps(_objects(registry, runs, activations) + [{"id": "", "run": run} for run in refused]))
        return
    rows = [_row(registry, id) for id in registry.ids()] + [(run["created"], figures.run_cells(run)) for run in refused]
    if not rows:
        click.echo("no adapters yet; `specl-ctl train --now` makes one from what is stored")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in figures.COLUMNS:
        table.add_column(column, no_wrap=column != "state")
    for _, cells in sorted(rows, key=lambda row: row[0]):
        table.add_row(*all_visible(cells))
    Console().print(table)


def _row(registry: Adapters, id: str) -> tuple[str, list[str]]:
    """When an adapter was made (in ISO format; first of all where that cannot be read), and its
    cells.
    """
    try:
        manifest = registry.manifest(id)
    except AdapterRejected as error:
        return "", figures.unreadable_cells(id, str(error))
    created = datetime.fromtimestamp(manifest.created_at, UTC).isoformat()
    return created, figures.adapter_cells(registry, manifest)


def _objects(registry: Adapters, runs: list[Row], activations: dict[str, list[Row]]) -> list[dict[str, Any]]:
    """The adapters whose manifest can be read, for programs."""
    run_of = {run["adapter_id"]: run for run in runs}
    objects = []
    for id in registry.ids():
        try:
            manifest = registry.manifest(id)
        except AdapterRejected:
            continue
        objects.append(_object(registry, manifest, run_of.get(id), activations.get(id, [])))
    return objects


def _object(registry: Adapters, manifest: Manifest, run: Row | None, activations: list[Row]) -> dict[str, Any]:
    place = {"path": str(registry.folder / manifest.id), "current": registry.current() == manifest.id}
    return asdict(manifest) | place | {"run": run, "activations": activations}


@adapters.command()
@click.argument("name", default="current")
@click.option("--json", "as_object", is_flag=True, help="Manifest, run and activations as JSON.")
def show(name: str, as_object: bool) -> None:
    """One adapter in full: NAME is an id, current, previous, latest or best."""
    registry = Adapters(find_paths().adapters)
    id = registry.resolve(name)
    if not id:
        raise SpecLoraError(f"there is no adapter {name!r}", "`specl-ctl adapters list` names them")
    manifest = registry.manifest(id)
    runs, activations = _history()
    run = next((run for run in runs if run["adapter_id"] == id), None)
    if as_object:
        click.echo(json.dumps(_object(registry, manifest, run, activations.get(id, []))))
        return
    lines = figures.manifest_lines(manifest, str(registry.folder / id), registry.current() == id)
    for label, value in lines + figures.history_lines(manifest, run, activations.get(id, [])):
        echo(f"{label:<24}{value}")


def _set_adapter(name: str) -> None:
    with Client() as client:
        try:
            reply = client.set_adapter(name)
        except DaemonUnreachable:
            raise DaemonUnreachable(
                "the inference daemon does not run, so nothing can be switched", "start it with `honcho start`"
            ) from None
        if not reply.ok:
            raise SpecLoraError(reply.message)
        echo(reply.message)


@adapters.command()
@click.argument("name")
def activate(name: str) -> None:
    """Draft with NAME (an id, latest or best) from the next round on."""
    _set_adapter(name)


@adapters.command()
def rollback() -> None:
    """Go back to the adapter that was active before."""
    _set_adapter("previous")


@adapters.command()
def unload() -> None:
    """Draft without an adapter."""
    _set_adapter("")
