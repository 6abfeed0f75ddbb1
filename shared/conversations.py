"""Chat messages as plain data: how a prompt becomes messages, which conversation they belong to,
which texts they hold.

A client in OpenAI's style sends the whole history with each request and no name for the
conversation. `conversation_of` derives an id from what all its turns share. The id is a hash: it
tells nobody the text, but whoever has the text can tell that it is its hash, so a record whose text
is not kept must not keep the hash either (`retention/redaction.py`).

Knows JSON-like values only, no records and no files.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

Messages = Sequence[dict[str, Any]]

PROMPT_PREFIX = 2000  # characters of a plain prompt that tell it from others
HASH_DIGITS = 32
_HASH = re.compile(f"[0-9a-f]{{{HASH_DIGITS}}}")


def to_messages(prompt: str | Messages, system: str | None = None) -> list[dict[str, Any]]:
    """Chat messages of a plain prompt (or copies of the given ones), with a system message in front
    where one is given.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    return [{"role": "system", "content": system}, *messages] if system else messages


def conversation_of(messages: Messages, prompt: str = "") -> str:
    """The id of the conversation that `messages` continue: 32 hex digits, equal for all its turns.

    It is the hash of the system messages before the first user message and of that message. Without
    messages it is the hash of the first 2,000 characters of `prompt`.
    """
    opening = [(message.get("role"), message.get("content")) for message in _opening(messages)]
    text = ascii(opening) if messages else prompt[:PROMPT_PREFIX]  # `ascii` never fails, whatever a message holds
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:HASH_DIGITS]


def _opening(messages: Messages) -> Messages:
    """The system messages before the first user message, and the latter."""
    opening = []
    for message in messages:
        if message.get("role") in ("system", "user"):
            opening.append(message)
        if message.get("role") == "user":
            break
    return opening


def is_hash_shaped(conversation_id: str) -> bool:
    """Whether an id looks derived (or is a UUID). A part of such an id means nothing: a pattern
    matches only the whole.
    """
    return _HASH.fullmatch(conversation_id) is not None


def folded(text: str) -> str:
    """`text` as it is compared in a search: upper and lower case of all scripts are alike, and so
    are an accented letter and a letter with an accent behind it.
    """
    return unicodedata.normalize("NFC", text.casefold())


def strings(value: Any) -> Iterator[str]:
    """Every string in JSON-like data, keys included."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item


def typed_in(messages: Any) -> list[str]:
    """The texts of the user messages of a conversation. Anything that is not a list of messages has
    none.
    """
    return [
        text
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, dict) and message.get("role") == "user"
        for text in strings(message.get("content"))
    ]
