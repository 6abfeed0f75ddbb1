"""Chat messages as plain data: how a prompt becomes messages, which conversation they belong to,
which texts they hold.

A client in OpenAI's style sends the whole history with each request and no name for the
conversation. `conversation_of` derives an id from what all its turns share. The id is a hash: it
tells nobody the text, but whoever has the text can tell that it is its hash, so a record whose text
is not kept must not keep the hash either (`retention/redaction.py`).

`read_messages` is the one reader of messages in OpenAI's form, from requests and from files.
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


# ---------------------------------------------------------------------------------------------- reading
MESSAGE_FIELDS = {"role", "content", "name"}
# fields of a message that came from an answer or are the client's bookkeeping: any value is taken, and dropped
DROPPED = {
    "reasoning_content", "reasoning", "reasoning_details", "thinking", "thinking_blocks", "refusal", "annotations", "id", "metadata",
    "cache_control",
    "created_at", "timestamp", "status", "model", "provider_specific_fields",
}  # fmt: skip
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
THOUGHT_PARTS = {"thinking", "redacted_thinking", "reasoning", "reasoning_text"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class MessageError(ValueError):
    """A value that is no chat message. `field` is where, `text` what must change, `code` OpenAI's
    name of the kind.
    """

    def __init__(self, field: str, text: str, code: str = "invalid_value") -> None:
        super().__init__(f"{field}{text}")
        self.field, self.text, self.code = field, text, code


def read_messages(values: Any, more_roles: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Chat messages in OpenAI's form, from a request or a file, as role and text (and name).

    Content parts are joined, `developer` is `system`, null is empty, and what a client keeps beside
    them is dropped. Raises MessageError for what cannot be honoured.
    """
    if not isinstance(values, list) or not values:
        raise MessageError("messages", " must be a list of messages, and not an empty one")
    roles = ROLES | {role: role for role in more_roles}
    return [_read_message(value, f"messages[{index}]", roles) for index, value in enumerate(values)]


def _read_message(message: Any, where: str, roles: dict[str, str]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise MessageError(where, " must be an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in roles:
        raise MessageError(f"{where}.role", f" must be one of {', '.join(roles)}")
    for name, value in message.items():
        if name not in MESSAGE_FIELDS and name not in DROPPED and not asks_for_nothing(value):
            raise MessageError(f"{where}.{name}", " is not supported", "unsupported_parameter")
    turn = {"role": roles[role], "content": _content(message, f"{where}.content")}
    if (name := message.get("name")) is not None and not isinstance(name, str):
        raise MessageError(f"{where}.name", " must be a text")
    return turn | {"name": name} if name else turn


def _content(message: dict[str, Any], where: str) -> str:
    value = message.get("content")
    if value is None:
        value = message.get("refusal") or ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise MessageError(where, " must be a text or a list of text parts")
    return "".join(_part_text(part, where) for part in value)


def _part_text(part: Any, where: str) -> str:
    """The text of one content part; empty for an assistant's thoughts of the past."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in THOUGHT_PARTS:
        return ""
    text = part.get(TEXT_PARTS[kind]) if isinstance(kind, str) and kind in TEXT_PARTS else None
    if not isinstance(text, str):
        raise MessageError(where, ": only text parts are supported", "unsupported_value")
    return text


def asks_for_nothing(value: Any) -> bool:
    """Whether it is null, false or empty."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)
