"""`specl-ctl status`: who runs, how well drafting does, what is being learned, and what is wrong. Imports no MLX.

Useful with every daemon down: the store, CURRENT and the locks are read from disk then.
"""

import json
import time
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from specl.shared.adapters import Adapters
from specl.shared.client import Client
from specl.shared.config import Settings
from specl.shared.paths import ROLES, Paths
from specl.shared.process import holder_of, is_locked

START = "start it with `honcho start`"


def _daemon(body: dict[str, Any] | None, role: str, paths: Paths) -> dict[str, Any]:
    if body is not None:
        return {"state": body["state"], "pid": body["pid"], "uptime_s": body["uptime_s"]}
    held = is_locked(paths.run, role)
    return {
        "state": "starting" if held else "stopped",
        "pid": holder_of(paths.run, role) if held else None,
        "uptime_s": None,
    }


def _store_summary(answers: dict[str, Any], paths: Paths, problems: list[str]) -> dict[str, Any]:
    """The collector's view, or our own where it is down (only then is sqlalchemy imported)."""
    if answers.get("collector", {}).get("summary"):
        return answers["collector"]["summary"]
    from dataclasses import asdict

    from specl.shared.errors import StoreError
    from specl.shared.store import Store

    try:
        store = Store(paths.store, read_only=True)
        try:
            return asdict(store.summary())
        finally:
            store.close()
    except StoreError as error:
        if paths.store.exists():
            problems.append(str(error))
        return {}


def _problems(answers: dict[str, Any], daemons: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    found = [f"{role} does not run; {START}" for role in ROLES if daemons[role]["state"] == "stopped"]
    inference, collector, trainer = (answers.get(role, {}) for role in ROLES)
    if inference.get("blas", {}).get("fast") is False:
        found.append(f"slow BLAS in use ({inference['blas']['bound']}); `specl-ctl doctor` says what to do")
    if trouble := inference.get("outbox", {}).get("trouble"):
        found.append(f"records refused ({inference['outbox']['refused']}): {trouble}")
    if collector.get("trouble"):
        found.append(f"store: {collector['trouble']}")
    if trainer.get("trouble"):
        found.append(f"training: {trainer['trouble']}")
    for id, reason in inference.get("adapter", {}).get("rejected", {}).items():
        found.append(f"adapter {id} refused: {reason}")
    if summary.get("quarantined"):
        found.append(f"{summary['quarantined']} records in quarantine (table `quarantine` of the store)")
    return found


def collect(client: Client) -> dict[str, Any]:
    """Everything that `status` shows, under its documented keys."""
    paths, settings = client.paths, client.settings
    answers = client.status()
    problems: list[str] = []
    summary = _store_summary(answers, paths, problems)
    daemons = {role: _daemon(answers.get(role), role, paths) for role in ROLES}
    inference, trainer = answers.get("inference", {}), answers.get("trainer", {})
    adapter = inference.get("adapter") or {"active": Adapters(paths.adapters).current(), "previous": ""}
    pending = {name: answers[name]["outbox"]["pending"] for name in ("inference", "trainer") if name in answers}
    return {
        **daemons,
        "queue": inference.get("queue", {"depth": 0, "in_flight": 0}),
        "outbox": {"pending": sum(pending.values()) if pending else None, "by_producer": pending},
        "acceptance": {
            "rolling": summary.get("rolling_acceptance"),
            "lifetime": summary.get("lifetime_acceptance"),
            "by_adapter": summary.get("by_adapter", {}),
        },
        "failures": {
            "total": summary.get("failures", 0),
            "pending": summary.get("pending_failures", 0),
            "trigger": settings.training.min_failure_cases,
        },
        "store": {
            "path": str(paths.store),
            "generations": summary.get("generations", 0),
            "disagreements": summary.get("disagreements", 0),
        },
        "adapter": {name: adapter.get(name, "") for name in ("active", "previous", "form")},
        "training": {
            **(trainer.get("training") or {"state": "stopped", "step": 0, "loss": None}),
            "last_verdict": summary.get("last_verdict"),
        },
        "tokens_per_second": {"rolling": summary.get("rolling_tokens_per_second")},
        "models": inference.get("models", {"target": settings.models.target.name, "draft": settings.models.draft.name}),
        "problems": problems + _problems(answers, daemons, summary),
        "gateway": None,
    }


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def render(found: dict[str, Any], settings: Settings) -> Table:
    """The same for a person."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    colours = {"ready": "green", "busy": "green", "starting": "yellow", "stopped": "red", "failed": "red"}
    for role in ROLES:
        daemon = found[role]
        up = f", up {daemon['uptime_s']:.0f} s" if daemon["uptime_s"] is not None else ""
        pid = f" (pid {daemon['pid']}{up})" if daemon["pid"] else ""
        table.add_row(role, f"[{colours[daemon['state']]}]{daemon['state']}[/]{pid}")
    queue, acceptance, failures = found["queue"], found["acceptance"], found["failures"]
    table.add_row("models", f"{found['models']['target']} drafted by {found['models']['draft'] or 'nothing'}")
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
    training = found["training"]
    loss = f", loss {training['loss']:.4f}" if training.get("loss") is not None else ""
    table.add_row("training", f"{training['state']}, step {training['step']}{loss}")
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
            click.echo(json.dumps(found)) if as_object else Console().print(render(found, client.settings))
            return
        if as_object:
            while True:
                click.echo(json.dumps(collect(client)))
                time.sleep(1)
        with Live(render(collect(client), client.settings), refresh_per_second=2) as live:
            while True:
                time.sleep(1)
                live.update(render(collect(client), client.settings))
