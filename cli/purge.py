"""Forgetting: every room's purge hook, through its daemon or, where that is down, with its lock and the same code.

Done means that the bytes of the purged text are found in no file under the run directory. The models folder is not searched:
nothing of a user's is in it. An adapter learned from text but does not hold it; those are named, and dropped if wanted.
"""

import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from specl.cli.byte_search import Pieces, count, files_with, holds, leave_out, pieces_of
from specl.cli.lines import HISTORY
from specl.shared import checkpoints
from specl.shared.adapters import Adapters
from specl.shared.client import Client
from specl.shared.engine.past import PastAnswers
from specl.shared.errors import DaemonUnreachable, SpecLoraError
from specl.shared.hidden import HiddenSpool
from specl.shared.outbox import Outbox
from specl.shared.paths import Paths
from specl.shared.privacy import is_meant, texts_of
from specl.shared.process import Lock, is_locked
from specl.shared.store import Store
from specl.shared.wire import Purge, Reply, Row

EVERYTHING = 250_000_000_000.0  # older than the year 9892 is everything
ROUNDS = 50  # records may be on their way from an outbox to the store, and one round takes a bounded number
PRODUCERS = ("inference", "trainer")
PATIENCE_S = 60.0  # a trainer that loads its models looks up only then


# ---------------------------------------------------------------------------------------------------- the command
@click.command()
@click.option("--id", "ids", multiple=True, help="A generation id (or its beginning); may be given several times.")
@click.option("--before", "age", help="Everything older than e.g. 90m, 12h or 30d, or than a date (2026-01-31).")
@click.option("--pattern", default="", help="Everything whose prompt or answer contains this text.")
@click.option("--all", "everything", is_flag=True, help="Every generation there is.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--drop-adapters", is_flag=True, help="Also remove adapters that learned from them.")
@click.option("--retrain", is_flag=True, help="Remove those adapters and train anew on what is left.")
@click.option("--json", "as_object", is_flag=True, help="One JSON object; asks nothing, so it needs --yes.")
def purge(
    ids: tuple[str, ...],
    age: str | None,
    pattern: str,
    everything: bool,
    yes: bool,
    drop_adapters: bool,
    retrain: bool,
    as_object: bool,
) -> None:
    """Forget generations everywhere: store, outboxes, hidden states, past answers, checkpoints, caches, logs.

    It cannot be undone, and ends only when a search for the text finds nothing under the run directory. An adapter holds no
    text, but may have learned from it: those are named; --drop-adapters removes them, with all that were trained on from
    them, and --retrain also starts a training run from the newest adapter that never saw the text.
    """
    if not (ids or age or pattern or everything):
        raise click.UsageError("say what to forget: --id, --before, --pattern or --all")
    before = EVERYTHING if everything else moment(age, time.time()) if age else None
    if as_object and not yes:
        raise click.UsageError("--json asks nothing; say --yes")
    if not yes:
        click.confirm("Forget the matching generations for good?", abort=True)
    with Client() as client:
        forgetting = Forgetting(client, Purge(full_ids(client.paths, ids), before, pattern))
        for line in forgetting.run(drop_adapters or retrain, retrain):
            if not as_object:
                click.echo(line)
    if as_object:
        click.echo(json.dumps(forgetting.outcome))


def moment(text: str, now: float) -> float:
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


def full_ids(paths: Paths, beginnings: Iterable[str]) -> list[str]:
    """The ids that begin so, in the store or an outbox. Raises SpecLoraError for none or several."""
    full = []
    with _rooms(paths) as (store, outboxes):
        waiting = [id for outbox in outboxes for id in outbox.matching(lambda row: True)]
        for begin in beginnings:
            found = {id for id in waiting if id.startswith(begin)}
            if store is not None and (row := store.generation(begin)) is not None:
                found.add(row.values["id"])
            if len(found) != 1:
                raise SpecLoraError(f"no single generation begins with {begin!r}")
            full += found
    return full


def forget(ids: list[str], before: float | None, pattern: str) -> Iterator[str]:
    """Purge everywhere; a line for each thing worth saying. Raises SpecLoraError where a room could not."""
    with Client() as client:
        yield from Forgetting(client, Purge(ids, before, pattern)).run(drop_adapters=False, retrain=False)


