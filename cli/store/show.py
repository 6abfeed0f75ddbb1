"""`specl-ctl store show`: one generation with its text, in which drafted tokens and disagreements
are marked.

The target's own tokenizer file says which characters a token stands for; no model is loaded.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np

from specl.cli.options import wants_colour
from specl.cli.terminal import json_line
from specl.shared.engine.text_output import TextStream
from specl.shared.errors import SpecLoraError
from specl.shared.paths import find_paths
from specl.shared.runtime.terminal import visible
from specl.shared.store import Store, StoredGeneration

SOURCES = ("target", "model", "ngram")
COLOURS = {"target": None, "model": "green", "ngram": "cyan"}


@dataclass(frozen=True, slots=True)
class MarkedToken:
    """The text of one output token, what drafted it, and the draft's rejected token where the
    target disagreed.
    """

    text: str
    source: str
    rejected: str | None = None


class Tokenizer(Protocol):
    """Turns token ids into text."""

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`."""


class _TokenizerFile:
    """A tokenizer.json; special tokens are no text."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        self._inner = Tokenizer.from_file(str(file))

    def decode(self, tokens: list[int]) -> str:
        return str(self._inner.decode(tokens, skip_special_tokens=True))


def marked_tokens(row: StoredGeneration, tokenizer: Tokenizer) -> list[MarkedToken]:
    """The output token by token; empty where `tokenizer` does not spell the stored text."""
    tokens = np.frombuffer(row.output_tokens, "<u4").tolist()
    stream = TextStream(tokenizer)
    texts = [stream.add(token) for token in tokens]
    if texts:
        texts[-1] += stream.finish()
    if not texts or not stream.text.startswith(row.output):
        return []
    rejected = {item.position: item.draft_text for item in row.disagreements}
    marked, left = [], len(row.output)  # a stop string is in the tokens and not in the text
    for position, (text, source) in enumerate(zip(texts, row.sources, strict=True)):
        marked.append(MarkedToken(text[:left], SOURCES[source], rejected.get(position)))
        left = max(0, left - len(text))
    return marked


def marked(tokens: list[MarkedToken], colour: bool) -> str:
    """The text with its marks: drafted tokens coloured, a disagreement as
    `[-draft's-]{+target's+}`.
    """
    return "".join(_mark(token, colour) for token in tokens)


def _mark(token: MarkedToken, colour: bool) -> str:
    text, rejected = visible(token.text), visible(token.rejected or "")
    if token.rejected is None:
        return click.style(text, fg=COLOURS[token.source]) if colour and COLOURS[token.source] else text
    if not colour:
        return f"[-{rejected}-]{{+{text}+}}"
    return click.style(rejected, fg="red", strikethrough=True) + click.style(text, fg="yellow", bold=True)


def target_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer of the model `name`, or None where it is not on this machine."""
    from specl.cli.models import model_folder

    folder = model_folder(name, find_paths().models, is_draft=False)
    file = folder / "tokenizer.json" if folder else None
    return _TokenizerFile(file) if file is not None and file.is_file() else None


@click.command()
@click.argument("generation_id", metavar="ID")
@click.option("--json", "as_object", is_flag=True, help="One JSON object: the row, with its disagreements.")
def show(generation_id: str, as_object: bool) -> None:
    """One generation: ID is its id or the beginning of it.

    In the answer, what the draft guessed right is green (cyan from repeats); where the target
    disagreed, the draft's guess is struck out in red before the target's token in yellow. Without
    colours: [-draft's-]{+target's+}.
    """
    row = Store(find_paths().store, read_only=True).generation(generation_id)
    if row is None:
        raise SpecLoraError(f"no single generation begins with {generation_id!r}", "`specl-ctl store failures` has ids")
    if as_object:
        click.echo(json_line(as_json(row)))
        return
    for line in _lines(row):
        click.echo(line)


def as_json(row: StoredGeneration) -> dict[str, Any]:
    """The row without its blobs, JSON columns as values."""
    values = {name: value for name, value in asdict(row).items() if not isinstance(value, bytes)}
    return values | {name: json.loads(values[name]) for name in ("messages", "sampling", "stats")}


def _lines(row: StoredGeneration) -> Iterator[str]:
    acceptance, agreement = ("-" if rate is None else f"{rate:.3f}" for rate in (row.acceptance_rate, row.agreement))
    yield f"{row.id}  {row.created}  {visible(row.target_model)} drafted by {visible(row.draft_model or 'nothing')}"
    yield (
        f"acceptance {acceptance}, agreement {agreement}, {row.model_accepted} of {row.model_drafted} drafted by "
        f"the model, {row.output_count} tokens, {row.tokens_per_second:.1f} tok/s, "
        f"adapter {row.adapter_id or 'none'}, {row.finish_reason}"
    )
    for message in json.loads(row.messages):
        yield ""
        yield click.style(f"{visible(message.get('role'))}:", bold=True)
        yield visible(message.get("content"))
    yield ""
    yield click.style("assistant:", bold=True)
    tokenizer = target_tokenizer(row.target_model)
    tokens = marked_tokens(row, tokenizer) if tokenizer is not None else []
    yield marked(tokens, wants_colour()) if tokens else visible(row.output)
    if not row.disagreements:
        return
    yield ""
    unmarked = "" if tokens else " (not marked: no tokenizer on this machine spells this text)"
    yield f"{len(row.disagreements)} disagreements{unmarked}"
    for item in row.disagreements:
        yield (
            f"{item.position:>5}  {item.draft_text!r} ({item.draft_confidence:.2f}) -> "
            f"{item.target_text!r} ({item.target_confidence:.2f})  {item.drafter}, depth {item.depth}"
        )
