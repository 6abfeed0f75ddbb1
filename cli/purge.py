"""Forgetting: every room's purge hook, through its daemon or, where that is down, with its lock and the same code.

Done means that the bytes of the purged text are found in no file under the run directory. The models folder is not searched:
nothing of a user's is in it. An adapter learned from text but does not hold it; those are named, and dropped if wanted.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

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
ROUNDS = 5  # records may be on their way from an outbox to the store
PRODUCERS = ("inference", "trainer")
PIECE = 24  # bytes of text that are looked for as one: a remnant of twice that holds at least one
SHORTEST = 12  # shorter texts (`Yes.`) stand everywhere; they are removed like all, but their bytes prove nothing
MOST_PIECES = 500_000
CHUNK = 1 << 20
PATIENCE_S = 10.0


# ---------------------------------------------------------------------------------------------------- the command
@click.command()
@click.option("--id", "ids", multiple=True, help="A generation id (or its beginning); may be given several times.")
@click.option("--before", "age", help="Everything older than e.g. 90m, 12h or 30d, or than a date (2026-01-31).")
@click.option("--pattern", default="", help="Everything whose prompt or answer contains this text.")
@click.option("--all", "everything", is_flag=True, help="Every generation there is.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--drop-adapters", is_flag=True, help="Also remove adapters that learned from them.")
@click.option("--retrain", is_flag=True, help="Remove those adapters and train anew on what is left.")
def purge(
    ids: tuple[str, ...], age: str | None, pattern: str, everything: bool, yes: bool, drop_adapters: bool, retrain: bool
) -> None:
    """Forget generations everywhere: store, outboxes, hidden states, checkpoints, caches, logs. It cannot be undone."""
    if not (ids or age or pattern or everything):
        raise click.UsageError("say what to forget: --id, --before, --pattern or --all")
    before = EVERYTHING if everything else moment(age, time.time()) if age else None
    if not yes:
        click.confirm("Forget the matching generations for good?", abort=True)
    with Client() as client:
        forgetting = Forgetting(client, Purge(full_ids(client.paths, ids), before, pattern))
        for line in forgetting.run(drop_adapters or retrain, retrain):
            click.echo(line)


def moment(text: str, now: float) -> float:
    """The time that `text` means: an age (90m, 12h, 30d) or a date. Raises UsageError."""
    units = {"m": 60, "h": 3600, "d": 86400}
    try:
        if text[-1:] in units:
            return now - float(text[:-1]) * units[text[-1]]
        return time.mktime(time.strptime(text, "%Y-%m-%d"))
    except ValueError:
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

    def run(self, drop_adapters: bool, retrain: bool) -> Iterator[str]:
        """Do it; a line for each thing worth saying. Raises SpecLoraError while anything is left."""
        stored = 0
        for _ in range(ROUNDS):
            found, removed = self._round()
            stored += removed
            if not found:
                break
        yield f"{stored} generations removed from the store, {len(self.ids)} forgotten in all"
        self._wait_for_checkpoint()
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
            self._tell(role, Purge(sorted(self.ids), None, ""))
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
            shutil.rmtree(self.paths.training / "checkpoint", ignore_errors=True)
        return Reply(True, "", {"ids": ids})

    def _wait_for_checkpoint(self) -> None:
        """A run that is told to end does so between two of its steps."""
        state = self.paths.training / "checkpoint" / "state.json"
        end = time.monotonic() + PATIENCE_S
        while self.ids & _checkpoint_ids(state):
            if time.monotonic() > end:
                raise SpecLoraError(
                    "the trainer did not let go of its checkpoint in time", "purge again, or stop the trainer"
                )
            time.sleep(0.1)

    def _backups(self) -> Iterator[str]:
        """Copies of the store from before an upgrade: they hold what it held."""
        for path in sorted(self.paths.root.glob(f"{self.paths.store.name}.backup-*")):
            if _files_with([path], _pieces(self.texts)):
                path.unlink()
                yield f"{path.name} held purged text and is removed"

    def _adapters(self, drop: bool, retrain: bool) -> Iterator[str]:
        adapters = Adapters(self.paths.adapters)
        learned = adapters.trained_on(sorted(self.ids))
        if not learned:
            return
        if not drop:
            yield f"adapters that learned from them: {', '.join(learned)} (--drop-adapters removes them, --retrain replaces them)"
            return
        if adapters.current() in learned:
            clean = next((id for id in reversed(adapters.ids()) if id not in learned), "")
            self._activate(adapters, clean)
            yield f"drafting with adapter {clean}" if clean else "drafting without an adapter"
        adapters.drop(learned)
        yield f"adapters removed: {', '.join(learned)}"
        if retrain:
            try:
                yield f"training: {self.client.train(now=True).message}"
            except DaemonUnreachable:
                yield "the trainer does not run; start it, then `specl-ctl train --now`"

    def _activate(self, adapters: Adapters, id: str) -> None:
        try:
            reply = self.client.set_adapter(id)
        except DaemonUnreachable:
            adapters.set_current(id)
            return
        if not reply.ok:
            raise SpecLoraError(f"inference keeps its adapter: {reply.message}")

    def _search(self) -> Iterator[str]:
        """The proof. What other generations say too (a template's own words, say) is theirs to keep."""
        pieces = _pieces(self.texts)
        wanted = _count(pieces)
        with _rooms(self.paths) as (store, outboxes):
            for text in store.written() if store is not None else ():
                _leave_out(text.encode(), pieces)
            for outbox in outboxes:
                outbox.matching(lambda row: _leave_out(row.body, pieces))
        _scrub_logs(self.paths.logs, pieces)
        found = _files_with(_own_files(self.paths), pieces)
        if found:
            names = ", ".join(str(path.relative_to(self.paths.root)) for path in found)
            raise SpecLoraError(
                f"purged text is still found in {names}", "a request with the same text may be running; purge again"
            )
        count = _count(pieces)
        yield f"a search for {count} pieces of the purged text finds nothing under {self.paths.root}"
        if wanted > count:
            yield f"{wanted - count} pieces were not searched for: other generations hold the same"


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


def _checkpoint_ids(state: Path) -> set[str]:
    try:
        return set(json.loads(state.read_text()).get("ids", []))
    except (OSError, ValueError, AttributeError):
        return set()


# ---------------------------------------------------------------------------------------------------- the search
Pieces = dict[int, list[bytes]]  # by their first eight bytes


def _pieces(texts: Iterable[str]) -> Pieces:
    """What to look for: every text in pieces, as UTF-8 and as JSON writes it."""
    pieces: Pieces = {}
    count = 0
    for text in sorted(texts):
        for form in {text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]}:
            data = form.encode()
            if len(data) < SHORTEST or count >= MOST_PIECES:
                continue
            starts = range(0, max(1, len(data) - PIECE + 1), PIECE)
            for start in starts:
                piece = data[start : start + PIECE]
                pieces.setdefault(int.from_bytes(piece[:8], "little"), []).append(piece)
                count += 1
    return {head: list(dict.fromkeys(group)) for head, group in pieces.items()}


