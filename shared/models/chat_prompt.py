"""Chat messages as the text and tokens of a prompt. What a message says stays text: only the chat
template writes control tokens.

Control tokens' texts in a message (`<|im_end|>`) are marked before the template runs, so that the
tokenizer can be told apart whose they are. Knows tokenizers, no weights and no caches.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from specl.shared.errors import ModelError, RequestRejected

MARK = "\ufdd0"  # a noncharacter: after the first letter of a control token's text in a message
WITNESS = "xqzmarkerzqx"  # a user's words in the trial of a template
_SINGLE_MARK = re.compile(f"(?<!{MARK}){MARK}(?!{MARK})")
ContentForm = Literal["text", "parts"]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered prompt. `marked` is its text with marks, or None where no message holds a control
    token's text.
    """

    text: str
    marked: str | None = None


def control_texts(tokenizer: Any) -> dict[str, Any]:
    """The texts of a tokenizer's control tokens; with what the tokenizer says of each, where it
    does.
    """
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    texts = {str(token): token for token in added.values() if token.special}
    for text in getattr(tokenizer, "all_special_tokens", ()):
        texts.setdefault(text, None)
    texts.pop("", None)
    return texts


def _matcher(texts: Sequence[str]) -> re.Pattern[str] | None:
    """Matches the longest control token at a place."""
    alternatives = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
    return re.compile(f"({alternatives})") if alternatives else None


def render(tokenizer: Any, messages: Sequence[dict[str, Any]], form: ContentForm = "text") -> ChatPrompt:
    """Messages through the chat template. Raises RequestRejected where the template refuses."""
    matcher = _matcher(list(control_texts(tokenizer)))
    held = matcher is not None and _holds(messages, matcher)
    sent = [_marked(message, matcher) if held and matcher else dict(message) for message in messages]
    if form == "parts":
        sent = [_as_parts(message) for message in sent]
    try:
        text: str = tokenizer.apply_chat_template(sent, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # Jinja templates raise whatever their authors chose
        raise RequestRejected(f"the chat template refuses these messages: {error}") from error
    return ChatPrompt(_plain(text), text) if held else ChatPrompt(text)


def _holds(value: Any, matcher: re.Pattern[str]) -> bool:
    """Whether any text in JSON-like data holds a control token's."""
    if isinstance(value, str):
        return matcher.search(value) is not None
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(_holds(item, matcher) for item in items)


def _marked(value: Any, matcher: re.Pattern[str]) -> Any:
    """The data with a mark in every control token's text; marks that were there are doubled."""
    if isinstance(value, str):
        pieces = matcher.split(value.replace(MARK, MARK * 2))
        return "".join(f"{piece[0]}{MARK}{piece[1:]}" if index % 2 else piece for index, piece in enumerate(pieces))
    if isinstance(value, dict):
        return {name: item if name == "role" else _marked(item, matcher) for name, item in value.items()}
    return [_marked(item, matcher) for item in value] if isinstance(value, list | tuple) else value


def _plain(text: str) -> str:
    return re.sub(f"{MARK}({MARK}?)", r"\1", text)


def _as_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def encode(tokenizer: Any, prompt: ChatPrompt) -> list[int]:
    """The tokens of a rendered prompt. A control token's text in a message is encoded as text."""
    if prompt.marked is None:
        return list(tokenizer.encode(prompt.text, add_special_tokens=False))
    texts = control_texts(tokenizer)
    matcher = _matcher(list(texts))
    assert matcher is not None  # there are marks, so that there are control tokens
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[text] for text in texts if text in vocabulary}
    tokens: list[int] = []
    pieces = matcher.split(prompt.marked)
    for index, piece in enumerate(pieces):
        if index % 2:
            tokens += tokenizer.encode(piece, add_special_tokens=False)
            continue
        before, after = (texts.get(pieces[at]) if 0 <= at < len(pieces) else None for at in (index - 1, index + 1))
        piece = piece.lstrip() if getattr(before, "rstrip", False) else piece
        piece = piece.rstrip() if getattr(after, "lstrip", False) else piece
        if piece:
            tokens += _encode_text(tokenizer, piece, ids)
    return tokens


def _encode_text(tokenizer: Any, marked: str, control: set[int]) -> list[int]:
    """The tokens of marked text, none of them a control token.

    A tokenizer knows a token that it does not call special (an end of a turn in many files) in any
    text; so there the text is cut within the token's.
    """
    tokens = list(tokenizer.encode(_plain(marked), add_special_tokens=False, split_special_tokens=True))
    if control.isdisjoint(tokens):
        return tokens
    parts = [_plain(part) for part in _SINGLE_MARK.split(marked)]
    return [token for part in parts if part for token in tokenizer.encode(part, add_special_tokens=False)]


def count_control(tokenizer: Any) -> Callable[[str], int]:
    """A function that counts the control tokens that a text names."""
    matcher = _matcher(list(control_texts(tokenizer)))
    return lambda text: len(matcher.findall(text)) if matcher is not None else 0


def content_form(name: str, tokenizer: Any) -> ContentForm:
    """How this model's template takes a message's content: renders once and looks for the words.

    Raises ModelError where a template drops the user's words in every form. A model without a
    template, or one whose template refuses the trial, is left as it is.
    """
    message = {"role": "user", "content": WITNESS}
    dropped = False
    forms: tuple[ContentForm, ...] = ("text", "parts")
    for form in forms:
        try:
            if WITNESS in render(tokenizer, [message], form).text:
                return form
            dropped = True
        except RequestRejected:
            continue
    if dropped:
        raise ModelError(
            f"the chat template of {name} drops the user's words",
            "take the chat template of the model's base, or a model that is made for text",
        )
    return "text"
