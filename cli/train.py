"""`specl-ctl train`: ask the trainer for a run, and watch it if wanted."""

import time

import click

from specl.cli.status import collect
from specl.shared.errors import SpecLoraError
from specl.shared.messaging.client import Client


@click.command()
@click.option(
    "--now",
    is_flag=True,
    help="Train on what there is: not waiting for training.min_failure_cases, on battery or hot too.",
)
@click.option("--wait", is_flag=True, help="Stay until the run has ended, and print its verdict.")
def train(now: bool, wait: bool) -> None:
    """Ask the trainer for a run; `status` shows how it goes.

    A run trains LoRA on stored disagreements and publishes the adapter only if agreement with the target rose on
    conversations that were held out.
    """
    with Client() as client:
        before = (collect(client)["training"]["last_verdict"] or {}).get("created"), time.time()
        reply = client.train(now)
        if not reply.ok:
            raise SpecLoraError(reply.message)
        click.echo(reply.message)
        if wait:
            _follow(client, before[0])


def _follow(client: Client, before: str | None) -> None:
    """Print where the run is until a new verdict is stored."""
    said = ""
    while True:
        found = collect(client)
        training = found["training"]
        verdict = training["last_verdict"]
        if verdict and verdict["created"] != before:
            click.echo(
                f"{verdict['verdict']}: {verdict['reason']}"
                + (f" (adapter {verdict['adapter_id']})" if verdict["adapter_id"] else "")
            )
            if verdict["verdict"] in ("failed", "no_data", "no_verdict"):
                raise SpecLoraError("the run published nothing")
            return
        if found["trainer"]["state"] == "stopped":
            raise SpecLoraError("the trainer stopped", "look into var/logs/trainer.log")
        loss = f", loss {training['loss']:.3f}" if training.get("loss") is not None else ""
        line = f"{training['state']} {training['step']}/{training.get('total', 0)}{loss}"
        if waits := training.get("waits"):
            line += f"; training waits: {waits}"
        if line != said:
            click.echo(line, err=True)
            said = line
        time.sleep(1)
