"""A drafter that somebody else wrote, in the seat of the model drafter. It may cost speed; it must not be able to change words.

`make(target, draft)` is called once a request. What it proposes is checked before it is verified: a draft with a law that does
not hold its token, or with a token that does not exist, would bend the output. One that raises or breaks a rule drafts nothing
for the rest of its request; `on_error` receives the reason.
"""

from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import mlx.core as mx
import numpy as np

from specl.shared.engine.drafters import NOTHING, Draft, Drafter, DraftSampler
from specl.shared.engine.sampling import Distribution
from specl.shared.errors import ConfigError, SpecLoraError
from specl.shared.models.head import HeadDraft
from specl.shared.models.language_model import LanguageModel

DrafterFactory = Callable[[LanguageModel, HeadDraft | LanguageModel | None], Drafter]
OnError = Callable[[Exception], None]
ROUNDING = 1e-6  # by which probabilities may miss


def raise_error(error: Exception) -> None:
    """Let the caller have it."""
    raise error


class CustomDrafter:
    """Wraps one; `length` is kept here, so that a drafter needs no more than the three methods."""

    name = "model"  # counted, priced and parked as the model drafter is
    stops = False

    def __init__(self, inner: Any, vocabulary: int, on_error: OnError = raise_error) -> None:
        missing = [method for method in ("extend", "propose", "rewind") if not callable(getattr(inner, method, None))]
        if missing:
            raise ConfigError(f"the drafter {type(inner).__name__} has no {', '.join(missing)}")
        self._inner, self._vocabulary, self._on_error = inner, vocabulary, on_error
        self.reads_states = bool(getattr(inner, "reads_states", False))
        self.length = 0
        self.broken = False

    def extend(self, tokens: Sequence[int], states: mx.array | None) -> None:
        """See Drafter."""
        self.length += len(tokens)
        self._call(self._inner.extend, list(tokens), states)

    def rewind(self, length: int) -> None:
        """See Drafter."""
        self.length = min(length, self.length)
        self._call(self._inner.rewind, length)

    def propose(self, k: int, draw: DraftSampler) -> Draft:
        """See Drafter."""
        if k <= 0:
            return NOTHING
        return self._call(self._proposed, k, draw) or NOTHING

    def _proposed(self, k: int, draw: DraftSampler) -> Draft:
        return self._checked(self._inner.propose(k, draw), k)

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        if self.broken:
            return None
        try:
            return method(*arguments)
        except MemoryError:
            raise
        except Exception as error:
            self.broken = True
            self._on_error(error)
            return None

    def _checked(self, draft: Draft, k: int) -> Draft:
        """The draft in plain numbers. Raises for one that breaks a rule, and whatever its own odd values raise."""
        who = type(self._inner).__name__
        if not isinstance(draft, Draft):
            raise SpecLoraError(f"{who} proposed a {type(draft).__name__}, not a Draft")
        tokens, confidences = [index(token) for token in draft.tokens], [float(value) for value in draft.confidences]
        if len(tokens) > k:
            raise SpecLoraError(f"{who} proposed {len(tokens)} tokens where {k} were asked for")
        if not len(tokens) == len(draft.draft_probs) == len(confidences):
            raise SpecLoraError(
                f"{who}: {len(tokens)} tokens, {len(draft.draft_probs)} distributions, {len(confidences)} confidences"
            )
        if wrong := [value for value in confidences if not 0 <= value <= 1 + ROUNDING]:
            raise SpecLoraError(f"{who}: a confidence of {wrong[0]} is no probability")
        draft_probs = [self._distribution(token, probs) for token, probs in zip(tokens, draft.draft_probs, strict=True)]
        return Draft(tokens, draft_probs, [min(value, 1.0) for value in confidences], self.name)

    def _distribution(self, token: int, probs: Distribution) -> Distribution:
        who = type(self._inner).__name__
        if not 0 <= token < self._vocabulary:
            raise SpecLoraError(f"{who} proposed token {token} of a vocabulary of {self._vocabulary}")
        ids, p = np.asarray(probs.ids), np.asarray(probs.p, np.float64)
        if not (
            ids.ndim == 1
            and ids.shape == p.shape
            and ids.dtype.kind in "iu"
            and (np.diff(ids.astype(np.int64)) > 0).all()
        ):
            raise SpecLoraError(f"{who}: the law of token {token} is not one p for each of its ids, sorted, none twice")
        if ids.size and not (ids[0] >= 0 and ids[-1] < self._vocabulary):
            raise SpecLoraError(
                f"{who}: the law of token {token} names ids outside the vocabulary of {self._vocabulary}"
            )
        if not (np.isfinite(p).all() and (p >= 0).all()):
            raise SpecLoraError(f"{who}: the law of token {token} has a p that is negative or no number")
        checked = Distribution(ids.astype(np.int64, copy=False), p)
        if not checked.of(token) > 0 or abs(float(p.sum()) - 1) > ROUNDING:
            raise SpecLoraError(f"{who}: the law of token {token} does not hold it, or does not sum to 1")
        return checked
