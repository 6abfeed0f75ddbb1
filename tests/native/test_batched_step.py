"""Several requests in one step: each says what it would have said alone, whatever the others draft."""

import itertools

import numpy as np
import pytest

from specl.shared.engine import decode
from specl.shared.engine.core import EngineCore
from specl.shared.engine.costs import Costs
from specl.shared.engine.decode import decode_rounds
from specl.shared.engine.request_options import RequestOptions
from specl.shared.models.head import new_head
from specl.shared.sampling_params import SamplingParams

CHEAP = Costs({1: 1.0, 16: 1.1}, {1: 0.01, 8: 0.08})
PROMPTS = [[5, 17, 40, 8, 17, 40, 8, 22], [9], list(range(20, 60)), [5, 5, 5, 5], [7, 8, 9] * 6]


class _Tokenizer:
    eos_token_ids = {3}  # noqa: RUF012


@pytest.fixture
def engine(language_model):
    target = language_model(max_position_embeddings=128)
    target.tokenizer = _Tokenizer()
    draft = new_head(target, np.arange(0, 311, 2))
    draft.use_cpu_kernels()
    made = EngineCore(target, draft)
    made.costs = CHEAP
    return made


def start(engine, options):
    sessions = []
    for prompt, option in zip(itertools.cycle(PROMPTS), options, strict=False):
        session = engine.session(prompt, option)
        while not session.prefill():
            pass
        sessions.append(session)
    return sessions


def alone(session):
    while session.finish_reason is None:
        session.round()
    return session.output


def together(sessions):
    while running := [session for session in sessions if session.finish_reason is None]:
        decode_rounds(running)
        for session in running:
            session.check_in_step()
    return [session.output for session in sessions]


MIXED = [
    RequestOptions(max_tokens=30, num_draft_tokens=k, ngram=ngram, sampling=sampling, capture_k=capture)
    for k, ngram, sampling, capture in [
        (None, True, SamplingParams(), 0),
        (0, False, SamplingParams(), 4),
        (2, False, SamplingParams(0.8, seed=4), 4),
        (4, False, SamplingParams(), 0),
        (None, False, SamplingParams(1.2, top_p=0.9, seed=1), 0),
        (0, True, SamplingParams(0.7, seed=9), 0),
        (1, False, SamplingParams(), 8),
    ]
]


@pytest.mark.parametrize("count", [2, 3, 5, 7, 20])
def test_each_says_what_it_says_alone(engine, count):
    options = list(itertools.islice(itertools.cycle(MIXED), count))
    wanted = [alone(session) for session in start(engine, options)]
    assert together(start(engine, options)) == wanted


def test_fixed_draft_length_is_exact_in_a_batch(engine):
    sessions = start(engine, [RequestOptions(max_tokens=20, num_draft_tokens=4, ngram=False)] * 6)
    together(sessions)
    for session in sessions:
        shorter = sum(n for k, n in session.stats.k_histogram.items() if k != 4)
        assert session.stats.k_histogram[4] and shorter <= 5, (
            "only the end may be shorter, and the start of a one-token prompt"
        )


def test_one_step_serves_all_of_them(engine, monkeypatch):
    sizes = []
    decode_round = decode.decode_round
    monkeypatch.setattr(decode, "decode_round", lambda batch: (sizes.append(len(batch)), decode_round(batch)))
    together(start(engine, [RequestOptions(max_tokens=5, num_draft_tokens=0, ngram=False)] * 4))
    assert sizes[0] == 4 and sizes == sorted(sizes, reverse=True)


def test_rows_of_others_make_drafting_less_worth():
    steep = Costs({1: 1.0, 2: 1.0, 3: 2.0, 16: 15.0}, {1: 0.1})
    from specl.shared.engine.acceptance_estimate import AcceptanceEstimate

    hopeful = AcceptanceEstimate(prior=0.9)
    assert steep.best_k(hopeful, 1)[0] == 1
    assert steep.with_batch_rows(2).best_k(hopeful, 1)[0] == 0
