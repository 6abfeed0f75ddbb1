"""Tokens become text here: whole UTF-8 characters only, never a part of a stop string.

`TextStream` needs a tokenizer only; `TextOutput` reads a session round by round and ends its answer
where a stop string stands. The daemon, the Python API and `store show` use the same code.
"""

from dataclasses import dataclass
from typing import Any

from specl.shared.engine.capture import TokenLogprobs
from specl.shared.engine.decode import Session

INCOMPLETE = "\ufffd"  # what decoders write for an incomplete character
MAX_INCOMPLETE = 3  # of them may yet become one character: it has at most four bytes


class TextStream:
    """Text of a growing token list. `add` and `finish` return the text that became certain;
    `stopped`: a stop string was met.

    The text is what decoding all tokens at once gives (the sliding window is that of HF's
    text-generation-inference), with one exception: byte-fallback decoders (SentencePiece) replace a
    whole run of byte tokens where one of its bytes is wrong, but whole characters that were shown
    before that byte stay. At most MAX_INCOMPLETE replacement characters are held back, so that a
    text that consists of them arrives, too.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._tokens: list[int] = []
        self._context = self._read = 0  # tokens [context, read) give the decoder a context
        self._early = ""  # text of the tokens from `read` on that was released already
        self._held = ""  # text that may be the beginning of a stop string
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Text that is certain after one more token; empty once a stop string was met."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """The rest: an incomplete character becomes U+FFFD."""
        return "" if self.stopped else self._release(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        new = self._text_from_read()
        # a decoder may write one replacement character for each byte of an incomplete character
        incomplete = 0 if final else min(MAX_INCOMPLETE, len(new) - len(new.rstrip(INCOMPLETE)))
        certain = new[: len(new) - incomplete]
        # a character U+FFFD that was spelled in bytes may have been released as three
        out = certain[len(self._early) :] if certain.startswith(self._early) else certain.lstrip(INCOMPLETE)
        if incomplete:
            self._early += out
        elif new:
            self._context, self._read, self._early = self._read, len(self._tokens), ""
        return out

    def _text_from_read(self) -> str:
        """What the tokens from `read` on add to the text."""
        before = self._decode(self._context, self._read)
        after = self._decode(self._context, len(self._tokens))
        if after.startswith(before):
            return after[len(before) :]
        # a byte run went on, and is incomplete or wrong now: its whole characters have been
        # released
        return self._decode(self._read, len(self._tokens))

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._tokens[start:end])
        return text

    def _release(self, new: str, final: bool) -> str:
        self._held += new
        for stop in self._stop:
            if (index := self._held.find(stop)) >= 0:
                self._held, self.stopped = self._held[:index], True
        count = 0 if final or self.stopped else self._partial_stop()
        out = self._held[: len(self._held) - count]
        self._held = self._held[len(out) :]
        self.text += out
        return out

    def _partial_stop(self) -> int:
        """Characters at the end that may yet become a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What a round added to an answer. Everything has one entry an output token, but for two
    things: `lengths` (characters of `text` that each token made certain) has none for a token that
    ends the answer, and `logprobs` is empty where none were asked for.

    Characters of `text` beyond the sum of `lengths` were held back and came with the end.
    """

    text: str
    tokens: list[int]
    sources: bytes
    lengths: list[int]
    logprobs: list[TokenLogprobs]


class TextOutput:
    """The text of one session's answer. `stop`: strings that end it and are left out of it."""

    def __init__(self, session: Session, stop: tuple[str, ...] = ()) -> None:
        self._session = session
        self._stream = TextStream(session.target.tokenizer, stop)
        self._read = 0  # output tokens read so far

    @property
    def text(self) -> str:
        """All text so far."""
        return self._stream.text

    def read(self) -> TextDelta:
        """What was added since the last call. A stop string cuts the session's answer."""
        session, start = self._session, self._read
        stop_tokens, pieces = session.target.stop_tokens, list[str]()
        for index, token in enumerate(session.output[start:], start + 1):
            if token in stop_tokens:
                break
            pieces.append(self._stream.add(token))
            if self._stream.stopped:
                session.cut(index, "stop")
                break
        lengths = [len(piece) for piece in pieces]
        if session.finish_reason is not None:
            pieces.append(self._stream.finish())
        self._read = len(session.output)
        tokens, sources = session.output[start:], bytes(session.sources[start:])
        return TextDelta("".join(pieces), tokens, sources, lengths, session.logprobs[start:])

    def finish(self) -> str:
        """The text that was held back, of an answer that ended between two rounds (cancelled)."""
        return self._stream.finish()
