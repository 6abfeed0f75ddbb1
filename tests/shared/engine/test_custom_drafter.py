"""A user's drafter: odd values are made plain or refused, and a failure ends with its request."""

import importlib
import sys

import mlx.core as mx
import numpy as np
import pytest

from specl.shared.engine.core import EngineCore
from specl.shared.engine.custom_drafter import CustomDrafter
from specl.shared.engine.drafters import NO_DRAFT, Draft, DraftSampler
from specl.shared.engine.request_options import RequestOptions
from specl.shared.engine.sampling import Distribution, point_mass
from specl.shared.loading.costs import costs_key, load_or_calibrate
from specl.shared.sampling_params import SamplingParams

DRAW = DraftSampler(SamplingParams(), lambda: 0.5, None)


class Fixed:
    """Proposes the same again and again."""

    def __init__(self, tokens, draft_probs, confidences):
        self.draft = Draft(tokens, draft_probs, confidences, "whatever")

    def extend(self, tokens, states):
        pass

    def rewind(self, length):
        pass

    def propose(self, k, draw):
        return self.draft


def proposed(tokens, draft_probs, confidences):
    errors = []
    return CustomDrafter(Fixed(tokens, draft_probs, confidences), 100, errors.append).propose(4, DRAW), errors


@pytest.mark.parametrize(
    "tokens, confidences",
    [
        ([np.int64(3), np.int32(4)], [1.0, 0.5]),
        (np.array([3, 4]), np.array([1.0, 0.5])),
        (mx.array([3, 4]).tolist(), [np.float32(1), np.float32(0.5)]),
    ],
)
def test_what_numpy_counts_in_becomes_plain_numbers(tokens, confidences):
    draft, errors = proposed(tokens, [point_mass(3), point_mass(4)], confidences)
    assert not errors and draft.tokens == [3, 4] and draft.confidences == [1.0, 0.5]
    assert {type(token) for token in draft.tokens} == {int} and {type(value) for value in draft.confidences} == {float}
    mx.array([[5, *draft.tokens]])


def test_an_array_without_a_token_is_no_draft():
    draft, errors = proposed(np.array([], int), [], [])
    assert draft.tokens == [] and not errors


@pytest.mark.parametrize(
    "token, ids, p, confidence",
    [
        (3.0, [3], [1.0], 1.0),
        ("3", [3], [1.0], 1.0),
        (3, [3, 4], [0.5, np.nan], 0.5),
        (3, [3, 4], [1.5, -0.5], 0.5),
        (3, [3, 4], [np.inf, 0.5], 0.5),
        (3, [4, 3], [0.5, 0.5], 0.5),
        (3, [3, 3, 4], [0.5, 0.25, 0.25], 0.5),
        (3, [3.0, 4.0], [0.5, 0.5], 0.5),
        (3, [3, 100], [0.5, 0.5], 0.5),
        (3, [3, 4], [1.0], 0.5),
        (3, [3], [1.0], np.nan),
        (3, [3], [1.0], -2.0),
        (3, [3], [1.0], None),
    ],
)
def test_draft_that_would_change_the_distribution_is_refused(token, ids, p, confidence):
    draft, errors = proposed([token], [Distribution(np.array(ids), np.array(p))], [confidence])
    assert draft is NO_DRAFT and len(errors) == 1


class FailsOnce:
    """Guesses fives, but in the first request it raises."""

    count = 0

    def __init__(self):
        FailsOnce.count += 1
        self.fails = FailsOnce.count == 2  # the first one is made to see whether it can be

    def extend(self, tokens, states):
        pass

    def rewind(self, length):
        pass

    def propose(self, k, draw):
        if self.fails:
            raise KeyError("a bug")
        return Draft([5], [point_mass(5)], [1.0], "")


def test_failure_ends_with_its_request(tiny):
    errors = []
    engine = EngineCore(tiny(), None, drafter_factory=lambda target, draft: FailsOnce(), on_error=errors.append)
    prompt, drafted = list(range(4, 44)), []
    for _ in range(2):
        session = engine.session(prompt, RequestOptions(max_tokens=6, num_draft_tokens=1, ngram=False))
        while not session.prefill():
            pass
        while session.finish_reason is None:
            session.round()
        drafted.append(session.stats.drafted["model"])
        engine.save_to_prefix_cache(session, "")
        prompt = [*session.state.tokens, 9, 10]
    assert session.stats.reused_tokens > 30
    assert len(errors) == 1 and drafted[0] == 0 and drafted[1] > 0


def test_failed_drafter_leaves_no_costs_file(tiny, tmp_path, monkeypatch):
    source = tmp_path / "somebodys.py"
    source.write_text("class Mine:\n    def extend(self, *a): pass\n    rewind = extend\n    def propose(self, k, draw): return 1 / 0\n"
                      "def make(target, draft): return Mine()\n")  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "somebodys", importlib.import_module("somebodys"))
    make, folder = sys.modules["somebodys"].make, tmp_path / "costs"
    folder.mkdir()
    engine = EngineCore(tiny(), None, drafter_factory=make, on_error=lambda error: None)
    load_or_calibrate(engine, folder)
    assert not list(folder.iterdir())
    before = costs_key(engine)
    source.write_text(source.read_text().replace("1 / 0", "None"))
    assert costs_key(engine) != before
