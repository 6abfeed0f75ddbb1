"""A drafter that somebody else wrote, in the seat of the model drafter. It may cost speed; it must not be able to change words.

`make(target, draft)` is called once a request. What it proposes is checked before it is verified: a draft with a law that does
not hold its token, or with a token that does not exist, would bend the output. One that raises or breaks a rule drafts nothing
for the rest of its request; `complain` hears why.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from specl.shared.engine.drafters import NOTHING, Draft, Drafter, Draw
from specl.shared.errors import ConfigError, SpecLoraError
from specl.shared.models.head import HeadDraft
from specl.shared.models.load import LanguageModel

MakeDrafter = Callable[[LanguageModel, HeadDraft | LanguageModel | None], Drafter]
Complain = Callable[[Exception], None]


def raise_it(error: Exception) -> None:
    """Let the caller have it."""
    raise error


class OwnDrafter:
    """Wraps one; `length` is kept here, so that a drafter needs no more than the three methods."""

    name = "model"  # counted, priced and parked as the model drafter is
    stops = False

    def __init__(self, inner: Any, vocabulary: int, complain: Complain = raise_it) -> None:
        missing = [method for method in ("extend", "propose", "rewind") if not callable(getattr(inner, method, None))]
        if missing:
            raise ConfigError(f"the drafter {type(inner).__name__} has no {', '.join(missing)}")
        self._inner, self._vocabulary, self._complain = inner, vocabulary, complain
        self.reads_states = bool(getattr(inner, "reads_states", False))
        self.length = 0
        self._broken = False

    def extend(self, tokens: Sequence[int], states: mx.array | None) -> None:
        """See Drafter."""
        self.length += len(tokens)
        self._call(self._inner.extend, list(tokens), states)

    def rewind(self, length: int) -> None:
        """See Drafter."""
        self.length = min(length, self.length)
        self._call(self._inner.rewind, length)

    def propose(self, k: int, draw: Draw) -> Draft:
        """See Drafter."""
        if k <= 0:
            return NOTHING
        draft = self._call(self._inner.propose, k, draw)
        if draft is None or self._broken or not draft.tokens:
            return NOTHING
        return replace(draft, drafter=self.name)

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        if self._broken:
            return None
        try:
            result = method(*arguments)
            if method == self._inner.propose:
                self._check(result, arguments[0])
            return result
        except MemoryError:
            raise
        except Exception as error:
            self._broken = True
            self._complain(error)
            return None

    def _check(self, draft: Draft, k: int) -> None:
        who = type(self._inner).__name__
        if not isinstance(draft, Draft):
            raise SpecLoraError(f"{who} proposed a {type(draft).__name__}, not a Draft")
        tokens, laws, confidences = draft.tokens, draft.laws, draft.confidences
        if len(tokens) > k:
            raise SpecLoraError(f"{who} proposed {len(tokens)} tokens where {k} were asked for")
        if not len(tokens) == len(laws) == len(confidences):
            raise SpecLoraError(f"{who}: {len(tokens)} tokens, {len(laws)} laws, {len(confidences)} confidences")
        for token, law in zip(tokens, laws, strict=True):
            if not 0 <= token < self._vocabulary:
                raise SpecLoraError(f"{who} proposed token {token} of a vocabulary of {self._vocabulary}")
            if not law.of(token) > 0 or abs(float(law.p.sum()) - 1) > 1e-6:
                raise SpecLoraError(f"{who}: the law of token {token} does not hold it, or does not sum to 1")
