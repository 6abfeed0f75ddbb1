"""`from specl import Engine`: what a notebook sees."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from specl import Engine
from specl.shared.engine.acceptance import block
from specl.shared.engine.drafters import NO_DRAFT, Draft
from specl.shared.engine.sampling import Distribution, point_mass
from specl.shared.errors import AdapterRejected, ConfigError, ModelError, RequestRejected, SpecLoraError
from tests.fakes import run_python

OPTIONS = {"max_tokens": 12, "temperature": 0, "ngram": False}


@pytest.fixture(scope="module")
def engine(model_folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECL_VAR", str(tmp_path_factory.mktemp("var")))
        made = Engine.load(str(model_folder), str(model_folder), calibrate=False)
        yield made
        made.close()


@pytest.mark.process
def test_import_specl_loads_next_to_nothing():
    heavy = "{'numpy', 'mlx', 'zmq', 'pydantic', 'ruamel', 'sqlalchemy', 'click', 'specl.shared'}"
    done = run_python(f"import sys, specl; print({heavy} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_stream_pieces_join_to_the_text(engine):
    pieces = list(engine.stream("hello", **OPTIONS))
    assert "".join(pieces) == engine.last.text == engine.generate("hello", **OPTIONS).text
    assert len(engine.last.tokens) == 12 and engine.last.finish_reason == "length"
    # the draft is the target itself: every guess stands
    assert engine.last.stats.model_accepted == engine.last.stats.model_drafted > 0


def test_drafting_and_seed_leave_the_text_unchanged(engine):
    plain = engine.generate("hello there", **OPTIONS, num_draft_tokens=0)
    assert engine.generate("hello there", **OPTIONS, num_draft_tokens=4).tokens == plain.tokens
    drawn = [engine.generate("hi", **OPTIONS | {"temperature": 0.9}, seed=5, num_draft_tokens=k).tokens for k in (0, 4)]
    assert drawn[0] == drawn[1]


def test_chat_template_and_system_message_are_applied(engine):
    alone = engine.generate("hello", **OPTIONS).stats.prompt_tokens
    with_system = engine.generate("hello", **OPTIONS, system="Be brief.").stats.prompt_tokens
    as_messages = engine.generate(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}], **OPTIONS
    )
    assert alone > len("hello") and with_system > alone and as_messages.stats.prompt_tokens == with_system


def test_a_stop_string_ends_the_answer_before_itself(engine):
    whole = engine.generate("hello", **OPTIONS).text
    stop = whole[3:5]
    answer = engine.generate("hello", **OPTIONS, stop=stop)
    assert answer.text == whole[: whole.index(stop)] and answer.finish_reason == "stop"


def test_leaving_a_stream_keeps_what_was_made(engine):
    for _ in engine.stream("a story", **OPTIONS | {"max_tokens": 100}):
        break
    assert engine.last.finish_reason == "cancelled" and 0 < len(engine.last.tokens) < 100
    assert engine.generate("a story", **OPTIONS).finish_reason == "length"


def test_stats_add_up(engine):
    before = engine.stats()
    answer = engine.generate("count", **OPTIONS)
    after = engine.stats()
    assert after["answers"] == before["answers"] + 1 and after["tokens"] == before["tokens"] + len(answer.tokens)
    assert after["acceptance_rate"] == round(after["model_accepted"] / after["model_drafted"], 4)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_token": 5}, "max_token"),
    ],
)
def test_invalid_options_are_refused_before_the_first_piece(engine, options, word):
    with pytest.raises(RequestRejected, match=word):
        engine.stream("hi", **options)


def test_other_threads_and_closed_engines_are_refused(model_folder):
    with Engine.load(str(model_folder), calibrate=False) as engine:
        said = []

        def use():
            try:
                engine.generate("hi", **OPTIONS)
            except SpecLoraError as error:
                said.append(str(error))

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        assert "thread" in said[0]
        with pytest.raises(AdapterRejected, match="no adapter 'best'"):
            engine.use_adapter("best")
    with pytest.raises(SpecLoraError, match="closed"):
        engine.generate("hi")


def test_missing_model_is_one_sentence():
    with pytest.raises(ModelError, match="/nowhere"):
        Engine.load("/nowhere")


class Oracle:
    """Knows the whole text beforehand and breaks a rule on request."""

    def __init__(self, tokens, spoil=lambda draft: draft):
        self.tokens, self.spoil, self.length, self.prompt = tokens, spoil, 0, None

    def extend(self, tokens, states):
        assert states is None
        self.prompt = len(tokens) if self.prompt is None else self.prompt
        self.length += len(tokens)

    def rewind(self, length):
        self.length = length

    def propose(self, k, draw):
        # the first emitted token comes after the prompt and before any text is emitted
        tokens = self.tokens[self.length - self.prompt :][:k]
        draft = Draft(tokens, [point_mass(t) for t in tokens], [1.0] * len(tokens), "whatever")
        return self.spoil(draft) if tokens else NO_DRAFT


def with_oracle(model_folder, plain, spoil=lambda draft: draft):
    return Engine.load(str(model_folder), drafter=lambda target, draft: Oracle(plain.tokens, spoil), calibrate=False)


def test_custom_drafter_counts_as_model_drafter(engine, model_folder):
    plain = engine.generate("hello", **OPTIONS, num_draft_tokens=0)
    with with_oracle(model_folder, plain) as own:
        answer = own.generate("hello", **OPTIONS, num_draft_tokens=3)
    assert answer.tokens == plain.tokens
    assert answer.stats.model_accepted == answer.stats.model_drafted == 9 and answer.stats.rounds == 3


@pytest.mark.parametrize(
    "spoil, word",
    [
        (lambda d: replace(d, tokens=[9999] * len(d.tokens)), "vocabulary"),
        (lambda d: replace(d, draft_probs=[point_mass(t + 1) for t in d.tokens]), "does not contain it"),
        (lambda d: replace(d, draft_probs=d.draft_probs[1:]), "distributions"),
        (lambda d: d.tokens, "not a Draft"),
        (
            lambda d: replace(d, tokens=d.tokens * 9, draft_probs=d.draft_probs * 9, confidences=d.confidences * 9),
            "asked for",
        ),
    ],
)
def test_drafter_that_breaks_a_rule_is_named(engine, model_folder, spoil, word):
    plain = engine.generate("hello", **OPTIONS, num_draft_tokens=0)
    with with_oracle(model_folder, plain, spoil) as own, pytest.raises(SpecLoraError, match=word):
        own.generate("hello", **OPTIONS, num_draft_tokens=3)


def test_what_is_no_drafter_is_refused_at_load(model_folder):
    with pytest.raises(ConfigError, match="extend, propose, rewind"):
        Engine.load(str(model_folder), drafter=lambda target, draft: object(), calibrate=False)


def test_drafter_that_cannot_be_built_is_refused(model_folder):
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        Engine.load(str(model_folder), drafter=lambda target, draft: 1 / 0, calibrate=False)


def test_fixed_drafts_keep_the_sampling_distribution():
    """Block verification with point masses, as a drafter of one's own has them: pairs come as the target's law says."""
    first, second = np.array([0.5, 0.3, 0.2]), np.array([[0.1, 0.6, 0.3], [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])
    rng, ids, n = np.random.default_rng(0), np.arange(3), 20_000
    rows = [Distribution(ids, first), Distribution(ids, second[0]), Distribution(ids, second[1])]
    counts = np.zeros((3, 3))
    for _ in range(n):
        verdict = block(lambda i: rows[i], [0, 1], [point_mass(0), point_mass(1)], rng.random)
        made = [0, 1][: verdict.accepted] + [verdict.token]
        after = Distribution(ids, second[made[0]])
        counts[made[0], made[1] if len(made) > 1 else after.draw(rng.random())] += 1
    expected = n * first[:, None] * second
    assert ((counts - expected) ** 2 / expected).sum() < 26.1  # chi-square, 8 degrees of freedom, p = 0.001


def test_broken_drafter_costs_a_daemon_only_speed(engine, model_folder):
    from specl.shared.engine.core import EngineCore as Core
    from specl.shared.engine.request_options import RequestOptions
    from specl.shared.models.load import load

    def fail(draft):
        raise KeyError("a bug")

    plain = engine.generate("hello", **OPTIONS, num_draft_tokens=0)
    heard = []
    target = load(str(model_folder), model_folder)
    core = Core(target, None, drafter_factory=lambda t, d: Oracle(plain.tokens, fail), on_error=heard.append)
    _, prompt = core.encode_chat([{"role": "user", "content": "hello"}])
    made = [
        t
        for part in core.generate(prompt, RequestOptions(max_tokens=12, num_draft_tokens=3, ngram=False))
        for t in part
    ]
    assert made == plain.tokens and [str(error) for error in heard] == ["'a bug'"]
