"""`specl-ctl adapters`: what was learned, what is active, and a way back. Reads manifests from disk; changes go through inference."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from specl.cli.adapters.import_command import import_
from specl.shared.adapters.registry import Adapters, Manifest
from specl.shared.errors import AdapterRejected, DaemonUnreachable, SpecLoraError, StoreError
from specl.shared.messaging.client import Client
from specl.shared.messaging.codes import ActivationReason
from specl.shared.paths import find_paths
from specl.shared.store import Store

# their `who` in the view `adapter_activations` says it all
SELF_EXPLAINING = {
    ActivationReason.ANNOUNCED,
    ActivationReason.RESTART,
    ActivationReason.BY_HAND,
    ActivationReason.BY_HAND_AGAIN,
    ActivationReason.ROLLED_BACK_BY_HAND,
    ActivationReason.REINSTATED,
}


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


def _history() -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """The trainer's runs, newest first, and activations by adapter; nothing where there is no store yet."""
    try:
        store = Store(find_paths().store, read_only=True)
    except StoreError:
        return [], {}
    try:
        runs, used = store.adapter_runs(), {}
        for line in store.sql("SELECT * FROM adapter_activations"):
            used.setdefault(line.pop("adapter_id"), []).append(line)
        return runs, used
    finally:
        store.close()


@adapters.command("list")
@click.option("--all", "everything", is_flag=True, help="Also the candidates that the gate did not promote.")
@click.option("--json", "as_object", is_flag=True, help="A JSON list: manifest, run and activations of each adapter.")
def list_(everything: bool, as_object: bool) -> None:
    """Every adapter: what it goes on from, and what the gate measured before and after.

    held-out: agreement with the target on conversations that were never trained on. gain: its 95% interval. general: the
    change on general text, which may fall by less than 0.005.
    """
    known, rows = _all()
    runs, used = _history()
    by_adapter = {run["adapter_id"]: run for run in runs if run["adapter_id"]}
    if as_object:
        told = [_object(known, m, by_adapter.get(id), used.get(id, [])) for id, m in rows if isinstance(m, Manifest)]
        others = [{"id": "", "run": run} for run in runs if not run["adapter_id"]] if everything else []
        click.echo(json.dumps(told + others))
        return
    if not rows and not (everything and runs):
        click.echo("no adapters yet; `specl-ctl train --now` makes one from what is stored")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("id", "made (UTC)", "from", "held-out", "gain (95%)", "general", "state"):
        table.add_column(column, no_wrap=column not in ("state",))
    lines = [(_made(id, manifest), _line(known, id, manifest)) for id, manifest in rows]
    if everything:
        lines += [(run["created"], _refused(run)) for run in runs if not run["adapter_id"]]
    for _, line in sorted(lines, key=lambda line: line[0]):
        table.add_row(*line)
    Console().print(table)


def _object(
    known: Adapters, manifest: Manifest, run: dict[str, Any] | None, used: list[dict[str, Any]]
) -> dict[str, Any]:
    """One adapter for programs."""
    path = {"path": str(known.folder / manifest.id), "current": known.current() == manifest.id}
    return asdict(manifest) | path | {"run": run, "activations": used}


def _made(id: str, manifest: Manifest | str) -> str:
    moment = manifest.created_at if isinstance(manifest, Manifest) else 0.0
    return datetime.fromtimestamp(moment, UTC).isoformat()


def _line(known: Adapters, id: str, manifest: Manifest | str) -> list[str]:
    """One adapter as cells."""
    if isinstance(manifest, str):
        return [id, "-", "-", "-", "-", "-", f"[red]{manifest}[/]"]
    metrics = manifest.metrics
    gate = metrics.get("gate") if isinstance(metrics.get("gate"), dict) else {}
    names = (("current", known.current()), ("best", known.resolve("best")), ("latest", known.resolve("latest")))
    marks = [name for name, it in names if it == id] + (["rolled back"] if id in known.rolled_back() else [])
    return [
        id,
        _date(manifest.created_at)[5:],
        manifest.parent_id or "none",
        f"{_number(metrics.get('heldout_before'), 3)} > {_number(metrics.get('heldout_after'), 3)}",
        _interval(gate.get("low"), gate.get("high")),
        _change_of(gate.get("regression_before"), gate.get("regression_after")),
        ", ".join(marks),
    ]


def _refused(run: dict[str, Any]) -> list[str]:
    """A run that published nothing, as cells."""
    return [
        "-",
        run["created"][5:16].replace("T", " "),
        run["parent_id"] or "none",
        f"{_number(run['heldout_before'], 3)} > {_number(run['heldout_after'], 3)}",
        _interval(run["gain_low"], run["gain_high"]),
        _change_of(run["regression_before"], run["regression_after"]),
        run["verdict"].replace("_", " "),
    ]


def _interval(low: Any, high: Any) -> str:
    if _number(low) == "-" or _number(high) == "-":
        return "-"
    return f"{low:+.2f} to {high:+.2f}"


def _change_of(before: Any, after: Any) -> str:
    return f"{after - before:+.4f}" if "-" not in (_number(before), _number(after)) else "-"


@adapters.command()
@click.argument("name", default="current")
@click.option("--json", "as_object", is_flag=True, help="Manifest, run and activations as JSON.")
def show(name: str, as_object: bool) -> None:
    """One adapter in full: NAME is an id, current, previous, latest or best."""
    known = Adapters(find_paths().adapters)
    id = known.resolve(name)
    if not id:
        raise SpecLoraError(f"there is no adapter {name!r}", "`specl-ctl adapters list` names them")
    manifest = known.manifest(id)
    runs, used = _history()
    run = next((run for run in runs if run["adapter_id"] == id), None)
    if as_object:
        click.echo(json.dumps(_object(known, manifest, run, used.get(id, []))))
        return
    facts = _facts(manifest, str(known.folder / id), known.current() == id)
    for key, value in [*facts, *_story(manifest, run, used.get(id, []))]:
        click.echo(f"{key:<24}{value}")


def _story(manifest: Manifest, run: dict[str, Any] | None, used: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """What the gate said, and what became of it."""
    gate = manifest.metrics.get("gate") if isinstance(manifest.metrics.get("gate"), dict) else {}
    lines: list[tuple[str, Any]] = []
    if gate:
        lines.append(("gain, 95% interval", _interval(gate.get("low"), gate.get("high"))))
        before, after = (_number(gate.get(f"regression_{when}")) for when in ("before", "after"))
        lines.append(("general text", f"{before} -> {after}"))
    if run is not None:
        lines.append(("verdict", f"{run['verdict']} ({run['caused_by']})"))
    for number, line in enumerate(used):
        why = "" if line["reason"] in SELF_EXPLAINING else f": {line['note']}"
        lines.append(("used" if number == 0 else "", f"{line['created']}  {line['event']}, {line['who']}{why}"))
    return lines


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
        ("imported from", training["imported"]) if "imported" in training else ("trained on", _data(training)),
        ("loss", f"{_figure(training, 'loss_first')} -> {_figure(training, 'loss_last')}"),
        ("training run", manifest.training_run_id),
    ]


def _data(training: dict[str, Any]) -> str:
    """What it learned from; runs before schema 2 did not count kinds."""
    kinds = [f"{training[name]} {name}" for name in ("failures", "successes", "replay") if name in training]
    sizes = [f"{len(training.get('generations', []))} generations", *kinds]
    return ", ".join([*sizes, f"{training.get('tokens', 0)} tokens", f"{training.get('steps', 0)} steps"])


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
