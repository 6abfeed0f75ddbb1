"""The round: the target's output whatever drafts, caches in step, the sampled distribution exact."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from specl.shared.engine import acceptance
from specl.shared.engine.core import EngineCore
from specl.shared.engine.costs import Costs
from specl.shared.engine.drafters import DraftSampler, ModelDrafter
from specl.shared.engine.request_options import RequestOptions
from specl.shared.engine.sampling import distribution
from specl.shared.errors import RequestRejected
from specl.shared.models.head import new_head
from specl.shared.sampling_params import SamplingParams

PROMPT = [5, 17, 40, 8, 17, 40, 8, 22]
CHEAP = Costs({1: 1.0, 16: 1.1}, {1: 0.01, 8: 0.08})


def plain_greedy(target, prompt, count):
    """One full forward a token, no cache: the slow oracle."""
    text = list(prompt)
    for _ in range(count):
        logits = target.model(mx.array([text]))[0, -1]
        text.append(int(mx.argmax(logits).item()))
        if text[-1] in target.stop_tokens:
            break
    return text[len(prompt) :]


def run(engine, options, prompt=PROMPT, costs=CHEAP):
    engine.costs = costs
    session = engine.session(prompt, options)
    while not session.prefill():
        pass
    while session.finish_reason is None:
        session.round()
        session.check_in_step()
    return session


def drafts(tiny, family):
    target = tiny(family=family)
    return {
        "none": None,
        "itself": target,
        "another": tiny(seed=5, family=family, layers=1),
        "head": new_head(target, np.arange(0, 97, 2)),
    }


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["none", "itself", "another", "head"])
def test_greedy_output_is_the_targets_own_whatever_drafts(tiny, family, kind):
    target = tiny(family=family)
    expected = plain_greedy(target, PROMPT, 40)
    for k, ngram in itertools.product((0, 1, 2, 4, 7, None), (False, True)):
        engine = EngineCore(target, drafts(tiny, family)[kind])
        session = run(engine, RequestOptions(max_tokens=40, num_draft_tokens=k, ngram=ngram, capture_k=8))
        assert session.output == expected, (k, ngram)


def test_draft_equal_to_the_target_is_always_accepted(tiny):
    session = run(EngineCore(tiny(), tiny()), RequestOptions(max_tokens=24, num_draft_tokens=4, ngram=False))
    assert session.stats.accepted["model"] == session.stats.drafted["model"] > 0


def test_length_limit_is_exact_and_eos_ends(tiny):
    target = tiny()
    for limit in range(1, 9):
        session = run(EngineCore(target, target), RequestOptions(max_tokens=limit, num_draft_tokens=4, ngram=False))
        assert len(session.output) <= limit
    stopped = tiny(seed=11)
    stopped.tokenizer.eos_token_ids = set(plain_greedy(stopped, PROMPT, 8)[5:6])
    session = run(EngineCore(stopped, stopped), RequestOptions(max_tokens=30, num_draft_tokens=7, ngram=False))
    assert session.finish_reason == "stop" and session.output[-1] in stopped.stop_tokens
    assert session.output == plain_greedy(stopped, PROMPT, 30)
    stopped.tokenizer.eos_token_ids = {3}


def test_draft_behind_an_end_token_is_not_rejected(tiny):
    stopped = tiny(seed=11)
    for index in range(1, 8):
        stopped.tokenizer.eos_token_ids = set(plain_greedy(stopped, PROMPT, 8)[index : index + 1])
        options = RequestOptions(max_tokens=30, num_draft_tokens=4, ngram=False)
        tally = run(EngineCore(stopped, stopped), options).stats
        assert tally.tested_by_depth == tally.accepted_by_depth and tally.rejected == 0
        assert sum(tally.accepted_by_depth) == tally.accepted["model"] > 0
    stopped.tokenizer.eos_token_ids = {3}


def test_one_seed_gives_one_text_with_any_drafter(tiny):
    target, sampling = tiny(), SamplingParams(temperature=0.9, top_p=0.9, seed=12)
    texts = set()
    for draft, k, ngram in itertools.product(drafts(tiny, "llama").values(), (0, 1, 4, None), (False, True)):
        session = run(
            EngineCore(target, draft),
            RequestOptions(sampling=sampling, max_tokens=24, num_draft_tokens=k, ngram=ngram),
        )
        texts.add(tuple(session.output))
    assert len(texts) == 1


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=0.9, seed=12), SamplingParams(temperature=2.0)]
)
def test_padded_vocabulary_drafts_only_existing_tokens(tiny, sampling):
    target = tiny()
    engine = EngineCore(target, tiny(seed=5, vocabulary=160, sharp=0.1))
    for _ in range(3):
        session = run(engine, RequestOptions(sampling=sampling, max_tokens=12, num_draft_tokens=4, ngram=False))
        assert session.stats.drafted["model"] > 0 and max(session.output) < 97


def test_draft_cache_is_compared_from_the_last_match(tiny):
    class Watched(list):
        seen = 0

        def __getitem__(self, index):
            self.seen += isinstance(index, int)
            return super().__getitem__(index)

    drafter = ModelDrafter(tiny(), 97)
    drafter.extend(list(range(4, 84)), None)
    draw = DraftSampler(SamplingParams(), lambda: 0.5, None)
    drafter.propose(3, draw)
    drafter.extend([5, 6], None)
    drafter.propose(3, draw)
    drafter._cached = Watched(drafter._cached)
    drafter.extend([7], None)
    drafter.propose(3, draw)
    assert drafter._cached.seen < 8, "of more than eighty tokens"
    drafter.rewind(40)
    drafter.extend([9, 9], None)
    again = ModelDrafter(tiny(), 97)
    again.extend([*range(4, 44), 9, 9], None)
    assert drafter.propose(3, draw).tokens == again.propose(3, draw).tokens


@pytest.mark.parametrize("kind", ["itself", "head"])
def test_next_turn_reuses_the_caches(tiny, kind):
    target = tiny()
    engine = EngineCore(target, drafts(tiny, "llama")[kind])
    prompt = np.random.default_rng(0).integers(4, 97, 40).tolist()
    for turn in range(3):
        options = RequestOptions(max_tokens=12, num_draft_tokens=3, ngram=False)
        session = run(engine, options, prompt)
        assert session.output == plain_greedy(target, prompt, 12)
        assert (session.stats.reused_tokens > 30) == (turn > 0)
        if kind == "head":
            states = session.all_states()
            whole = target.hidden_states(mx.array([session.state.tokens[:-1]]))[0]
            assert np.abs(states - np.array(whole)).max() < 5e-3, "spooled states are those of the whole text"
        engine.save_to_prefix_cache(session, "")
        prompt = [*session.state.tokens, 9, 10, 11]


def test_cut_answer_leaves_cache_and_text_in_step(tiny):
    engine = EngineCore(tiny(), tiny())
    session = run(engine, RequestOptions(max_tokens=20, num_draft_tokens=4, ngram=False, capture_k=4))
    session.cut(7, "stop")
    session.check_in_step()
    assert len(session.output) == 7 == len(session.capture.ids)


def test_capture_has_one_row_an_output_token(tiny):
    target = tiny()
    session = run(
        EngineCore(target, tiny(seed=5, layers=1)),
        RequestOptions(max_tokens=30, num_draft_tokens=4, ngram=False, capture_k=16),
    )
    capture = session.capture
    assert len(capture.ids) == len(capture.tail) == len(session.output)
    assert [int(row[0]) for row in capture.ids] == session.output, "greedy: the target's best is what was emitted"
    assert capture.rejected
    for item in capture.rejected:
        assert session.output[item.position] == item.target_token != item.draft_token
    whole = np.array(target.model(mx.array([session.state.tokens]))[0])
    row = whole[len(PROMPT) - 1 + 3].astype(np.float64)
    exact = row - np.log(np.exp(row - row.max()).sum()) - row.max()
    assert np.allclose(capture.logprobs[3], exact[capture.ids[3].astype(int)], atol=1e-4)


def test_bad_requests_are_refused(tiny):
    engine = EngineCore(tiny(), None)
    for prompt, options in (
        ([], RequestOptions()),
        ([1] * 256, RequestOptions()),
        (PROMPT, RequestOptions(max_tokens=0)),
        (PROMPT, RequestOptions(sampling=SamplingParams(temperature=-1))),
    ):
        with pytest.raises(RequestRejected):
            engine.session(prompt, options)


# ------------------------------------------------------------------------------------------------ the sampled distribution
def exact_distribution(target, prompt, sampling, length):
    """Probability of every sequence, by enumeration."""
    paths = {(): 1.0}
    for _ in range(length):
        longer = {}
        for sequence, p in paths.items():
            row = np.array(target.model(mx.array([[*prompt, *sequence]]))[0, -1])
            d = distribution(row, sampling)
            for token, q in zip(d.ids.tolist(), d.p.tolist(), strict=True):
                longer[(*sequence, token)] = p * q
        paths = longer
    return paths


def chi_square_p(observed, expected, draws):
    """Upper tail of Pearson's statistic, cells with under five expected taken together (Wilson-Hilferty)."""
    big = {key: p for key, p in expected.items() if p * draws >= 5}
    rest = 1 - sum(big.values())
    cells = [(observed.get(key, 0), p * draws) for key, p in big.items()]
    if rest * draws > 1e-6:
        cells.append((draws - sum(count for count, _ in cells), rest * draws))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    k = len(cells) - 1
    z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / np.sqrt(2 / (9 * k))
    from math import erfc

    return 0.5 * erfc(z / np.sqrt(2))