# ---------------------------------------------------------------------------------------------------- the work
class Forgetting:
    """One purge of one run directory."""

    def __init__(self, client: Client, wish: Purge) -> None:
        self.client, self.paths, self.wish = client, client.paths, wish
        self.ids: set[str] = set(wish.ids)
        self.texts: set[str] = {wish.pattern} - {""}
        self.outcome: dict[str, Any] = {"adapters": [], "dropped": [], "active": None, "retraining": None}

    def run(self, drop_adapters: bool, retrain: bool) -> Iterator[str]:
        """Do it; a line for each thing worth saying. Raises SpecLoraError while anything is left."""
        stored = 0
        for _ in range(ROUNDS):
            found, removed = self._round()
            stored += removed
            if not found:
                break
        self.outcome |= {"stored": stored, "forgotten": len(self.ids)}
        yield f"{stored} generations removed from the store, {len(self.ids)} forgotten in all"
        self._wait_for_the_trainer()
        yield from self._backups()
        yield from self._adapters(drop_adapters, retrain)
        yield from self._search()

    def _round(self) -> tuple[bool, int]:
        """Every room once, outboxes first: what they hold may travel. Whether anything was found, and how many stored."""
        self._remember()
        found: set[str] = set()
        for role in PRODUCERS:
            found |= set(self._tell(role, self.wish).details.get("ids", []))
        reply = self._tell("collector", self.wish)
        stored = list(reply.details.get("ids", []))
        found |= set(stored)
        self.ids |= found
        for role in PRODUCERS:  # hidden states, checkpoints and evaluations go by id
            self._tell(role, Purge(sorted({*self.wish.ids, *found}), None, ""))
        return bool(found), len(stored)

    def _remember(self) -> None:
        """The texts that are to be gone afterwards, and the pattern in whichever case it stands there."""
        with _rooms(self.paths) as (store, outboxes):
            if store is not None:
                ids = store.matching(self.wish.ids, self.wish.before, self.wish.pattern)
                self.texts.update(store.texts(ids))
            for outbox in outboxes:
                outbox.matching(lambda row: is_meant(self.wish, row) and self._note(row))
        if self.wish.pattern:
            wanted = re.compile(re.escape(self.wish.pattern), re.IGNORECASE)
            self.texts.update({found for text in self.texts for found in wanted.findall(text)})

    def _note(self, row: Row) -> bool:
        self.texts.update(texts_of(row))
        return True

    def _tell(self, role: str, wish: Purge) -> Reply:
        """Through the daemon; where it is down, with its lock and the same code."""
        there = is_locked(self.paths.run, role)
        reply = self.client.command(role, wish) if there else self._in_its_place(role, wish)
        if not reply.ok:
            raise SpecLoraError(f"{role}: {reply.message}", "nothing else was touched; purge again once that is solved")
        return reply

    def _in_its_place(self, role: str, wish: Purge) -> Reply:
        lock = Lock(self.paths.create().run, role)
        try:
            if role == "collector":
                if not self.paths.store.exists():
                    return Reply(True, "there is no store")
                store = Store(self.paths.store)
                try:
                    ids = store.matching(wish.ids, wish.before, wish.pattern)
                    store.purge(ids)
                finally:
                    store.close()
                return Reply(True, "", {"ids": ids})
            return self._producer_files(role, wish)
        finally:
            lock.release()

    def _producer_files(self, role: str, wish: Purge) -> Reply:
        ids: list[str] = []
        if self.paths.outbox(role).exists():
            outbox = Outbox(self.paths.outbox(role))
            ids = outbox.matching(lambda row: is_meant(wish, row))
            outbox.purge(ids)
            outbox.close()
        forgotten = [*wish.ids, *ids]
        if role == "inference":
            HiddenSpool(self.paths.hidden, 0).purge(forgotten)
            PastAnswers(self.paths.answers).purge()
        elif forgotten:
            checkpoints.forget(checkpoints.checkpoint_folder(self.paths.training))
        return Reply(True, "", {"ids": ids})

    def _wait_for_the_trainer(self) -> None:
        """A run that is told to end does so between two of its steps; until then it may still write."""
        checkpoint = checkpoints.checkpoint_folder(self.paths.training)
        end = time.monotonic() + PATIENCE_S
        while self._is_ending() or self.ids & checkpoints.generations_in(checkpoint):
            if time.monotonic() > end:
                raise SpecLoraError("the trainer did not end its run in time", "purge again, or stop the trainer")
            time.sleep(0.1)

    def _is_ending(self) -> bool:
        trainer = self.client.status().get("trainer", {})
        return bool(trainer.get("training", {}).get("abandoning"))

    def _backups(self) -> Iterator[str]:
        """Copies of the store from before an upgrade, one that was cut short included: they hold what it held."""
        for path in sorted([*self.paths.root.glob("store.db.backup-*"), *self.paths.root.glob(".store.db.backup-*")]):
            if files_with([path], pieces_of(self.texts)):
                path.unlink()
                yield f"{path.name} held purged text and is removed"

    def _adapters(self, drop: bool, retrain: bool) -> Iterator[str]:
        adapters = Adapters(self.paths.adapters)
        learned = adapters.trained_on(sorted(self.ids))
        self.outcome["adapters"] = learned
        if not learned:
            return
        if not drop:
            yield f"adapters that learned from them: {', '.join(learned)} (--drop-adapters removes them, --retrain replaces them)"
            return
        if adapters.current() in learned:
            clean = self._fall_back(adapters, learned)
            self.outcome["active"] = clean
            yield f"drafting with adapter {clean}" if clean else "drafting without an adapter"
        adapters.drop(learned)
        self.outcome["dropped"] = learned
        yield f"adapters removed: {', '.join(learned)}"
        if retrain:
            yield self._train(adapters.current())

    def _fall_back(self, adapters: Adapters, learned: list[str]) -> str:
        """Draft with the newest adapter that never saw them and was not rolled back, or with none; which."""
        gone = {*learned, *adapters.rolled_back()}
        for id in [*(id for id in reversed(adapters.ids()) if id not in gone), ""]:
            try:
                reply = self.client.set_adapter(id)
            except DaemonUnreachable:  # whoever starts next looks at CURRENT
                adapters.set_current(id)
                return id
            if reply.ok:
                return id
        raise SpecLoraError(f"inference keeps its adapter: {reply.message}", "purge again once that is solved")

    def _train(self, parent: str) -> str:
        """Ask for a run on what is left, from where drafting now stands."""
        try:
            reply = self.client.train(now=True)
        except DaemonUnreachable:
            return "the trainer does not run; start it, then `specl-ctl train --now`"
        self.outcome["retraining"] = reply.ok
        if not reply.ok:
            return f"not trained anew: {reply.message}; then `specl-ctl train --now`"
        return f"training on what is left, from {f'adapter {parent}' if parent else 'the draft as it was shipped'}: {reply.message}"

    def _search(self) -> Iterator[str]:
        """The proof. What other generations say too (a template's own words, say) is theirs to keep."""
        pieces = pieces_of(self.texts)
        wanted = count(pieces)
        with _rooms(self.paths) as (store, outboxes):
            for text in store.written() if store is not None else ():
                leave_out(text.encode(), pieces)
            for outbox in outboxes:
                outbox.matching(lambda row: leave_out(row.body, pieces))
        _scrub_logs(self.paths.logs, pieces)
        found = files_with(_own_files(self.paths), pieces)
        if found:
            names = ", ".join(str(path.relative_to(self.paths.root)) for path in found)
            raise SpecLoraError(
                f"purged text is still found in {names}", "a request with the same text may be running; purge again"
            )
        searched = count(pieces)
        self.outcome |= {"searched": searched, "shared": wanted - searched}
        yield f"a search for {searched} pieces of the purged text finds nothing under {self.paths.root}"
        if wanted > searched:
            yield f"{wanted - searched} pieces were not searched for: other generations hold the same"


