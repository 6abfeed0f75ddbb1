"""Forgetting: every room's purge hook, through its daemon or, where that is down, with its lock and the same code.

Done means that the bytes of the purged text are found in no file under the run directory. The models folder is not searched:
nothing of a user's is in it. An adapter learned from text but does not hold it; those are named, and dropped if wanted.
"""

import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import click

from specl.shared.adapters.registry import Adapters
from specl.shared.errors import AlreadyRunning, ConfigError, DaemonUnreachable, SpecLoraError
from specl.shared.messaging.client import Client
from specl.shared.messaging.endpoints import is_elsewhere
from specl.shared.messaging.messages import Envelope, Purge, Reply
from specl.shared.messaging.outbox import Outbox
from specl.shared.paths import Paths
from specl.shared.retention import checkpoints
from specl.shared.retention.answer_files import AnswerFiles
from specl.shared.retention.erasure_check import PRODUCERS, forget_typed, prove, remove_backups, rooms
from specl.shared.retention.hidden_states import HiddenSpool
from specl.shared.retention.purge_journal import PendingPurge, Wish
from specl.shared.retention.purge_matching import purge_matches, texts_in
from specl.shared.runtime.locks import Lock, is_locked, wait_for_command
from specl.shared.store import PURGE_MOST, Store

EVERYTHING = 250_000_000_000.0  # older than the year 9892 is everything
ROUNDS = 50  # records may be on their way from an outbox to the store
PATIENCE_S = 60.0  # a trainer that loads its models looks up only then
RESUME = "what is left is noted; `specl-ctl store purge --resume` goes on with it"


# ---------------------------------------------------------------------------------------------------- the command
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
    """Forget generations everywhere: store, outboxes, hidden states, past answers, checkpoints, caches, logs.

    It cannot be undone, and ends only when a search for the text finds nothing under the run directory. An adapter holds no
    text, but may have learned from it: those are named; --drop-adapters removes them, with all that were trained on from
    them, and --retrain also starts a training run from the newest adapter that never saw the text.

    One that was stopped half-way (Ctrl-C, a program that reads the store, a daemon that died) is finished by the next one, or
    by --resume alone.
    """
    wanted = bool(ids or age or pattern or everything)
    if not (wanted or resume):
        raise click.UsageError("say what to forget: --id, --before, --pattern or --all")
    if wanted and resume:
        raise click.UsageError("--resume finishes what was asked for before; it goes alone")
    now = time.time()
    before = EVERYTHING if everything else moment(age, now) if age else None
    if as_object and not yes and wanted:
        raise click.UsageError("--json asks nothing; say --yes")
    if not yes and wanted:
        click.confirm("Forget the matching generations for good?", abort=True)
    say = (lambda line: None) if as_object else click.echo
    with Client() as client, _alone(client):
        outcome = _finish(client, say)
        if wanted:
            found = full_ids(client.paths, ids, outcome.get("ids", ()))
            wish = Wish(now, found, before, pattern, everything, drop_adapters or retrain, retrain)
            outcome = Forgetting(client).begin(wish, say)
        elif not outcome:
            say("no purge was stopped half-way")
    if as_object:
        click.echo(json.dumps({name: value for name, value in outcome.items() if name != "ids"}))


@contextmanager
def _alone(client: Client) -> Iterator[None]:
    """One purge at a time, where the files are. Raises SpecLoraError."""
    need_files_here(client, "purge")
    try:
        lock = Lock(client.paths.create().run, "purge", "specl-ctl store purge")
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


def need_files_here(client: Client, command: str) -> None:
    """Raises ConfigError where the daemons, and so the store, are on another machine than this one."""
    if is_elsewhere(client.addresses.keys) or _answers_from_elsewhere(client):
        raise ConfigError(
            f"the daemons run on another machine, and nothing of theirs is in {client.paths.root}",
            f"run `specl-ctl store {command}` there: it works on their files",
        )


