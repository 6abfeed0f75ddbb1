"""`specl-ctl store purge`: forget generations everywhere. Options, the lock and the printing;
`shared/retention/purge.py` does it.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click

from specl.shared.errors import AlreadyRunning, SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.retention.delegate import require_local_files
from specl.shared.retention.purge import COMMAND, Purger, full_ids
from specl.shared.retention.purge_journal import PurgeRequest
from specl.shared.runtime.locks import Lock

EVERYTHING = 250_000_000_000.0  # everything is older than the year 9892
RESUME = "what is left is noted; `specl-ctl store purge --resume` goes on with it"


@click.command()
@click.option("--id", "ids", multiple=True, help="A generation id (or its beginning); may be given several times.")
@click.option("--before", "age", help="Everything older than e.g. 90m, 12h or 30d, or than a date (2026-01-31).")
@click.option("--pattern", default="", help="Everything whose prompt or answer contains this text.")
@click.option("--all", "everything", is_flag=True, help="Every generation there is.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--drop-adapters", is_flag=True, help="Also remove adapters that learned from them.")
@click.option("--retrain", is_flag=True, help="Remove those adapters and train anew on what is left.")
@click.option("--resume", is_flag=True, help="Only finish a purge that was stopped half-way.")
@click.option("--json", "as_object", is_flag=True, help="One JSON object; asks nothing, so it needs --yes.")
def purge(
    ids: tuple[str, ...],
    age: str | None,
    pattern: str,
    everything: bool,
    yes: bool,
    drop_adapters: bool,
    retrain: bool,
    resume: bool,
    as_object: bool,
) -> None:
    """Forget generations everywhere: store and its copies, outboxes, hidden states, past answers,
    checkpoints, caches, logs.

    It cannot be undone: what is deleted is overwritten on disk. An adapter holds no text, but may
    have learned from it: those are named; --drop-adapters removes them, with all that were trained
    on from them, and --retrain also starts a training run from the newest adapter that never saw
    the text.

    One that was stopped half-way (Ctrl-C, a program that reads the store, a daemon that died) is
    finished by the next one, or by --resume alone.
    """
    requested = bool(ids or age or pattern or everything)
    if not (requested or resume):
        raise click.UsageError("say what to forget: --id, --before, --pattern or --all")
    if requested and resume:
        raise click.UsageError("--resume finishes what was asked for before; it goes alone")
    now = time.time()
    before = EVERYTHING if everything else parse_time(age, now) if age else None
    if as_object and not yes and requested:
        raise click.UsageError("--json asks nothing; say --yes")
    if not yes and requested:
        click.confirm("Forget the matching generations for good?", abort=True)
    with Client() as client, _exclusive(client):
        report = (lambda line: None) if as_object else click.echo
        outcome = Purger(client, report).resume()
        if requested:
            all_ids = full_ids(client.paths, ids, outcome.ids if outcome else ())
            request = PurgeRequest(now, all_ids, before, pattern, everything, drop_adapters or retrain, retrain)
            outcome = Purger(client, report).run(request)
        elif outcome is None:
            report("no purge was stopped half-way")
    if as_object:
        values = asdict(outcome) if outcome else {}
        click.echo(json.dumps({name: value for name, value in values.items() if name != "ids"}))


@contextmanager
def _exclusive(client: Client) -> Iterator[None]:
    """One purge at a time, on the machine that has the files. Raises SpecLoraError, with how to go
    on where one was stopped.
    """
    require_local_files(client, "purge")
    try:
        lock = Lock(client.paths.create().run, "purge", COMMAND)
    except AlreadyRunning as error:
        raise SpecLoraError(str(error), "wait until it has finished") from None
    try:
        yield
    except KeyboardInterrupt:
        if client.paths.pending_purge.exists():
            click.echo(RESUME, err=True)
        raise
    except SpecLoraError as error:
        if client.paths.pending_purge.exists():
            error.hint = "; ".join([*([error.hint] if error.hint else []), RESUME])
        raise
    finally:
        lock.release()


def parse_time(text: str, now: float) -> float:
    """The time that `text` means: an age (90m, 12h, 30d) or a date. Raises UsageError."""
    units = {"m": 60, "h": 3600, "d": 86400}
    try:
        if text[-1:] in units:
            age = float(text[:-1]) * units[text[-1]]
            if not 0 <= age < math.inf:
                raise ValueError
            return now - age
        return time.mktime(time.strptime(text, "%Y-%m-%d"))
    except (ValueError, OverflowError):
        raise click.UsageError(
            f"an age is written like 90m, 12h or 30d, a date like 2026-01-31, not {text!r}"
        ) from None
