"""`specl-ctl store export`: every generation as JSON lines in the documented shape, or as Parquet
with the target's top-k.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click

from specl.shared.errors import ConfigError, SpecLoraError
from specl.shared.paths import find_paths
from specl.shared.runtime.atomic_files import output_file
from specl.shared.store import Store


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
    ids = {row["id"] for row in store.sql("SELECT id FROM failures")} if only_failures else None
    if as_jsonl:
        _to_jsonl(store, out, ids)
        return
    if out == "-":
        raise click.UsageError("--parquet needs --out FILE")
    from specl.cli.store.parquet import write

    with _output(out) as file:
        count = write(file, (row for row in store.each() if ids is None or row.id in ids))
    click.echo(f"{count} generations written to {out}", err=True)


@contextmanager
def _output(out: str) -> Iterator[BinaryIO]:
    """The file `out`, private (0600), complete or not there; a link, pipe or device is written to."""
    path = Path(out)
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent}")
    try:
        with output_file(path) as file:
            yield file
    except OSError as error:
        raise SpecLoraError(f"{out} cannot be written: {error.strerror}") from error


def _to_jsonl(store: Store, out: str, ids: set[str] | None) -> None:
    rows = (row for row in store.export() if ids is None or row["id"] in ids)
    if out == "-":
        out_bytes = getattr(sys.stdout, "buffer", None)  # files are UTF-8, whatever the terminal's letters are
        if out_bytes is None or sys.stdout.isatty():
            _write_lines(sys.stdout.write, rows)
        else:
            sys.stdout.flush()
            _write_lines(lambda line: out_bytes.write(line.encode()), rows)
            out_bytes.flush()
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