DRAWS, LENGTH = 1500, 2  # enough to refuse a broken rule with p < 0.001: a few cells, each with many draws


def sampled(tiny, sampling, draws=DRAWS, k=2):
    target, draft = (tiny(seed=seed, vocabulary=8, layers=1, sharp=2.0) for seed in (0, 7))
    target.tokenizer.eos_token_ids = set()
    engine = EngineCore(target, draft)
    observed = {}
    for i in range(draws):
        session = run(
            engine,
            RequestOptions(
                sampling=sampling, max_tokens=LENGTH, num_draft_tokens=(k if i % 3 else None), ngram=i % 2 == 0
            ),
            [1, 2, 1, 2],
        )
        key = tuple(session.output)
        observed[key] = observed.get(key, 0) + 1
    return observed, exact_distribution(target, [1, 2, 1, 2], sampling, LENGTH)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_sampled_sequences_follow_the_target_distribution(tiny, temperature):
    sampling = SamplingParams(temperature=temperature, top_p=0.8)
    observed, expected = sampled(tiny, sampling)
    assert set(observed) <= set(expected)
    assert chi_square_p(observed, expected, DRAWS) > 0.001


def test_a_broken_rule_fails_the_same_test(tiny, monkeypatch):
    monkeypatch.setattr(acceptance, "residual", lambda target_p, draft_p, weight=1.0: target_p)
    sampling = SamplingParams(temperature=1.3)
    observed, expected = sampled(tiny, sampling)
    assert chi_square_p(observed, expected, DRAWS) < 0.001


def test_smaller_draft_reads_no_foreign_rows(tiny):
    sampler = DraftSampler(SamplingParams(temperature=0.0), lambda: 0.5, None)
    drafts = []
    for token in (96, 63):
        drafter = ModelDrafter(tiny(vocabulary=64), 97)  # a sibling whose embedding is shorter than the target's
        drafter.extend([5, token, 7], None)
        drafts.append(list(drafter.propose(3, sampler).tokens))
    assert drafts[0] == drafts[1]
