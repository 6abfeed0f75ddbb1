"""A drafter of one's own: what followed this token last time. `python examples/custom_drafter.py [TARGET]`.

For the daemons: `speculative: {drafter: "custom_drafter:make"}` in the settings, with this folder on PYTHONPATH.
"""

import sys
from collections.abc import Sequence

from specl import Engine
from specl.shared.engine.drafters import NO_DRAFT, Draft, DraftSampler
from specl.shared.engine.sampling import point_mass
from specl.shared.models.language_model import LanguageModel


class Bigrams:
    """One a request. The three methods are all that is needed; `reads_states = True` would get the target's states as well."""

    def __init__(self) -> None:
        self.text: list[int] = []
        self.after: dict[int, int] = {}

    def extend(self, tokens: Sequence[int], states: object) -> None:
        """The text grew: the prompt first, then every round's tokens."""
        for token in tokens:
            if self.text:
                self.after[self.text[-1]] = token
            self.text.append(token)

    def rewind(self, length: int) -> None:
        """Only the first `length` tokens still stand."""
        text = self.text[:length]
        self.text, self.after = [], {}
        self.extend(text, None)

    def propose(self, k: int, draw: DraftSampler) -> Draft:
        """At most k tokens; for each the law it was drawn from (here: it could be no other) and a confidence."""
        tokens, last = [], self.text[-1]
        while len(tokens) < k and last in self.after:
            last = self.after[last]
            tokens.append(last)
        if not tokens:
            return NO_DRAFT
        return Draft(tokens, [point_mass(token) for token in tokens], [1.0] * len(tokens), "model")


def make(target: LanguageModel, draft: object) -> Bigrams:
    """Called for every request, with the target and the configured draft (or None)."""
    return Bigrams()


if __name__ == "__main__":
    prompt = "Count from one to ten, then do it again."
    wish = {"max_tokens": 48, "temperature": 0, "num_draft_tokens": 3, "ngram": False}
    with Engine.load(*sys.argv[1:2], draft=None, drafter=make) as engine:
        drafted = engine.generate(prompt, **wish)
        plain = engine.generate(prompt, **wish | {"num_draft_tokens": 0})
    print(drafted.text)
    print(f"{drafted.stats.model_accepted} of {drafted.stats.model_drafted} guesses stood")
    print(f"{drafted.stats.rounds} rounds instead of {plain.stats.rounds}; same text: {drafted.text == plain.text}")
