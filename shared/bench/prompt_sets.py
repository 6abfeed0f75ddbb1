"""The frozen prompt sets of the bench, with their hashes: chat, code, copying, text that is hard to
draft, the reserved kinds.

The structured set comes from the seeded generator of the reserved kinds, from the part of its
values that no draft ever saw.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from specl.shared import prompts
from specl.shared.prompts import reserved

NAMES = ("general", "code", "structured", "copy", "adversarial")
STRUCTURED_EACH = 20  # prompts of each reserved kind in the frozen set
FROM_OPTION = "prompt"  # the set of `--prompt`


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """One prompt of a set."""

    id: str
    set: str
    messages: list[dict[str, Any]]


def _structured() -> list[BenchPrompt]:
    texts = {kind: reserved.prompts(kind, STRUCTURED_EACH, split="unseen") for kind in reserved.KINDS}
    return [
        BenchPrompt(f"{kind}-{n:04}", "structured", [{"role": "user", "content": texts[kind][n]}])
        for n in range(STRUCTURED_EACH)
        for kind in reserved.KINDS
    ]


def load(name: str) -> list[BenchPrompt]:
    """A set in its frozen order. Raises ValueError for a name that does not exist."""
    if name == "structured":
        return _structured()
    return [BenchPrompt(item.id, name, item.messages) for item in prompts.load(f"bench/{name}")]


def sha256(name: str) -> str:
    """The hash that reports quote."""
    if name != "structured":
        return prompts.sha256(f"bench/{name}")
    text = json.dumps([item.messages for item in _structured()], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def pick(name: str, count: int) -> list[BenchPrompt]:
    """`count` prompts spread evenly over a set: neighbours share their template."""
    items = load(name)
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
