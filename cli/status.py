"""`specl-ctl status`: who runs, how well drafting does, what is being learned, and what is wrong. Imports no MLX.

Useful with every daemon down: the store, CURRENT and the locks are read from disk then.
"""

import json
import time
from typing import TYPE_CHECKING, Any

import click

from specl.shared.messaging.client import Client
from specl.shared.paths import ROLES
from specl.shared.status import collect

if TYPE_CHECKING:
    from rich.table import Table

    from specl.shared.settings.schema import Settings


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _watched(watch: dict[str, Any]) -> str:
    """How a promoted adapter does on live traffic."""
    seen = f"acceptance {_share(watch['acceptance'])} of {watch['drafted']} tokens in {watch['requests']} requests"
    return f"{watch['adapter']} {watch['state'].replace('_', ' ')}: {seen}, before it {_share(watch['before'])}"


def render(found: dict[str, Any], settings: "Settings") -> "Table":
    """The same for a person."""
    from rich.table import Table  # --json goes without

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    colours = {"ready": "green", "busy": "green", "starting": "yellow", "stopped": "red", "failed": "red"}
    for role in ROLES:
        daemon = found[role]
        up = f", up {daemon['uptime_s']:.0f} s" if daemon["uptime_s"] is not None else ""
        pid = f" (pid {daemon['pid']}{up})" if daemon["pid"] else ""
        table.add_row(role, f"[{colours[daemon['state']]}]{daemon['state']}[/]{pid}")
    gateway = found["gateway"]
    if gateway["enabled"]:
        where = f" ({gateway['address']})" if gateway["address"] else ""
        table.add_row("gateway", f"[{colours[gateway['state']]}]{gateway['state']}[/]{where}")
    queue, acceptance, failures = found["queue"], found["acceptance"], found["failures"]
    idle = (
        "" if found["models"].get("loaded", True) or found["inference"]["state"] != "ready" else " (let go while idle)"
    )
    table.add_row("models", f"{found['models']['target']} drafted by {found['models']['draft'] or 'nothing'}{idle}")
    table.add_row("queue", f"{queue['in_flight']} in flight, {queue['depth']} waiting")
    table.add_row("acceptance", f"rolling {_share(acceptance['rolling'])}, lifetime {_share(acceptance['lifetime'])}")
    for adapter, value in acceptance["by_adapter"].items():
        table.add_row("", f"adapter {adapter}: {_share(value)}")
    speed = found["tokens_per_second"]["rolling"]
    table.add_row("speed", f"{speed:.1f} tokens a second (last 50)" if speed else "-")
    table.add_row(
        "failures", f"{failures['pending']} of {failures['trigger']} until training, {failures['total']} in all"
    )
    waiting = "?" if found["outbox"]["pending"] is None else found["outbox"]["pending"]
    kept = found["store"]
    stored = f"{kept['generations']} generations, {kept['disagreements']} disagreements, {waiting} on the way"
    table.add_row("store", stored)
    adapter = found["adapter"]
    table.add_row("adapter", f"{adapter['active'] or 'none'}, before it {adapter['previous'] or 'none'}")
    if watch := adapter["watch"]:
        table.add_row("", _watched(watch))
    training = found["training"]
    loss = f", loss {training['loss']:.4f}" if training.get("loss") is not None else ""
    done = f", {training['step']} of {training['total']}" if training.get("total") else ""
    doing = f"{training['state']}{done}{loss}"
    if waits := training.get("waits"):
        doing = f"waits: {waits}" + ("" if training["state"] == "idle" else f" ({doing})")
    table.add_row("training", doing)
    if verdict := training["last_verdict"]:
        table.add_row("last verdict", f"{verdict['verdict']}: {verdict['reason']} ({verdict['created']})")
    for problem in found["problems"]:
        table.add_row("[red]problem[/]", problem)
    return table


@click.command()
@click.option("--json", "as_object", is_flag=True, help="One JSON object.")
@click.option("--watch", is_flag=True, help="Refresh every second until Ctrl-C.")
def status(as_object: bool, watch: bool) -> None:
    """Who runs, queue, acceptance, failures, training, adapter, and what is wrong."""
    with Client() as client:
        if not watch:
            found = collect(client)
            if as_object:
                click.echo(json.dumps(found))
                return
            from rich.console import Console

            Console().print(render(found, client.settings))
            return
        if as_object:
            while True:
                click.echo(json.dumps(collect(client)))
                time.sleep(1)
        from rich.live import Live

        with Live(render(collect(client), client.settings), refresh_per_second=2) as live:
            while True:
                time.sleep(1)
                live.update(render(collect(client), client.settings))
