"""What `specl-ctl draft build` learns from: the shipped prompts, a file's, or what the store holds of the user's own traffic."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specl.cli.files.prompts import read_prompts
from specl.shared.errors import ConfigError, ModelError
from specl.shared.settings.schema import Settings

if TYPE_CHECKING:
    from specl.shared.learning.recapture import WrittenText
    from specl.shared.store import StoredGeneration

SHIPPED = "shipped"


def prompts_of(file: str) -> tuple[list[Any], str]:
    """The prompts in `file` (see cli/files/prompts.py; in plain text a line may be JSON, too), or the shipped ones, and
    their sha256.

    Raises ConfigError that names file and line. Left out is what shares eight words with a prompt that drafts are judged by.
    """
    from specl.shared import prompts

    if file == SHIPPED:
        return prompts.load("train"), prompts.sha256("train")
    if file == "-":
        raise ConfigError("--prompts wants a file: a build that was stopped reads it again")
    found = read_prompts(file, json_in_text=True)
    items = [
        prompts.ShippedPrompt(f"line-{item.line}", "own", item.messages)
        for item in found
        if not any(prompts.is_evaluation_text(str(message["content"])) for message in item.messages)
    ]
    if not items:
        raise ConfigError(f"every prompt of {file} is one that drafts are judged by")
    if len(items) < len(found):
        said = f"{len(found) - len(items)} prompts of {file} are left out: drafts are judged by prompts with the same words"
        click.echo(said, err=True)
    return items, hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()


def answers_of(files: Sequence[str], fingerprint: str) -> tuple[list["WrittenText"], list[str]]:
    """What this target wrote for earlier builds, and the sha256 of each file. Raises ConfigError for what is no such file."""
    from specl.shared.training_files.target_texts import load_target_texts

    found: list[WrittenText] = []
    names = [Path(file).stem for file in files]
    if len(set(names)) < len(names):
        raise ConfigError("--answers wants files of different names")
    for file in files:
        try:
            found += load_target_texts(Path(file).expanduser(), fingerprint)
        except ModelError as error:
            raise ConfigError(str(error), error.hint) from error
    return found, [hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest() for file in files]


def texts_of_store(path: Path, settings: Settings, fingerprint: str, name: str) -> list["WrittenText"]:
    """The answers of this target in the store that a draft may learn from: not from conversations that are held out for
    judging adapters, nor a text that stands in one of those too, not older than retention allows, and whole (statistics and
    redacted records have no tokens).

    Raises ConfigError that says why where there is none.
    """
    from specl.shared.learning.examples import is_held_out
    from specl.shared.learning.recapture import LONGEST
    from specl.shared.store import Store

    if not path.is_file():
        raise ConfigError(f"there is nothing to learn from: no store at {path} yet", "use the server first")
    since = time.time() - 86400 * settings.records.retention_days if settings.records.retention_days else 0.0
    counts = dict.fromkeys(("bare", "other", "old", "held"), 0)
    found: dict[bytes, WrittenText] = {}
    held: set[bytes] = set()
    store = Store(path, read_only=True)
    try:
        for row in store.each():
            if reason := _unusable(row, fingerprint, since):
                counts[reason] += 1
                continue
            text = _text(row)
            key = text.tokens[:LONGEST].tobytes()  # what is left out of a long text makes no difference
            if is_held_out(row.conversation_id, settings.training.heldout_share):
                held.add(key)
                counts["held"] += 1
            else:
                found[key] = text
    finally:
        store.close()
    counts["held"] += len(held & found.keys())
    found = {key: text for key, text in found.items() if key not in held}
    if not found:
        raise _nothing(counts, settings, name)
    return list(found.values())


def _unusable(row: "StoredGeneration", fingerprint: str, since: float) -> str:
    if len(row.output_tokens) <= 4 or not row.prompt_tokens:
        return "bare"
    if row.target_fingerprint != fingerprint:
        return "other"
    return "old" if row.created_at < since else ""


def _text(row: "StoredGeneration") -> "WrittenText":
    import numpy as np

    from specl.shared.learning.recapture import WrittenText

    prompt, output = (np.frombuffer(tokens, "<u4") for tokens in (row.prompt_tokens, row.output_tokens))
    return WrittenText(row.id, np.concatenate([prompt, output]), len(prompt), row.temperature == 0)


def _nothing(counts: dict[str, int], settings: Settings, name: str) -> ConfigError:
    """Why the store has nothing for a draft, in one sentence."""
    said = {
        "bare": "without tokens (statistics only, redacted, or empty)",
        "other": f"written by another target than {name}",
        "old": f"older than records.retention_days ({settings.records.retention_days:g})",
        "held": "held out for judging adapters",
    }
    parts = [f"{count} {said[key]}" for key, count in counts.items() if count]
    hint = "use the server for a while, or build from --prompts"
    if settings.records.keep == "statistics":
        hint = "records.keep is `statistics`, so no text is kept: build from --prompts, or set it to `content`"
    return ConfigError(f"the store has nothing to learn from: {'; '.join(parts) or 'it is empty'}", hint)
