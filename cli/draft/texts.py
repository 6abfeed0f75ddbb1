"""What `specl-ctl draft build` learns from: the shipped prompts, a file's, or what the store holds
of the user's own traffic.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from enum import Enum, auto
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
TOKEN_BYTES = 4  # of a stored token


class Unusable(Enum):
    """Why a stored answer is not learned from."""

    NO_TOKENS = auto()
    OTHER_TARGET = auto()
    OLD = auto()
    HELD_OUT = auto()


def prompts_of(file: str) -> tuple[list[Any], str]:
    """The prompts in `file` (in plain text a line may also be JSON), or the shipped ones, and their
    sha256. Prompts that share eight words in a row with an evaluation prompt are left out. Raises
    ConfigError that names file and line.
    """
    from specl.shared import prompts

    if file == SHIPPED:
        return prompts.load("train"), prompts.sha256("train")
    if file == "-":
        raise ConfigError("--prompts wants a file: a build that was stopped reads it again")
    file_prompts = read_prompts(file, json_in_text=True)
    items = [
        prompts.ShippedPrompt(f"line-{item.line}", "user", item.messages)
        for item in file_prompts
        if not any(prompts.is_evaluation_text(str(message["content"])) for message in item.messages)
    ]
    if not items:
        raise ConfigError(f"every prompt of {file} has words of the prompts that drafts are evaluated on")
    if len(items) < len(file_prompts):
        note = f"{len(file_prompts) - len(items)} prompts of {file} are left out: drafts are evaluated on prompts with the same words"
        click.echo(note, err=True)
    return items, hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()


def answers_of(files: Sequence[str], fingerprint: str) -> tuple[list["WrittenText"], list[str]]:
    """Texts that this target wrote for earlier builds, and the sha256 of each file. Raises
    ConfigError for a file of another kind.
    """
    from specl.shared.training_files.target_texts import load_target_texts

    texts: list[WrittenText] = []
    names = [Path(file).stem for file in files]
    if len(set(names)) < len(names):
        raise ConfigError("--answers wants files of different names")
    for file in files:
        try:
            texts += load_target_texts(Path(file).expanduser(), fingerprint)
        except ModelError as error:
            raise ConfigError(str(error), error.hint) from error
    return texts, [hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest() for file in files]


def texts_of_store(path: Path, settings: Settings, fingerprint: str, name: str) -> list["WrittenText"]:
    """The answers of this target in the store that a draft may learn from. Left out are
    conversations that are held out for evaluating adapters, texts that also occur in one of those,
    texts older than retention allows, and records without tokens (statistics only, or redacted).
    Raises ConfigError that says why where nothing is left.
    """
    from specl.shared.learning.examples import is_held_out
    from specl.shared.learning.recapture import LONGEST
    from specl.shared.store import Store

    if not path.is_file():
        raise ConfigError(f"there is nothing to learn from: no store at {path} yet", "use the server first")
    since = time.time() - 86400 * settings.records.retention_days if settings.records.retention_days else 0.0
    counts: Counter[Unusable] = Counter()
    texts: dict[bytes, WrittenText] = {}
    held_out: set[bytes] = set()
    store = Store(path, read_only=True)
    try:
        for row in store.each():
            if reason := _unusable(row, fingerprint, since):
                counts[reason] += 1
                continue
            text = _text(row)
            key = text.tokens[:LONGEST].tobytes()  # what is left out of a long text makes no difference
            if is_held_out(row.conversation_id, settings.training.heldout_share):
                held_out.add(key)
                counts[Unusable.HELD_OUT] += 1
            else:
                texts[key] = text
    finally:
        store.close()
    counts[Unusable.HELD_OUT] += len(held_out & texts.keys())
    usable = [text for key, text in texts.items() if key not in held_out]
    if not usable:
        raise _nothing_to_learn(counts, settings, name)
    return usable


def _unusable(row: "StoredGeneration", fingerprint: str, since: float) -> Unusable | None:
    if len(row.output_tokens) <= TOKEN_BYTES or not row.prompt_tokens:
        return Unusable.NO_TOKENS
    if row.target_fingerprint != fingerprint:
        return Unusable.OTHER_TARGET
    return Unusable.OLD if row.created_at < since else None


def _text(row: "StoredGeneration") -> "WrittenText":
    import numpy as np

    from specl.shared.learning.recapture import WrittenText

    prompt, output = (np.frombuffer(tokens, "<u4") for tokens in (row.prompt_tokens, row.output_tokens))
    return WrittenText(row.id, np.concatenate([prompt, output]), len(prompt), row.temperature == 0)


def _nothing_to_learn(counts: Counter[Unusable], settings: Settings, name: str) -> ConfigError:
    """Why the store has nothing for a draft, in one sentence."""
    sentences = {
        Unusable.NO_TOKENS: "without tokens (statistics only, redacted, or empty)",
        Unusable.OTHER_TARGET: f"written by another target than {name}",
        Unusable.OLD: f"older than records.retention_days ({settings.records.retention_days:g})",
        Unusable.HELD_OUT: "held out for evaluating adapters",
    }
    parts = [f"{counts[reason]} {sentence}" for reason, sentence in sentences.items() if counts[reason]]
    hint = "use the server for a while, or build from --prompts"
    if settings.records.keep == "statistics":
        hint = "records.keep is `statistics`, so no text is kept: build from --prompts, or set it to `content`"
    return ConfigError(f"the store has nothing to learn from: {'; '.join(parts) or 'it is empty'}", hint)