def _answers_from_elsewhere(client: Client) -> bool:
    """Whether a daemon answers that does not run here: through a tunnel, say."""
    if client.settings.bus.transport != "tcp":
        return False
    return any(not is_locked(client.paths.run, role) for role in client.status())


def _finish(client: Client, say: Any) -> dict[str, Any]:
    """Finish a purge that was stopped half-way; its outcome, empty where there was none."""
    pending = PendingPurge(client.paths.pending_purge)
    wish = pending.wish()
    if wish is None:
        pending.end()
        return {}
    say(
        f"finishing the purge of {time.strftime('%Y-%m-%d %H:%M', time.localtime(wish.begun))}, which was stopped half-way"
    )
    return Forgetting(client).resume(wish, say)


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


def full_ids(paths: Paths, beginnings: Iterable[str], forgotten: Iterable[str] = ()) -> list[str]:
    """The ids that begin so, in the store or an outbox; a whole id is that one. Of one that has just been `forgotten` there is
    none any more; else raises SpecLoraError for none or several.
    """
    full = []
    with rooms(paths) as (store, outboxes):
        waiting = [id for outbox in outboxes for id in outbox.matching(lambda row: True)]
        for begin in beginnings:
            found = {id for id in waiting if id.startswith(begin)}
            found.update(store.beginning(begin) if store is not None else ())
            if begin in found:
                found = {begin}
            if not found and any(id.startswith(begin) for id in forgotten):
                continue
            if len(found) != 1:
                raise SpecLoraError(f"no single generation begins with {begin!r}")
            full += found
    return full


