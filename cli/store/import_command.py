"""`specl-ctl store import`: texts from JSON lines become records, scored by the target, and go to
the collector or the store.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from specl.shared.errors import SpecLoraError
from specl.shared.paths import find_paths
from specl.shared.store import Store

if TYPE_CHECKING:
    from specl.shared.learning.imported_texts import ImportedText
    from specl.shared.messaging.client import Client
    from specl.shared.messaging.messages import Envelope, Generation, Reply
    from specl.shared.settings.schema import Settings

BATCH_ROWS = 128  # records of one Import request
BATCH_BYTES = 4 * 1024 * 1024
PROGRESS_EVERY = 100  # texts


@click.command("import")
@click.option("--jsonl", "file", type=click.Path(allow_dash=True), required=True, help="The file; `-` for stdin.")
@click.option(
    "--text-only", is_flag=True, help="Do not run the target over the texts: quick, but nothing to learn from."
)
def import_(file: str, text_only: bool) -> None:
    """Store generations made elsewhere, from JSON lines in the shape that `export --jsonl` writes.

    The configured target reads every text once, so that the trainer has its probabilities to learn
    from; that loads the model here. With the collector running the records go through it, else
    straight into the store under its lock. An id that is stored already stays as it is.
    """
    from specl.cli.store.import_jsonl import read_texts
    from specl.shared.learning.imported_texts import to_generation
    from specl.shared.messaging.client import Client
    from specl.shared.messaging.codec import encode
    from specl.shared.messaging.messages import Envelope
    from specl.shared.retention.delegate import require_local_files
    from specl.shared.retention.redaction import Redactor
    from specl.shared.settings.load import load_settings

    texts = read_texts(file)
    new_ids = _not_stored([text.id for text in texts])
    new = [text for text in texts if text.id in new_ids]
    settings = load_settings()
    redactor = Redactor(settings.records)
    learnable = 0
    with Client(settings=settings) as client:
        require_local_files(client, "import")
        uploader = _Uploader(client)
        score = _TargetScorer(settings, find_paths().models) if new and not text_only else None
        for text in _with_progress(new):
            record = redactor.apply(score(text) if score is not None else to_generation(text, None)).record
            learnable += record.top_k is not None
            uploader.add(Envelope(record.id, "Generation", encode(record)))
        uploader.send()
    click.echo(
        f"{len(new)} generations stored, {learnable} of them to learn from; {len(texts) - len(new)} were there already"
    )


def _with_progress(texts: "list[ImportedText]") -> "Iterator[ImportedText]":
    for number, text in enumerate(texts, 1):
        yield text
        if number % PROGRESS_EVERY == 0:
            click.echo(f"{number} of {len(texts)}", err=True)


def _not_stored(ids: list[str]) -> set[str]:
    path = find_paths().store
    if not path.exists():
        return set(ids)
    store = Store(path, read_only=True)
    try:
        return set(store.missing(ids))
    finally:
        store.close()


class _TargetScorer:
    """Turns texts into records with the target's log-probabilities.

    It loads the target when it is made. Raises ModelError where the model does not fit into memory
    beside the daemons'.
    """

    def __init__(self, settings: "Settings", models: Path) -> None:
        from specl.cli.memory_check import check_memory, local_path
        from specl.shared.engine.core import EngineCore
        from specl.shared.loading.engine import engine_options
        from specl.shared.models import blas  # noqa: F401 - binds the BLAS before mlx loads
        from specl.shared.models.load import load
        from specl.shared.models.report import to_stderr

        name = settings.models.target.name
        activity = "reading texts with the target (--text-only does without)"
        check_memory(settings, find_paths(), local_path(name, models), None, activity)
        target = load(name, models, settings.models.precision, to_stderr)
        self._engine = EngineCore(target, None, engine_options(settings))
        self._k = settings.training.loss.top_k_logits

    def __call__(self, text: "ImportedText") -> "Generation":
        """The record of a text; without log-probabilities where it does not fit into the target's
        context.
        """
        from specl.shared.learning.imported_texts import text_logprobs, to_generation, with_token_texts

        engine = self._engine
        prompt, tokens = engine.encode_chat([{"role": "user", "content": text.prompt}])
        scored = text_logprobs(engine.target, prompt, tokens, engine.encode(text.output), self._k)
        if scored is not None:
            text = with_token_texts(text, scored, engine.target.tokenizer.decode)
        return to_generation(text, scored)


class _Uploader:
    """Sends records in batches: to the collector, or into the store under the collector's lock.

    The lock is taken for each batch anew: the target reads for minutes between two, and a collector
    may start meanwhile.
    """

    def __init__(self, client: "Client") -> None:
        self._client = client
        self._rows: list[Envelope] = []
        self._bytes = 0

    def add(self, row: "Envelope") -> None:
        """Take one record, and send those before it where the batch is full."""
        if len(self._rows) >= BATCH_ROWS or self._bytes + len(row.body) > BATCH_BYTES:
            self.send()
        self._rows.append(row)
        self._bytes += len(row.body)

    def send(self) -> None:
        """Send what waits. Raises SpecLoraError where it could not be stored."""
        from specl.shared.messaging.messages import Import
        from specl.shared.retention.delegate import through_daemon

        if not self._rows:
            return
        reply = through_daemon(
            self._client, "collector", Import(self._rows), self._store_rows, "specl-ctl store import"
        )
        if not reply.ok:
            raise SpecLoraError(f"collector: {reply.message}", "what was sent before is stored; import again")
        self._rows, self._bytes = [], 0

    def _store_rows(self) -> "Reply":
        from specl.shared.messaging.messages import Reply

        store = Store(self._client.paths.store)
        try:
            store.set_threshold(self._client.settings.speculative.acceptance_threshold)
            store.add_rows(self._rows)
        finally:
            store.close()
        return Reply(True, "")
