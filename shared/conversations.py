"""Which conversation an answer belongs to: what its client says, else a hash of what all turns of one have in common.

A client in OpenAI's style sends the whole history each time and no name for it. Its turns share how they began; so do the
repeats of one prompt. The hash tells nobody the text, but whoever has the text can tell that it is its hash: a record whose
text is not kept does not keep the hash either (shared/retention/redaction.py).
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

BEGINNING = 2000  # characters of a plain prompt that tell it from others
DIGITS = 32
_HASH = re.compile(f"[0-9a-f]{{{DIGITS}}}")


def conversation_of(messages: Sequence[dict[str, Any]], prompt: str = "") -> str:
    """The id of the conversation that `messages` go on with: 32 hex digits, the same for every turn, from the system messages
    up to the first user message and that one. Without messages it is made of the first 2,000 characters of `prompt`.
    """
    began = [(message.get("role"), message.get("content")) for message in _beginning(messages)]
    told = ascii(began) if messages else prompt[:BEGINNING]  # `ascii` never fails, whatever a message holds
    return hashlib.sha256(told.encode("utf-8", "backslashreplace")).hexdigest()[:DIGITS]


def _beginning(messages: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The system messages before the first user message, and that."""
    kept = []
    for message in messages:
        if message.get("role") in ("system", "user"):
            kept.append(message)
        if message.get("role") == "user":
            break
    return kept


def is_hash_shaped(conversation_id: str) -> bool:
    """Whether an id looks derived (or is a UUID): a part of it says nothing, so only the whole of it matches a pattern."""
    return _HASH.fullmatch(conversation_id) is not None
