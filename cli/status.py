"""`specl-ctl status`: the daemons, acceptance and speed, what is being learned, and what is wrong.
Imports no MLX.

Shows what `shared/status.py` collects, which reads the disk where a daemon does not run.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, NoReturn

import click

from specl.shared.messaging.client import Client
from specl.shared.messaging.codes import DaemonState
from specl.shared.messaging.daemon_status import CollapseCheckStatus
from specl.shared.paths import ROLES
from specl.shared.runtime.terminal import all_visible
from specl.shared.status import SystemStatus, TrainingView, system_status

if TYPE_CHECKING:
    from rich.table import Table


REFRESH_S = 1.0
Row = tuple[str, str]  # label and text
_COLOURS = {
    DaemonState.READY: "green",
    DaemonState.BUSY: "green",
    DaemonState.STARTING: "yellow",
    DaemonState.STOPPED: "red",
    DaemonState.FAILED: "red",
}


def _coloured(state: DaemonState) -> str:
    return f"[{_COLOURS[state]}]{state}[/]"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _collapse_check_text(watch: CollapseCheckStatus) -> str:
    """The collapse check of a newly activated adapter."""
    counts = f"acceptance {_rate(watch.acceptance)} of {watch.drafted} first drafted tokens"
    return f"{watch.adapter} {watch.state.replace('_', ' ')}: {counts} in {watch.requests} requests"


def render(status: SystemStatus) -> "Table":
    """The status as a table for people."""
    from rich.table import Table  # --json does not need it

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for row in (*_process_rows(status), *_serving_rows(status), *_learning_rows(status)):
        table.add_row(*row)
    for problem in status.problems:
        table.add_row("[red]problem[/]", problem)
    return table


def _process_rows(status: SystemStatus) -> Iterator[Row]:
    for role in ROLES:
        process = status.process(role)
        up = f", up {process.uptime_s:.0f} s" if process.uptime_s is not None else ""
        pid = f" (pid {process.pid}{up})" if process.pid else ""
        yield role, f"{_coloured(process.state)}{pid}"
    if status.gateway.enabled:
        where = f" ({status.gateway.address})" if status.gateway.address else ""
        yield "gateway", f"{_coloured(status.gateway.state)}{where}"


def _serving_rows(status: SystemStatus) -> Iterator[Row]:
    models, queue, acceptance = status.models, status.queue, status.acceptance
    idle = " (unloaded while idle)" if status.inference.state == DaemonState.READY and not models.loaded else ""
    yield "models", f"{models.target} drafted by {models.draft or 'nothing'}{idle}"
    yield "queue", f"{queue.in_flight} in flight, {queue.depth} waiting"
    yield "acceptance", f"rolling {_rate(acceptance.rolling)}, lifetime {_rate(acceptance.lifetime)}"
    for adapter, value in acceptance.by_adapter.items():
        yield "", f"adapter {adapter}: {_rate(value)}"
    speed = status.tokens_per_second.rolling
    yield "speed", f"{speed:.1f} tokens a second (last 50)" if speed else "-"


def _learning_rows(status: SystemStatus) -> Iterator[Row]:
    failures, store, adapter = status.failures, status.store, status.adapter
    yield "failures", f"{failures.pending} of {failures.trigger} until training, {failures.total} in all"
    pending = "?" if status.outbox.pending is None else status.outbox.pending
    yield "store", f"{store.generations} generations, {store.disagreements} disagreements, {pending} on the way"
    yield "adapter", f"{adapter.active or 'none'}, before it {adapter.previous or 'none'}"
    if adapter.watch is not None:
        yield "", _collapse_check_text(adapter.watch)
    yield "training", _training(status.training)
    if last := status.training.last_verdict:
        yield "last verdict", f"{last.verdict}: {last.reason} ({last.created})"


def _training(training: TrainingView) -> str:
    loss = f", loss {training.loss:.4f}" if training.loss is not None else ""
    done = f", {training.step} of {training.total}" if training.total else ""
    doing = f"{training.state}{done}{loss}"
    if not training.waits:
        return doing
    return f"waits: {training.waits}" + ("" if training.state == "idle" else f" ({doing})")


@click.command()
@click.option("--json", "as_object", is_flag=True, help="One JSON object.")
@click.option("--watch", is_flag=True, help="Refresh every second until Ctrl-C.")
def status(as_object: bool, watch: bool) -> None:
    """Daemons, queue, acceptance, failures, training, adapter, and what is wrong."""
    with Client() as client:
        if not watch:
            _print(system_status(client), as_object)
        elif as_object:
            while True:
                _print(system_status(client), as_object)
                time.sleep(REFRESH_S)
        else:
            _watch(client)


def _print(status: SystemStatus, as_object: bool) -> None:
    if as_object:
        click.echo(json.dumps(asdict(status)))
        return
    from rich.console import Console

    Console().print(render(all_visible(status)))


def _watch(client: Client) -> NoReturn:
    from rich.live import Live

    with Live(render(all_visible(system_status(client))), refresh_per_second=2) as live:
        while True:
            time.sleep(REFRESH_S)
            live.update(render(all_visible(system_status(client))))
