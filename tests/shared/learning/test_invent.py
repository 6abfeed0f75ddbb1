"""Synthetic prompts: complete, accepted, reproducible by seed; and what keeps evaluation sets out of training."""

from types import SimpleNamespace

import numpy as np
import pytest

from specl.shared import prompts
from specl.shared.errors import ModelError
from specl.shared.learning import synthetic_prompts as module
from specl.shared.learning.synthetic_prompts import LONGEST, synthetic_prompts
from specl.shared.prompts import reserved

HOT = 50.0  # a random model says one token only at 1


class Ends:
    """The random target, with enough words that end a turn for turns to end."""

    def __init__(self, target):
        self._target = target
        self.stop_tokens = frozenset(range(0, int(target.config["vocab_size"]), 24))

    def __getattr__(self, name):
        return getattr(self._target, name)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_synthetic_prompts_are_whole_distinct_and_seeded(stored):
    target = Ends(stored())
    made = synthetic_prompts(target, 40, HOT, rng(), lambda text: True)
    assert 5 < len(made) <= 40 and len(set(made)) == len(made)
    assert (
        made
        == synthetic_prompts(target, 40, HOT, rng(), lambda text: True)
        != synthetic_prompts(target, 40, HOT, rng(1), lambda text: True)
    )
    assert all(text == text.strip() and len(text) >= module.SHORTEST for text in made)


def test_unfinished_and_excluded_prompts_are_dropped(stored):
    target = Ends(stored())
    target.stop_tokens = frozenset()
    assert synthetic_prompts(target, 6, HOT, rng(), lambda text: True) == []
    target = Ends(stored())
    first, *rest = synthetic_prompts(target, 40, HOT, rng(), lambda text: True)
    assert synthetic_prompts(target, 40, HOT, rng(), lambda text: text != first) == rest


def test_model_is_prompted_with_its_template_prefix(stored, monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "batch_generate", lambda target, tries, longest, *more: seen.append((tries, longest)) or []
    )
    target = stored()
    synthetic_prompts(target, 3, 0.9, rng(), lambda text: True)
    ((tries, longest),) = seen
    rendered = target.tokenizer.apply_chat_template([{"role": "user", "content": "rain"}], tokenize=False)
    assert len(tries) == 3 and longest == LONGEST and {t.temperature for t in tries} == {0.9}
    assert rendered.startswith(target.tokenizer.decode(tries[0].tokens))


def test_template_that_hides_user_words_is_refused():
    tokenizer = SimpleNamespace(apply_chat_template=lambda *given, **more: "fixed")
    with pytest.raises(ModelError, match="chat template"):
        synthetic_prompts(
            SimpleNamespace(tokenizer=tokenizer, name="odd", content_form="text"), 1, 1.0, rng(), lambda text: True
        )


def test_judging_sets_and_reserved_kinds_are_excluded():
    for name in ("heldout", "regression", "bench/code"):
        long = max((p.messages[-1]["content"] for p in prompts.load(name)), key=len)
        assert not prompts.may_train(long) and not prompts.may_train(f"so {long} then")
    for kind in reserved.KINDS:
        assert not any(map(prompts.may_train, reserved.prompts(kind, 20)))
    assert prompts.may_train("Can you suggest a method to deal with painful experiences that could help me heal?")
    assert all(prompts.may_train(m["content"]) for p in prompts.load("train") for m in p.messages)
