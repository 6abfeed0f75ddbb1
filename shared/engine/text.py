"""Tokens to text as they come: never half a UTF-8 character, never part of a stop string. Knows nothing of models."""

from typing import Any

HOLD = "\ufffd"  # what decoders write for an incomplete character
UNSURE = 3  # replacement characters at the end that may yet become a character: it has at most four bytes


class TextStream:
    """Text of a growing token list. `add` and `finish` return what became certain; `stopped` tells a stop string was met.

    The text is what decoding all tokens at once gives (the sliding window is that of HF's text-generation-inference), but
    for one case: byte-fallback decoders (SentencePiece) blot out a whole run of byte tokens where one of its bytes is wrong,
    and whole characters of it that were shown before that byte stay as they are. At most UNSURE replacement characters are
    held back, so a text that consists of them comes, too.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._tokens: list[int] = []
        self._context = self._read = 0  # tokens [context, read) give the decoder something to start from
        self._early = ""  # released of the tokens behind them
        self._held = ""
        self.text = ""
        self.stopped = False

    def _new_text(self, final: bool) -> str:
        new = self._ahead()
        # a decoder may write one replacement character for each byte of an incomplete character
        unsure = 0 if final else min(UNSURE, len(new) - len(new.rstrip(HOLD)))
        certain = new[: len(new) - unsure]
        # a character U+FFFD that was spelled in bytes may have been released as three
        out = certain[len(self._early) :] if certain.startswith(self._early) else certain.lstrip(HOLD)
        if unsure:
            self._early += out
        elif new:
            self._context, self._read, self._early = self._read, len(self._tokens), ""
        return out

    def _ahead(self) -> str:
        """What the tokens behind `read` add to the text."""
        before = self._tokenizer.decode(self._tokens[self._context : self._read])
        after = self._tokenizer.decode(self._tokens[self._context :])
        if after.startswith(before):
            return after[len(before) :]
        # a byte run went on, and is incomplete or wrong now: what was whole of it has been released
        return self._tokenizer.decode(self._tokens[self._read :])

    def add(self, token: int) -> str:
        """Text that is certain after one more token; nothing once a stop string was met."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """The rest: a character left incomplete becomes U+FFFD."""
        return "" if self.stopped else self._release(self._new_text(final=True), final=True)

    def _release(self, new: str, final: bool) -> str:
        self._held += new
        for stop in self._stop:
            if (place := self._held.find(stop)) >= 0:
                self._held, self.stopped = self._held[:place], True
        keep = 0 if final or self.stopped else self._partial_stop()
        out = self._held[: len(self._held) - keep]
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