def _count(pieces: Pieces) -> int:
    return sum(len(group) for group in pieces.values())


def _leave_out(data: bytes, pieces: Pieces) -> bool:
    """Forget the pieces that stand in `data`. Always false: it chooses no record."""
    for head, piece in list(_hits(data, np.array(sorted(pieces), np.uint64), pieces)):
        pieces[head] = [other for other in pieces[head] if other != piece]
    return False


def _own_files(paths: Paths) -> Iterator[Path]:
    """Everything under the run directory but models and sockets."""
    for folder, names, files in os.walk(paths.root):
        names[:] = [name for name in names if Path(folder) / name != paths.models]
        for name in files:
            path = Path(folder) / name
            if path.is_file() and not path.is_symlink():
                yield path


def _files_with(files: Iterable[Path], pieces: Pieces) -> list[Path]:
    heads = np.array(sorted(pieces), np.uint64)
    return [path for path in files if len(heads) and _holds(path, heads, pieces)]


def _holds(path: Path, heads: np.ndarray, pieces: Pieces) -> bool:
    try:
        with open(path, "rb") as file:
            tail = b""
            while chunk := file.read(CHUNK):
                data = tail + chunk
                if _hit(data, heads, pieces):
                    return True
                tail = data[-PIECE:]
    except FileNotFoundError:
        pass
    return False


def _hits(data: bytes, heads: np.ndarray, pieces: Pieces) -> Iterator[tuple[int, bytes]]:
    """The pieces that stand in `data`: their first eight bytes are looked up at every offset at once."""
    if len(data) < 8 or not len(heads):
        return
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), 8)
    values = np.ascontiguousarray(windows).view("<u8").ravel()
    places = np.searchsorted(heads, values)
    places[places == len(heads)] = 0
    for offset in np.flatnonzero(heads[places] == values).tolist():
        head = int(values[offset])
        for piece in pieces[head]:
            if data.startswith(piece, offset):
                yield head, piece


def _hit(data: bytes, heads: np.ndarray, pieces: Pieces) -> bool:
    return next(_hits(data, heads, pieces), None) is not None


def _scrub_logs(folder: Path, pieces: Pieces) -> None:
    """Take lines with purged text out of the logs, in place: the daemons hold them open to append."""
    heads = np.array(sorted(pieces), np.uint64)
    for path in _files_with(sorted(folder.glob("*")), pieces):
        with open(path, "rb+") as file:
            kept = [line for line in file.readlines() if not _hit(line, heads, pieces)]
            file.seek(0)
            file.writelines(kept)
            file.truncate()
