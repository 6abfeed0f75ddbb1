"""A user's drafter in place of the model drafter. It may cost speed; it cannot change the output.

`factory(target, draft)` is called once a request. What the drafter proposes is checked before it is
verified: a distribution that does not contain its token, or a token that does not exist, would bend
the output's distribution. A drafter that raises or breaks a rule drafts nothing for the rest of its
request, and `on_error` receives the reason.
"""

from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import mlx.core as mx
import numpy as np

from specl.shared.engine.drafters import NO_DRAFT, Draft, Drafter, DraftSampler
from specl.shared.engine.sampling import Distribution
from specl.shared.errors import ConfigError, SpecLoraError
from specl.shared.models.head import HeadDraft
from specl.shared.models.language_model import LanguageModel

DrafterFactory = Callable[[LanguageModel, HeadDraft | LanguageModel | None], Drafter]
OnError = Callable[[Exception], None]
ROUNDING = 1e-6  # by which probabilities may be off


def raise_error(error: Exception) -> None:
    """Raise it: errors reach the caller where nobody else receives them."""
    raise error


class CustomDrafter:
    """Wraps a user's drafter. Counts `length` itself, so that the drafter needs only three methods.

    Raises ConfigError where one of `extend`, `propose` and `rewind` is missing.
    """

    name = "model"  # counted, priced and parked like the model drafter
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
        """The text grew by these tokens."""
        self.length += len(tokens)
        self._call(self._inner.extend, list(tokens), states)

    def rewind(self, length: int) -> None:
        """The text is cut to its first `length` tokens."""
        self.length = min(length, self.length)
        self._call(self._inner.rewind, length)

    def propose(self, k: int, sampler: DraftSampler) -> Draft:
        """At most k tokens that may follow, checked."""
        if k <= 0:
            return NO_DRAFT
        draft: Draft | None = self._call(self._propose, k, sampler)
        return draft or NO_DRAFT

    def _propose(self, k: int, sampler: DraftSampler) -> Draft:
        return self._checked(self._inner.propose(k, sampler), k)

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        if self.broken:
            return None
        try:
            return method(*arguments)
        except MemoryError:
            raise
        except Exception as error:  # a user's code raises whatever it likes
            self.broken = True
            self._on_error(error)
            return None

    def _checked(self, draft: Draft, k: int) -> Draft:
        """The draft in plain numbers. Raises SpecLoraError where it breaks a rule, or what odd
        values raise.
        """
        drafter = type(self._inner).__name__
        if not isinstance(draft, Draft):
            raise SpecLoraError(f"{drafter} proposed a {type(draft).__name__}, not a Draft")
        tokens, confidences = [index(token) for token in draft.tokens], [float(value) for value in draft.confidences]
        if len(tokens) > k:
            raise SpecLoraError(f"{drafter} proposed {len(tokens)} tokens where {k} were asked for")
        if not len(tokens) == len(draft.draft_probs) == len(confidences):
            raise SpecLoraError(
                f"{drafter}: {len(tokens)} tokens, {len(draft.draft_probs)} distributions, {len(confidences)} confidences"
            )
        if wrong := [value for value in confidences if not 0 <= value <= 1 + ROUNDING]:
            raise SpecLoraError(f"{drafter}: a confidence of {wrong[0]} is no probability")
        draft_probs = [self._distribution(token, probs) for token, probs in zip(tokens, draft.draft_probs, strict=True)]
        return Draft(tokens, draft_probs, [min(value, 1.0) for value in confidences], self.name)

    def _distribution(self, token: int, probs: Distribution) -> Distribution:
        """A drafted token's distribution in plain numbers. Raises SpecLoraError where it is none."""
        drafter, size = type(self._inner).__name__, self._vocabulary
        if not 0 <= token < size:
            raise SpecLoraError(f"{drafter} proposed token {token} of a vocabulary of {size}")
        what = f"{drafter}: the distribution of token {token}"
        ids, p = np.asarray(probs.ids), np.asarray(probs.p, np.float64)
        integers = ids.ndim == 1 and ids.shape == p.shape and ids.dtype.kind in "iu"
        if not (integers and (np.diff(ids.astype(np.int64)) > 0).all()):
            raise SpecLoraError(f"{what} does not have one p for each of its ids, sorted, none twice")
        if ids.size and not (ids[0] >= 0 and ids[-1] < size):
            raise SpecLoraError(f"{what} names ids outside the vocabulary of {size}")
        if not (np.isfinite(p).all() and (p >= 0).all()):
            raise SpecLoraError(f"{what} has a p that is negative or no number")
        checked = Distribution(ids.astype(np.int64, copy=False), p)
        if not checked.of(token) > 0 or abs(float(p.sum()) - 1) > ROUNDING:
            raise SpecLoraError(f"{what} does not contain it, or does not sum to 1")
        return checked
