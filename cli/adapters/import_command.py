"""`specl-ctl adapters import`: has an external adapter judged by the rule that judges
every trained one.

Copies its files into the adapters folder, where the trainer reads them. The trainer evaluates the
adapter, and promotes or refuses it. The source directory is not changed.
"""

import json
import shutil
import time
import uuid
from dataclasses import asdict
from pathlib import Path

import click

from specl.cli.terminal import echo
from specl.shared.adapters.registry import Adapters
from specl.shared.errors import AdapterRejected, ConfigError, DaemonUnreachable, SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.messaging.codes import RunVerdict
from specl.shared.messaging.daemon_status import EvaluationStatus
from specl.shared.paths import find_paths

TRAINER_TIMEOUT_S = 10.0  # a trainer that loads models may be slow to answer


@click.command("import")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_object", is_flag=True, help="The verdict as one JSON object.")
def import_(directory: Path, as_object: bool) -> None:
    """Judge the adapter in DIRECTORY, and draft with it if it is better.

    DIRECTORY holds adapters.safetensors and adapter_config.json: an adapter of SpecLoRA, or one
    that mlx-lm's LoRA trainer wrote for the same draft. It is compared with the active adapter on
    held-out conversations and on general text, as a trained one is. The verdict is stored;
    `adapters list --all` shows it. Exit code 1 if it was not promoted.
    """
    registry = Adapters(find_paths().create().adapters)
    try:
        staged = registry.stage(directory, uuid.uuid4().hex)
    except AdapterRejected as error:
        raise ConfigError(str(error), "mlx-lm writes adapters.safetensors and adapter_config.json") from error
    except OSError as error:
        raise SpecLoraError(f"{directory} could not be copied: {error}") from error
    with Client() as client:
        try:
            reply = client.evaluate_adapter(staged.name, directory.absolute().name)
            if not reply.ok:
                raise SpecLoraError(reply.message)
        except DaemonUnreachable:
            shutil.rmtree(staged, ignore_errors=True)
            raise DaemonUnreachable(
                "the trainer, which judges adapters, does not run", "start it with `honcho start`"
            ) from None
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        outcome = _follow(client, reply.run_id)
    _print_outcome(outcome, reply.run_id, as_object)


def _follow(client: Client, run_id: str) -> EvaluationStatus:
    """Wait for the verdict, and report the trainer's state on stderr."""
    reported, last_answer = "", time.monotonic()
    while True:
        trainer = client.status().trainer
        if trainer is None:
            if time.monotonic() - last_answer < TRAINER_TIMEOUT_S:
                time.sleep(0.5)  # where the lock is free, `status` answers at once
                continue
            raise SpecLoraError("the trainer stopped before a verdict", "look into var/logs/trainer.log")
        last_answer = time.monotonic()
        outcome = trainer.evaluations.get(run_id)
        if outcome is None:
            raise SpecLoraError("the trainer was restarted before a verdict", "import the directory again")
        if outcome.verdict is not None:
            return outcome
        state = trainer.training.state
        if state not in (reported, "idle"):
            click.echo(state, err=True)
            reported = state
        time.sleep(0.5)


def _print_outcome(outcome: EvaluationStatus, run_id: str, as_object: bool) -> None:
    if as_object:
        click.echo(json.dumps(asdict(outcome) | {"run": run_id}))
    else:
        suffix = f" (adapter {outcome.adapter_id})" if outcome.adapter_id else ""
        echo(f"{outcome.verdict}: {outcome.reason}{suffix}")
    if outcome.verdict != RunVerdict.PROMOTED:
        raise SpecLoraError("the adapter was not promoted; the active adapter is unchanged")
