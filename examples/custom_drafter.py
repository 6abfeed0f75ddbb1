"""A custom drafter: what followed this token last time. `python examples/custom_drafter.py
[TARGET]`.

For the daemons: `speculative: {drafter: "custom_drafter:make"}` in the settings, with this folder
on PYTHONPATH.
"""

import sys
from collections.abc import Sequence
from typing import Any

from specl import Engine
from specl.shared.engine.drafters import NO_DRAFT, Draft, DraftSampler
from specl.shared.engine.sampling import point_mass
from specl.shared.models.language_model import LanguageModel


class Bigrams:
    """One object a request. The three methods are all that is needed.

    With `reads_states = True`, `extend` would get the target's hidden states as well.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self.next_token: dict[int, int] = {}

    def extend(self, tokens: Sequence[int], states: object) -> None:
        """The text grew: the prompt first, then every round's tokens."""
        for token in tokens:
            if self.text:
                self.next_token[self.text[-1]] = token
            self.text.append(token)

    def rewind(self, length: int) -> None:
        """The text is cut to its first `length` tokens."""
        text = self.text[:length]
        self.text, self.next_token = [], {}
        self.extend(text, None)

    def propose(self, k: int, sampler: DraftSampler) -> Draft:
        """At most k tokens, each with the distribution it was drawn from and a confidence.

        Nothing is drawn here: the distributions are point masses.
        """
        tokens: list[int] = []
        last = self.text[-1]
        while len(tokens) < k and last in self.next_token:
            last = self.next_token[last]
            tokens.append(last)
        if not tokens:
            return NO_DRAFT
        return Draft(tokens, [point_mass(token) for token in tokens], [1.0] * len(tokens), "model")


def make(target: LanguageModel, draft: object) -> Bigrams:
    """Called for every request, with the target and the configured draft (or None)."""
    return Bigrams()


if __name__ == "__main__":
    prompt = "Count from one to ten, then do it again."
    options: dict[str, Any] = {"max_tokens": 48, "temperature": 0, "num_draft_tokens": 3, "ngram": False}
    with Engine.load(*sys.argv[1:2], draft=None, drafter=make) as engine:
        drafted = engine.generate(prompt, **options)
        plain = engine.generate(prompt, **options | {"num_draft_tokens": 0})
    print(drafted.text)
    print(f"{drafted.stats.model_accepted} of {drafted.stats.model_drafted} drafted tokens were accepted")
    print(f"{drafted.stats.rounds} rounds instead of {plain.stats.rounds}; same text: {drafted.text == plain.text}")