# ---------------------------------------------------------------------------------------------------- the work
class Forgetting:
    """One purge of one run directory. What is deleted is noted first (see `pending_purge`)."""

    def __init__(self, client: Client) -> None:
        self.client, self.paths = client, client.paths
        self.pending = PendingPurge(self.paths.pending_purge)
        self.ids: set[str] = set()
        self.outcome: dict[str, Any] = {"adapters": [], "dropped": [], "active": None, "retraining": None}

    def begin(self, wish: Wish, say: Any) -> dict[str, Any]:
        """Do it; its outcome. `say` hears a line for each thing worth saying. Raises SpecLoraError while anything is left."""
        self.pending.begin(wish)
        if wish.pattern:
            self.pending.note((), {wish.pattern}, ())
        return self._all(wish, say)

    def resume(self, wish: Wish, say: Any) -> dict[str, Any]:
        """Go on with one that was stopped. What has come since is not old, and not of "everything", as it was meant."""
        before = None if wish.before is None else min(wish.before, wish.begun)
        return self._all(replace(wish, before=before), say)

    def _all(self, wish: Wish, say: Any) -> dict[str, Any]:
        self.ids = set(self.pending.noted("ids"))
        stored = self._rows(wish)
        self.outcome |= {"stored": stored, "forgotten": len(self.ids), "ids": sorted(self.ids)}
        say(f"{stored} generations removed from the store, {len(self.ids)} forgotten in all")
        self._wait_for_the_trainer()
        texts = lambda: self.pending.noted("texts")  # noqa: E731
        for name in remove_backups(self.paths, texts, wish.everything):
            say(f"{name} held purged text and is removed")
        for line in self._adapters(wish.drop_adapters, wish.retrain):
            say(line)
        forget_typed(self.paths.logs, self.pending.noted("typed"), wish.everything)
        searched, shared = prove(self.paths, texts)
        self.pending.end()
        self.outcome |= {"searched": searched, "shared": shared}
        say(f"a search for {searched} pieces of the purged text finds nothing under {self.paths.root}")
        if shared:
            say(f"{shared} pieces were not searched for: other generations hold the same")
        return self.outcome

    def _rows(self, wish: Wish) -> int:
        """Every record, a portion at a time, with what hangs on its id; how many the store had."""
        stored = len(self._portions(sorted(self.ids)))  # what was noted before it was stopped
        self.ids.update(wish.ids)
        rounds = 0
        while rounds < ROUNDS:
            found = self._note(wish)
            for role in PRODUCERS:  # outboxes first: what they hold may travel
                told = self._tell(role, Purge(wish.ids, wish.before, wish.pattern)).details.get("ids", [])
                self.ids |= set(told)
                found |= set(told) - set(wish.ids)
            gone = self._portions(sorted(found))
            stored += len(gone)
            if not found:
                break
            rounds += len(found) < PURGE_MOST
        return stored

    def _portions(self, ids: list[str]) -> list[str]:
        """Remove these from the store, then their hidden states, checkpoints and evaluations; which the store had. The last
        request to the store empties its log, so there is always one.
        """
        gone: list[str] = []
        for start in range(0, max(1, len(ids)), PURGE_MOST):
            part = ids[start : start + PURGE_MOST]
            gone += self._tell("collector", Purge(part, None, "")).details.get("ids", [])
            for role in PRODUCERS if part else ():
                self._tell(role, Purge(part, None, ""))
        return gone

    def _note(self, wish: Wish) -> set[str]:
        """Find the next portion, and note its ids, its texts and the pattern in whichever case it stands there."""
        meant = Purge(wish.ids, wish.before, wish.pattern)
        texts: set[str] = set()
        typed: set[str] = set()

        def collect(row: Envelope) -> bool:
            if not purge_matches(meant, row):
                return False
            found, said = texts_in(row)
            texts.update(found)
            typed.update(said)
            return True

        with rooms(self.paths) as (store, outboxes):
            ids = set(store.matching(wish.ids, wish.before, wish.pattern)) if store is not None else set()
            if store is not None:
                found, said = store.texts(sorted(ids))
                texts.update(found)
                typed.update(said)
            for outbox in outboxes:
                ids |= set(outbox.matching(collect))
        if wish.pattern:
            wanted = re.compile(re.escape(wish.pattern), re.IGNORECASE)
            texts.update({found for text in texts for found in wanted.findall(text)})
        if ids:
            self.pending.note(ids, texts, typed)
            self.ids |= ids
        return ids

    def _tell(self, role: str, wish: Purge) -> Reply:
        """Through the daemon; where it is down, with its lock and the same code."""
        reply = None
        wait_for_command(self.paths.run, role)
        if not is_locked(self.paths.run, role):
            try:
                reply = self._in_its_place(role, wish)
            except AlreadyRunning:  # it has just started
                reply = None
        reply = reply or self.client.command(role, wish)
        if not reply.ok:
            raise SpecLoraError(f"{role}: {reply.message}")
        return reply

    def _in_its_place(self, role: str, wish: Purge) -> Reply:
        lock = Lock(self.paths.create().run, role, "specl-ctl store purge")
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
            try:
                ids = outbox.matching(lambda row: purge_matches(wish, row))
                outbox.purge(ids)
            finally:
                outbox.close()
        forgotten = [*wish.ids, *ids]
        if role == "inference":
            HiddenSpool(self.paths.hidden, 0).purge(forgotten)
            AnswerFiles(self.paths.answers).purge()
        elif forgotten:
            checkpoints.forget(checkpoints.checkpoint_folder(self.paths.training))
        return Reply(True, "", {"ids": ids})

    def _wait_for_the_trainer(self) -> None:
        """A run that is told to end does so between two of its steps; until then it may still write."""
        checkpoint = checkpoints.checkpoint_folder(self.paths.training)
        end = time.monotonic() + PATIENCE_S
        while self._is_ending() or self.ids & checkpoints.generations_in(checkpoint):
            if time.monotonic() > end:
                raise SpecLoraError("the trainer did not end its run in time", "or stop the trainer")
            time.sleep(0.1)

    def _is_ending(self) -> bool:
        trainer = self.client.status().get("trainer", {})
        return bool(trainer.get("training", {}).get("abandoning"))

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
        raise SpecLoraError(f"inference keeps its adapter: {reply.message}")

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
