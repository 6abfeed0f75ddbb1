"""`specl-ctl store show`: one generation with the text as it came, drafted tokens and disagreements marked in it.

Tokens become places in the text through the target's own tokenizer file, without loading a model.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from specl.cli.options import wants_colour
from specl.shared.engine.text_output import TextStream
from specl.shared.errors import SpecLoraError
from specl.shared.paths import find_paths
from specl.shared.store import Store, StoredGeneration

SOURCES = ("target", "model", "ngram")
COLOURS = {"target": None, "model": "green", "ngram": "cyan"}


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of one output token, who guessed it, and the draft's wrong guess where the target disagreed."""

    text: str
    source: str
    wrong: str | None = None


class _Tokenizer:
    """A tokenizer.json as TextStream wants it: what is special is no text."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        self._inner = Tokenizer.from_file(str(file))

    def decode(self, tokens: list[int]) -> str:
        return self._inner.decode(tokens, skip_special_tokens=True)


def pieces(row: StoredGeneration, tokenizer: Any) -> list[Piece]:
    """The output token by token; empty where `tokenizer` does not spell the stored text."""
    tokens = np.frombuffer(row.values["output_tokens"], "<u4").tolist()
    stream = TextStream(tokenizer)
    texts = [stream.add(token) for token in tokens]
    if texts:
        texts[-1] += stream.finish()
    output = row.values["output"]
    if not texts or not stream.text.startswith(output):
        return []
    wrong = {line["position"]: line["draft_text"] for line in row.disagreements}
    found, left = [], len(output)  # a stop string is in the tokens and not in the text
    for place, (text, source) in enumerate(zip(texts, row.values["sources"], strict=True)):
        found.append(Piece(text[:left], SOURCES[source], wrong.get(place)))
        left = max(0, left - len(text))
    return found


def marked(found: list[Piece], colour: bool) -> str:
    """The text with its marks: drafted tokens coloured, a disagreement as `[-draft's-]{+target's+}`."""
    return "".join(_mark(piece, colour) for piece in found)


def _mark(piece: Piece, colour: bool) -> str:
    text = piece.text
    if piece.wrong is None:
        return click.style(text, fg=COLOURS[piece.source]) if colour and COLOURS[piece.source] else text
    if not colour:
        return f"[-{piece.wrong}-]{{+{text}+}}"
    return click.style(piece.wrong, fg="red", strikethrough=True) + click.style(text, fg="yellow", bold=True)


def target_tokenizer(name: str) -> Any | None:
    """The tokenizer of the model `name`, or None where it is not on this machine."""
    from specl.cli.models import model_folder

    folder = model_folder(name, find_paths().models, is_draft=False)
    file = folder / "tokenizer.json" if folder else None
    return _Tokenizer(file) if file is not None and file.is_file() else None


@click.command()
@click.argument("generation_id", metavar="ID")
@click.option("--json", "as_object", is_flag=True, help="One JSON object: the row, with its disagreements.")
def show(generation_id: str, as_object: bool) -> None:
    """One generation: ID is its id or the beginning of it.

    In the answer, what the draft guessed right is green (cyan from repeats); where the target disagreed, the draft's
    guess is struck out in red before the target's token in yellow. Without colours: [-draft's-]{+target's+}.
    """
    row = Store(find_paths().store, read_only=True).generation(generation_id)
    if row is None:
        raise SpecLoraError(f"no single generation begins with {generation_id!r}", "`specl-ctl store failures` has ids")
    if as_object:
        click.echo(json.dumps(as_json(row), ensure_ascii=False))
        return
    for line in _lines(row):
        click.echo(line)


def as_json(row: StoredGeneration) -> dict[str, Any]:
    """The row without its blobs."""
    plain = {name: value for name, value in row.values.items() if not isinstance(value, bytes) and name != "n"}
    for name in ("messages", "sampling", "stats"):
        plain[name] = json.loads(plain[name])
    lines = [{k: v for k, v in line.items() if k not in ("n", "generation_id")} for line in row.disagreements]
    for line in lines:
        line["context_tokens"] = json.loads(line["context_tokens"])
    return plain | {"disagreements": lines}


def _lines(row: StoredGeneration) -> Iterator[str]:
    values = row.values
    acceptance, agreement = ("-" if values[n] is None else f"{values[n]:.3f}" for n in ("acceptance_rate", "agreement"))
    yield f"{values['id']}  {values['created']}  {values['target_model']} drafted by {values['draft_model'] or 'nothing'}"
    yield (
        f"acceptance {acceptance}, agreement {agreement}, {values['model_accepted']} of {values['model_drafted']} drafted by "
        f"the model, {values['output_count']} tokens, {values['tokens_per_second']:.1f} tok/s, "
        f"adapter {values['adapter_id'] or 'none'}, {values['finish_reason']}"
    )
    for message in json.loads(values["messages"]):
        yield ""
        yield click.style(f"{message.get('role')}:", bold=True)
        yield str(message.get("content"))
    yield ""
    yield click.style("assistant:", bold=True)
    tokenizer = target_tokenizer(values["target_model"])
    found = pieces(row, tokenizer) if tokenizer is not None else []
    yield marked(found, wants_colour()) if found else values["output"]
    if not row.disagreements:
        return
    yield ""
    yield f"{len(row.disagreements)} disagreements" + (
        "" if found else " (not marked: no tokenizer here spells this text)"
    )
    for line in row.disagreements:
        yield (
            f"{line['position']:>5}  {line['draft_text']!r} ({line['draft_confidence']:.2f}) -> "
            f"{line['target_text']!r} ({line['target_confidence']:.2f})  {line['drafter']}, depth {line['depth']}"
        )
