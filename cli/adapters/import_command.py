"""`specl-ctl adapters import`: an adapter made elsewhere goes through the gate that every trained one goes through.

The files are copied beside the adapters, where the trainer reads them; it scores, promotes or refuses. Nothing of the source
directory is changed.
"""

import json
import shutil
import time
import uuid
from dataclasses import asdict
from pathlib import Path

import click

from specl.shared.adapters.registry import Adapters
from specl.shared.errors import AdapterRejected, ConfigError, DaemonUnreachable, SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.messaging.codes import RunVerdict
from specl.shared.messaging.daemon_status import EvaluationStatus
from specl.shared.paths import find_paths

SILENCE_S = 10.0  # a trainer that loads models may be slow to answer


@click.command("import")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_object", is_flag=True, help="The verdict as one JSON object.")
def import_(directory: Path, as_object: bool) -> None:
    """Judge the adapter in DIRECTORY; draft with it if it proves better.

    DIRECTORY holds adapters.safetensors and adapter_config.json: an adapter of SpecLoRA's, or what mlx-lm's LoRA trainer wrote
    for the same draft. It is scored against the adapter in force on held-out conversations and on general text, as a trained
    one is. Whatever the verdict, it is stored; `adapters list --all` shows it. Exit code 1 where it was not promoted.
    """
    known = Adapters(find_paths().create().adapters)
    try:
        staged = known.stage(directory, uuid.uuid4().hex)
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
    _tell(outcome, reply.run_id, as_object)


def _follow(client: Client, run_id: str) -> EvaluationStatus:
    """Wait for the verdict, saying on stderr where it is."""
    said, heard = "", time.monotonic()
    while True:
        trainer = client.status().trainer
        if trainer is None:
            if time.monotonic() - heard < SILENCE_S:
                continue
            raise SpecLoraError("the trainer stopped before a verdict", "look into var/logs/trainer.log")
        heard = time.monotonic()
        outcome = trainer.evaluations.get(run_id)
        if outcome is None:
            raise SpecLoraError("the trainer was restarted before a verdict", "import the directory again")
        if outcome.verdict is not None:
            return outcome
        state = trainer.training.state
        if state not in (said, "idle"):
            click.echo(state, err=True)
            said = state
        time.sleep(0.5)


def _tell(outcome: EvaluationStatus, run_id: str, as_object: bool) -> None:
    if as_object:
        click.echo(json.dumps(asdict(outcome) | {"run": run_id}))
    else:
        named = f" (adapter {outcome.adapter_id})" if outcome.adapter_id else ""
        click.echo(f"{outcome.verdict}: {outcome.reason}{named}")
    if outcome.verdict != RunVerdict.PROMOTED:
        raise SpecLoraError("the adapter was not promoted; what drafts is unchanged")
