"""`specl-ctl store export` and `import`: the store as JSON lines in the documented shape, or as Parquet with the target's laws."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from specl.shared.errors import ConfigError, SpecLoraError
from specl.shared.paths import find_paths
from specl.shared.runtime.atomic_files import atomic_file
from specl.shared.store import Store

if TYPE_CHECKING:
    from specl.cli.store.import_jsonl import Item
    from specl.shared.messaging.messages import Envelope

BATCH_ROWS = 128  # records of one Import request
BATCH_BYTES = 4 * 1024 * 1024


# ---------------------------------------------------------------------------------------------------- export
@click.command()
@click.option("--jsonl", "as_jsonl", is_flag=True, help="One JSON object a line, in the documented shape.")
@click.option("--parquet", "as_parquet", is_flag=True, help="All columns, token ids and the target's top-k included.")
@click.option(
    "--out", type=click.Path(dir_okay=False), default="-", help="A file instead of stdout; Parquet needs one."
)
@click.option("--failures", "only_failures", is_flag=True, help="Only what the view `failures` shows.")
def export(as_jsonl: bool, as_parquet: bool, out: str, only_failures: bool) -> None:
    """Every generation, oldest first.

    A JSON line has id, prompt, target_output, acceptance_rate, timestamp and disagreements.

    \b
    specl-ctl store export --jsonl --out generations.jsonl
    specl-ctl store export --parquet --out generations.parquet
    """
    if as_jsonl == as_parquet:
        raise click.UsageError("say which form: --jsonl or --parquet")
    store = Store(find_paths().store, read_only=True)
    wanted = {row["id"] for row in store.sql("SELECT id FROM failures")} if only_failures else None
    if as_jsonl:
        _to_jsonl(store, out, wanted)
        return
    if out == "-":
        raise click.UsageError("--parquet needs --out FILE")
    from specl.cli.store.parquet import write

    with _output(out) as file:
        count = write(file, (row for row in store.each() if wanted is None or row.values["id"] in wanted))
    click.echo(f"{count} generations written to {out}", err=True)


@contextmanager
def _output(out: str) -> Iterator[BinaryIO]:
    """The file `out`, complete or not there; its permissions follow the umask."""
    path = Path(out)
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent}")
    try:
        with atomic_file(path, sync=True, mode=0o666) as file:
            yield file
    except OSError as error:
        raise SpecLoraError(f"{out} cannot be written: {error.strerror}") from error


def _to_jsonl(store: Store, out: str, wanted: set[str] | None) -> None:
    rows = (row for row in store.export() if wanted is None or row["id"] in wanted)
    if out == "-":
        _write_lines(sys.stdout.write, rows)
        return
    with _output(out) as file:
        count = _write_lines(lambda line: file.write(line.encode()), rows)
    click.echo(f"{count} generations written to {out}", err=True)


def _write_lines(write: Callable[[str], object], rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    for row in rows:
        write(json.dumps(row, ensure_ascii=False) + "\n")
        count += 1
    return count


# ---------------------------------------------------------------------------------------------------- import
@click.command("import")
@click.option("--jsonl", "file", type=click.Path(allow_dash=True), required=True, help="The file; `-` for stdin.")
@click.option(
    "--text-only", is_flag=True, help="Do not run the target over the texts: quick, but nothing to learn from."
)
def import_(file: str, text_only: bool) -> None:
    """Store generations made elsewhere, from JSON lines in the shape that `export --jsonl` writes.

    The configured target reads every text once, so that the trainer has its probabilities to learn from; that loads the
    model here. With the collector running the records go through it, else straight into the store under its lock. An id
    that is stored already stays as it is.
    """
    from specl.cli.store.import_jsonl import Annotator, read_items, to_record
    from specl.cli.store.purge import need_files_here
    from specl.shared.messaging.client import Client
    from specl.shared.messaging.codec import encode
    from specl.shared.messaging.messages import Envelope
    from specl.shared.retention.redaction import Redactor
    from specl.shared.settings.load import load_settings

    items = read_items(file)
    present = _present([item.id for item in items])
    fresh = [item for item in items if item.id not in present]
    settings = load_settings()
    discretion = Redactor(settings.records)
    with Client(settings=settings) as client:
        need_files_here(client, "import")
        destination = _Destination(client)
        annotate = Annotator(settings, find_paths().models) if fresh and not text_only else None
        learnable = 0
        for item in _told(fresh):
            record = discretion.apply(annotate(item) if annotate is not None else to_record(item, None)).record
            learnable += record.top_k is not None
            destination.add(Envelope(record.id, "Generation", encode(record)))
        destination.close()
    click.echo(
        f"{len(fresh)} generations stored, {learnable} of them to learn from; {len(items) - len(fresh)} were there already"
    )


def _told(items: "list[Item]") -> "Iterator[Item]":
    for place, item in enumerate(items, 1):
        yield item
        if place % 100 == 0:
            click.echo(f"{place} of {len(items)}", err=True)


def _present(ids: list[str]) -> set[str]:
    path = find_paths().store
    if not path.exists():
        return set()
    store = Store(path, read_only=True)
    try:
        return {id for start in range(0, len(ids), 500) for id in store.matching(ids[start : start + 500], None, "")}
    finally:
        store.close()


class _Destination:
    """Where imported records go: the collector, or the store itself under the collector's lock, looked at batch by batch. The
    target reads for minutes between two of them, and a collector that starts meanwhile must find its place free.
    """

    def __init__(self, client: Any) -> None:
        self._client, self._rows, self._bytes = client, [], 0

    def add(self, row: "Envelope") -> None:
        """Take one; sent in batches."""
        if self._rows and (len(self._rows) >= BATCH_ROWS or self._bytes + len(row.body) > BATCH_BYTES):
            self._send()
        self._rows.append(row)
        self._bytes += len(row.body)

    def close(self) -> None:
        """Send the rest."""
        if self._rows:
            self._send()

    def _send(self) -> None:
        from specl.shared.errors import AlreadyRunning
        from specl.shared.runtime.locks import Lock, is_locked, wait_for_command

        paths = self._client.paths
        wait_for_command(paths.run, "collector")
        if is_locked(paths.run, "collector"):
            self._to_collector()
        else:
            try:
                lock = Lock(paths.create().run, "collector", "specl-ctl store import")
            except AlreadyRunning:  # it has just started
                self._to_collector()
            else:
                try:
                    self._to_store()
                finally:
                    lock.release()
        self._rows, self._bytes = [], 0

    def _to_collector(self) -> None:
        from specl.shared.messaging.messages import Import

        reply = self._client.command("collector", Import(self._rows))
        if not reply.ok:
            raise SpecLoraError(f"collector: {reply.message}", "what was sent before is stored; import again")

    def _to_store(self) -> None:
        store = Store(self._client.paths.store)
        try:
            store.set_threshold(self._client.settings.speculative.acceptance_threshold)
            store.add_rows(self._rows)
        finally:
            store.close()
