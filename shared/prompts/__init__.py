"""The shipped prompt sets, which are frozen (README.md in this folder says how they were made).
Reads files, knows no models.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from specl.shared.prompts.reserved import TRACES

GRAM = 8  # words in a row that no training text shares with an evaluation set
SETS = ("train", "heldout", "regression", "bench/general", "bench/code", "bench/copy", "bench/adversarial")


@dataclass(frozen=True, slots=True)
class ShippedPrompt:
    """One prompt: chat messages that end with the user's."""

    id: str
    kind: str
    messages: list[dict[str, Any]]


def path_of(name: str) -> Path:
    """The file of a set. Raises ValueError for a set that does not exist."""
    if name not in SETS:
        raise ValueError(f"no prompt set {name!r}; there are {', '.join(SETS)}")
    return Path(str(files("specl.shared.prompts"))) / f"{name}.jsonl"


def load(name: str) -> list[ShippedPrompt]:
    """A set by name, in its frozen order."""
    lines = path_of(name).read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines if line.strip()]
    return [ShippedPrompt(item["id"], item["kind"], item["messages"]) for item in items]


def sha256(name: str) -> str:
    """The set's hash, as reports quote it."""
    return hashlib.sha256(path_of(name).read_bytes()).hexdigest()


def runs(text: str) -> set[tuple[str, ...]]:
    """All runs of eight words of a text."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


@cache
def _evaluation_runs() -> frozenset[tuple[str, ...]]:
    messages = [message for name in SETS if name != "train" for prompt in load(name) for message in prompt.messages]
    return frozenset().union(*(runs(message["content"]) for message in messages))


def may_train(text: str) -> bool:
    """Whether a synthetic prompt shares no eight words with an evaluation set and has no trace of a
    reserved kind.
    """
    return not TRACES.search(text) and not is_evaluation_text(text)


def is_evaluation_text(text: str) -> bool:
    """Whether a text shares eight words in a row with an evaluation set: a draft that learns it
    cannot be evaluated on it.
    """
    return not _evaluation_runs().isdisjoint(runs(text))
