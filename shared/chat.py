"""What people may pass as a prompt: a text, or chat messages."""

from collections.abc import Sequence
from typing import Any

Messages = Sequence[dict[str, Any]]


def to_messages(prompt: str | Messages, system: str | None = None) -> list[dict[str, Any]]:
    """Chat messages of a plain prompt (or themselves), with a system message in front where one is given."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    return [{"role": "system", "content": system}, *messages] if system else messages