@contextmanager
def _rooms(paths: Paths) -> Iterator[tuple[Store | None, list[Outbox]]]:
    """The store (to read) and the outboxes, as far as they exist."""
    store = Store(paths.store, read_only=True) if paths.store.exists() else None
    outboxes = [Outbox(paths.outbox(name)) for name in PRODUCERS if paths.outbox(name).exists()]
    try:
        yield store, outboxes
    finally:
        if store is not None:
            store.close()
        for outbox in outboxes:
            outbox.close()


def _own_files(paths: Paths) -> Iterator[Path]:
    """Everything under the run directory but models and sockets."""
    for folder, names, files in os.walk(paths.root):
        names[:] = [name for name in names if Path(folder) / name != paths.models]
        for name in files:
            path = Path(folder) / name
            if path.is_file() and not path.is_symlink():
                yield path


def _scrub_logs(folder: Path, pieces: Pieces) -> None:
    """Take entries with purged text out of the logs, in place: the daemons hold them open to append. An entry is a line, and
    of what was typed in a chat a whole message.
    """
    for path in files_with(sorted(folder.glob("*")), pieces):
        with open(path, "rb+") as file:
            entries = _messages(file.read()) if path.name == HISTORY else file.readlines()
            file.seek(0)
            file.writelines([entry for entry in entries if not holds(entry, pieces)])
            file.truncate()


def _messages(history: bytes) -> list[bytes]:
    """prompt-toolkit's history file as messages, each with its time: `\n# time\n+line\n+line\n`."""
    return [part for part in re.split(rb"(?m)(?=^\n# )", history) if part]
