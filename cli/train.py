"""`specl-ctl train`: ask the trainer for a run, and follow it with --wait."""

import time

import click

from specl.cli.terminal import echo
from specl.shared.errors import SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.messaging.codes import DaemonState, RunVerdict
from specl.shared.status import system_status


@click.command()
@click.option(
    "--now",
    is_flag=True,
    help="Train on the failures there are, without waiting for training.min_failure_cases, on battery or hot too.",
)
@click.option("--wait", is_flag=True, help="Wait until the run has ended, and print its verdict.")
def train(now: bool, wait: bool) -> None:
    """Ask the trainer for a run; `status` shows how it goes.

    A run trains a LoRA adapter on stored disagreements. It publishes the adapter only if agreement
    with the target rose on held-out conversations.
    """
    with Client() as client:
        last = system_status(client).training.last_verdict
        reply = client.train(now)
        if not reply.ok:
            raise SpecLoraError(reply.message)
        echo(reply.message)
        if wait:
            _follow(client, last.created if last else None)


def _follow(client: Client, before: str | None) -> None:
    """Print the progress of the run until a verdict other than the one of `before` is stored."""
    printed = ""
    while True:
        status = system_status(client)
        training, last = status.training, status.training.last_verdict
        if last and last.created != before:
            echo(f"{last.verdict}: {last.reason}" + (f" (adapter {last.adapter_id})" if last.adapter_id else ""))
            if last.verdict in (RunVerdict.FAILED, RunVerdict.NO_DATA, RunVerdict.NO_VERDICT):
                raise SpecLoraError("the run published nothing")
            return
        if status.trainer.state == DaemonState.STOPPED:
            raise SpecLoraError("the trainer stopped", "look into var/logs/trainer.log")
        loss = f", loss {training.loss:.3f}" if training.loss is not None else ""
        line = f"{training.state} {training.step}/{training.total}{loss}"
        if training.waits:
            line += f"; training waits: {training.waits}"
        if line != printed:
            click.echo(line, err=True)
            printed = line
        time.sleep(1)
